"""Layers of a model, the sites inside them, their experts, and the head."""
