"""Precision plans: the number format of each linear map under a budget of bits."""
