"""What every kernel is made with: launch, backend, layout, random numbers, reductions, tiles."""
