"""Unified Vision Transformer Compression (ICLR 2022)."""
