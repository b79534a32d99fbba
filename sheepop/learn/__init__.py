"""Explanation: what happens inside a model, and the formulas for it, on real numbers."""
