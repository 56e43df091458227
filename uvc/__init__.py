"""Unified Visual Transformer Compression (ICLR 2022)."""
