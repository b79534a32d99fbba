"""Text from a trained model: filtering and drawing tokens, the naive reference, the cached engine, completions."""
