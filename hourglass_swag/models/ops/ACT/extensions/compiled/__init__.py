"""Place of the compiled operators of ACT, ``_C.*.so``; installed under the name ``leanvit_act``."""
