"""Views of a comparison: what may be deployed, curves over ratios, sensitivity to parameters."""
