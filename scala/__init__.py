"""Slicing Vision Transformer for Flexible Inference (NeurIPS 2024).

One network, cut to any width without retraining.
"""
