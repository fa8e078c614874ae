"""Plans over the linear maps of a model under a budget: zeros of their inputs, or number formats of their weights."""
