"""Response normalisation + max-pooling."""
