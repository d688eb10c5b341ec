"""Pretraining with Director-Experts networks: model, data, engine and the `dex` command, on top of `dexkernels`."""
