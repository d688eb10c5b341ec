"""What a trained model is good for: `load` it, `embed` images, export it."""
