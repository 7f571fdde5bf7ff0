"""Video in and out, chunk by chunk: PyAV does the codecs, Pillow the pictures, kornia the geometry; no ComfyUI."""
