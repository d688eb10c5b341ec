"""Use of a trained model: ``load`` it, ``embed`` images, export it."""
