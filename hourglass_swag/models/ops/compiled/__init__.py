"""Place of the compiled operators of ACT and SMYRF, ``_C.*.so``; installed under the name ``leanvit_ops``."""
