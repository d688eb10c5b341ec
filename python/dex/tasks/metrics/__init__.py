"""Metrics of tasks, by case and over patients; docs/metrics.md has the equations and their sources."""
