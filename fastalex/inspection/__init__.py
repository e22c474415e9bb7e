"""What a training step is on a GPU that is not here: launches, machine code, cost."""
