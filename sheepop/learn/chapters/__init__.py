"""The formulas by chapter, in the order in which a text meets them."""
