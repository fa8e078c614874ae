"""Distillation: a smaller model is trained to predict what the whole model predicts."""
