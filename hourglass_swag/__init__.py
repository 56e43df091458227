"""Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning (NeurIPS 2022).

Tokens clustered inside frozen SWAG classifiers; EViT, ToMe, ATS, ACT, Evo-ViT and SMYRF beside it.
"""
