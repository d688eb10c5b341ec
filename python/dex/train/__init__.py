"""Pretraining: what a run is planned to be, its steps, its folder, its checkpoints."""
