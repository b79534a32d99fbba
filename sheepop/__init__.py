"""sheepop: from any pile of text to a trained, measured and talking language model."""

__version__ = "0.1.0"
