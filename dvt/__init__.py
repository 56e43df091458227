"""Not All Images are Worth 16x16 Words (NeurIPS 2021).

A cascade with growing numbers of tokens, left as soon as it is sure.
"""
