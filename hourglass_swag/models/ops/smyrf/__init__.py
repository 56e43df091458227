"""SMYRF attention; see ``attn``."""
