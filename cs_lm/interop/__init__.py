"""Weights of other programs in, and ours out, in the layouts that they read."""
