"""How good a model is: its scores on held-out text, plots of a run, and the report page."""
