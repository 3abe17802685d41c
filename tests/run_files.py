"""The weights that training runs have left, compared."""

import torch
from safetensors.torch import load_file


def weights(folder):
    return load_file(folder / "weights" / "model.safetensors")


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
