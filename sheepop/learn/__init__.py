"""What explains the model and its code: formulas on real numbers, traces of runs, pictures."""
