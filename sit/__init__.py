"""Self-slimmed Vision Transformer (ECCV 2022).

Tokens mixed into fewer ones, trained by distillation of every token.
"""
