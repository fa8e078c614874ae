"""Which layers go: plans, methods that choose, the pruned checkpoint."""
