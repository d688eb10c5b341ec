"""Pretraining: the plan of a run, its steps, its folder and its checkpoints."""
