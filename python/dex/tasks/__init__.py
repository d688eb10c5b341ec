"""Downstream tasks: fine-tuning on labelled images, evaluation, prediction and comparison."""
