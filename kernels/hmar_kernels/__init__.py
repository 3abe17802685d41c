"""Block-sparse attention over pyramids of image tokens. Start with `mask.py` (which tokens see which)."""
