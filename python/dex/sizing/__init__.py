"""Memory, time and communication of a run before it begins."""
