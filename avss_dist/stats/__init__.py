"""The mathematics: LayerStats and its merge, histograms, scores."""
