"""Estimates of memory, time and communication of a run before it starts."""
