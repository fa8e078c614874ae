"""Changes of the forward pass of an open model."""
