"""What a cut costs: predicted before a model runs, counted in FLOPs, measured with a clock."""
