"""How one replica (a model copy) is spread over devices."""
