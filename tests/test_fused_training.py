"""What training applies to a model, together: fused operators, activation checkpointing, compiling, dropped paths."""

import pytest
import torch

from hmar.config import ModelConfig
from hmar.loss import token_weights
from hmar.model import DropPath, NextScaleTransformer
from hmar.parallelize import checkpoint_activations, compile_objective
from hmar.stages import NextScaleObjective
from hmar_kernels import triton_device
from hmar_kernels.qk_norm import triton as qk_kernels

CONFIG = ModelConfig(
    depth=3, width=24, num_heads=3, num_classes=5, vocab_size=11, code_dim=4, sides=(1, 2, 3), drop_path=0.5
)


def loss_and_gradients(recompute="none", compiled=False):
    torch.manual_seed(0)
    model = NextScaleTransformer(CONFIG, "block_diagonal").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    for i, module in enumerate(m for m in model.modules() if isinstance(m, DropPath) and m.p > 0):
        module.factor_B = torch.tensor([[2.0, 0, 2], [0, 2, 2]])[i % 2]
    names, parameters = zip(*model.named_parameters(), strict=True)
    objective = NextScaleObjective(model, token_weights(CONFIG.pyramid))
    checkpoint_activations(objective, recompute)
    compile_objective(objective, compiled, "aot_eager")
    classes_B, codes_BL = torch.tensor([0, 3, 1]), torch.randint(CONFIG.vocab_size, (3, CONFIG.pyramid.length))
    loss, accuracy = objective(classes_B, torch.randn(3, CONFIG.pyramid.length - 1, CONFIG.code_dim), codes_BL)
    return loss, accuracy, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.fixture(scope="module")
def expected():
    return loss_and_gradients()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_train.py runs the kernels")
@pytest.mark.parametrize(("recompute", "compiled"), [("blocks", False), ("blocks", "blocks"), ("mlp", "model")])
def test_kernels_recomputed_and_compiled(recompute, compiled, expected, monkeypatch):
    """Loss and gradients are those of the references in eager mode; recomputed blocks launch their kernels twice."""
    torch._dynamo.reset()
    monkeypatch.setattr(triton_device, "choose", lambda *_: ("triton", "for this test"))
    launches, launch = [], qk_kernels.forward
    monkeypatch.setattr(qk_kernels, "forward", lambda *arguments: launches.append(1) or launch(*arguments))
    torch.testing.assert_close(loss_and_gradients(recompute, compiled), expected, atol=2e-5, rtol=2e-4)
    assert len(launches) == CONFIG.depth * (2 if recompute == "blocks" else 1)
