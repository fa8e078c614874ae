"""Mathematics of the scores: LayerStats and its merge, histograms, scores, intervals, rankings."""
