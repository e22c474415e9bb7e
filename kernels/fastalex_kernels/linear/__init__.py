"""Fully connected + bias + ReLU + dropout."""
