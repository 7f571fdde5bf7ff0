"""Tune-A-Video: attention between frames in image models, and the files of networks tuned on one clip."""
