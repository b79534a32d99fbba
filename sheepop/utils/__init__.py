"""Floor 0: errors, atomic files, seeds, devices, logging."""
