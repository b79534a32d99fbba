"""The network. It knows token ids only; text lives in `sheepop.data`."""
