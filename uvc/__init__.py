"""Unified Visual Transformer Compression (ICLR 2022).

Heads, neurons and blocks removed together under one budget.
"""
