"""What models and plans are worth: evaluate, ablate, experiment."""
