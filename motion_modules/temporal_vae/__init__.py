"""Decoders that look across the frames of a clip, in bounded memory, and the files they come in."""
