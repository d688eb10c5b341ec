"""A trained model, loaded and applied."""
