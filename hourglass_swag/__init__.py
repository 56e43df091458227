"""Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, on SWAG."""
