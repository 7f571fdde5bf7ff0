"""The only room that touches comfy.* internals."""
