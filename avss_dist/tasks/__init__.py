"""What a model can be asked: text loss, harness tasks, the loss without layers, gradients."""
