"""Ways to spread one replica (a model copy) over devices."""
