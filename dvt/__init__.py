"""Dynamic Vision Transformer (NeurIPS 2021)."""
