"""Analysis of a model: held-out evaluation, probes, use of experts, plots."""
