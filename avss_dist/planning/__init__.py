"""Plans made from what a warehouse holds."""
