"""Work on Ray workers: pool, gangs of ranks, heartbeats."""
