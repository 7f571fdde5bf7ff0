"""Data sets, recipes and one training loop; knows nothing of the host."""
