"""Weights of other programs: their files read, and ours written for them."""
