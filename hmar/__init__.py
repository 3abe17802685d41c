"""HMAR: hierarchical masked autoregressive image generation (arXiv 2506.04421)."""
