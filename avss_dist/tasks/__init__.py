"""Questions to a model that give rows of samples: text loss, harness tasks, the loss without layers, gradients."""
