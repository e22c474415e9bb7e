"""What a trained net is worth: errors, predictions, figures, ablations."""
