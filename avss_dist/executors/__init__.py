"""Who does the work: this process, or Ray workers."""
