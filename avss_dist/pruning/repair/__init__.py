"""What removed layers did, given back by least squares: fitted on text, folded into the layers that stay."""
