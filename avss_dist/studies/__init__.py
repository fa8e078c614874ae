"""Commands that measure and change models: ablate, evaluate, experiment, shrink, distill, quantize, sparsify."""
