"""What a launch takes on the GPU that is here: profiler and autotuner."""
