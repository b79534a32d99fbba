"""What explains the model and its code."""
