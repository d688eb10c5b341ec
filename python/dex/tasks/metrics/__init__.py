"""Metrics of tasks, per case and over patients; docs/metrics.md has the equations and their sources."""
