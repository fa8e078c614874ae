"""Runs, from the request to the warehouse: job files, planning, driving, submission."""
