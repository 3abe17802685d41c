"""A training step with the fused operators on a GPU: accuracy beside the references', compilation, memory."""

import pytest
import torch

from hmar.config import SIDES_BY_RESOLUTION, ModelConfig
from hmar.loss import next_scale_targets, token_weights
from hmar.model import NextScaleTransformer
from hmar_kernels import triton_device

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(depth=4, num_classes=10, vocab_size=4096, sides=SIDES_BY_RESOLUTION[256], drop_path=0.0)


@pytest.fixture
def step():
    """step(compiled, autocast) -> loss and gradients, with the operators that "auto" takes."""
    torch.manual_seed(0)
    model = NextScaleTransformer(CONFIG).cuda().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    length = CONFIG.pyramid.length
    classes_B = torch.arange(4, device="cuda")
    inputs_BLE = torch.randn(4, length - 1, CONFIG.code_dim, device="cuda")
    codes_BL = torch.randint(CONFIG.vocab_size, (4, length), device="cuda")
    targets = next_scale_targets(codes_BL, token_weights(CONFIG.pyramid).cuda())

    def run(compiled=False, autocast=True):
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True) if compiled else model
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss, correct_BL = forward(classes_B, inputs_BLE, targets=targets)
        assert correct_BL.shape == codes_BL.shape
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))

    return run


def deviation(gradients, exact):
    """Error of all gradients together, relative."""
    error = torch.stack([(a - b).norm() for a, b in zip(gradients, exact, strict=True)]).norm()
    return float(error / torch.stack([x.norm() for x in exact]).norm())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_is_as_accurate_as_with_the_references(step, compiled, monkeypatch):
    loss, gradients = step(compiled)
    monkeypatch.setattr(triton_device, "choose", lambda *_: ("reference", "for this test"))
    eager_loss, eager = step()
    exact_loss, exact = step(autocast=False)
    assert (loss - exact_loss).abs() <= 2 * (eager_loss - exact_loss).abs() + 1e-3 * exact_loss
    assert deviation(gradients, exact) <= 1.2 * deviation(eager, exact)
    assert all(x.isfinite().all() for x in gradients)


def test_float32_steps_agree(step, monkeypatch):
    loss, gradients = step(autocast=False)
    monkeypatch.setattr(triton_device, "choose", lambda *_: ("reference", "for this test"))
    expected_loss, expected = step(autocast=False)
    torch.testing.assert_close(loss, expected_loss)
    assert deviation(gradients, expected) <= 1e-4


def test_a_step_keeps_less_than_with_the_references(step, monkeypatch):
    def peak():
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held

    fused = peak()
    monkeypatch.setattr(triton_device, "choose", lambda *_: ("reference", "for this test"))
    assert fused < 0.7 * peak()
