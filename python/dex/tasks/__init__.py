"""Downstream tasks: what is to be learned from labelled images, and how well it was."""
