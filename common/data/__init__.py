"""Data sets by name, transforms and loaders. Imports ``run`` alone."""
