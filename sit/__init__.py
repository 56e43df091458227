"""Self-slimmed Vision Transformer (ECCV 2022)."""
