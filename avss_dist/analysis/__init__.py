"""Analysis of a warehouse: comparisons, findings, thresholds, score cards, verdicts."""
