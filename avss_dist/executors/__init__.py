"""Executors: measurement in this process, or on Ray workers."""
