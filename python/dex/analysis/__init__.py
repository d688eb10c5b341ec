"""What a model does: held-out evaluation, probes, how experts are used, plots."""
