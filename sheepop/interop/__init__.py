"""Models that others trained, and ours for other engines."""
