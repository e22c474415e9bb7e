"""Convolution + bias + ReLU."""
