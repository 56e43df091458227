"""Slicing Vision Transformer for Flexible Inference (NeurIPS 2024)."""
