"""AdamW over many tensors in one launch, which scales gradients without rewriting them: see `api.py`."""

from .api import AdamWUpdate, unavailable

__all__ = ["AdamWUpdate", "unavailable"]
