"""What a warehouse says: comparisons, findings, thresholds, score cards, verdicts."""
