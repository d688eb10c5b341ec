"""What a pretraining is good for: ``load`` gives its model back."""
