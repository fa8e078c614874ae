"""Plans of changes of a model: what is dropped, made sparse or rounded, why, and which text was read for it."""
