"""Video in and out, geometry."""
