"""Tests of the rooms that need no host: the pack is imported as `latentmotion`, ComfyUI is never on the path."""

import os

import pack

# Small tensors on a busy machine: two threads that wait for each other were measured ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
pack.load_pack()
