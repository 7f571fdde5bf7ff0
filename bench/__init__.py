"""One file per measurement; `run.py bench NAME` runs `bench.NAME.main`."""
