"""What tests do where a compiler that they need is not there."""

import os

import pytest


def absent(reason: str):
    """Skips; in continuous integration (the variable CI is set) it fails, so that nothing goes unchecked unseen."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; with CI set the compiled kernels must be checked", pytrace=False)
    pytest.skip(reason)
