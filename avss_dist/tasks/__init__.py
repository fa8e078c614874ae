"""Questions to a model: text loss, harness tasks, the loss without layers, gradients; each gives rows of samples."""
