"""Errors, atomic files, seeds, devices, logging."""
