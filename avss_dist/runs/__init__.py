"""Runs, from the request to the warehouse: job files, planning, driving, local and Ray executors, submission."""
