"""AdamWUpdate on a GPU: beside torch's fused AdamW, within the optimizer, bit-equal twice."""

import pytest
import torch

from hmar.optimizer import LossScale, Optimizer
from hmar.recipe import OptimizerConfig
from operator_cases import Draw

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 1024), (1024,), (16,), (3, 8191), (), (5,), (30_000_001,)]


def optimize(kernel, sizes=(100.0, 1e-3, torch.nan, 1.0)):
    """Weights, moments and steps after steps that clip, do not, are skipped."""
    draw = Draw("cuda")
    parameters = [torch.nn.Parameter(draw(1, *shape)[0]) for shape in SHAPES]
    groups = [{"params": parameters[:3], "weight_decay": 0.05}, {"params": parameters[3:], "weight_decay": 0.0}]
    optimizer = Optimizer(groups, OptimizerConfig(clip=2.0), LossScale(False, torch.device("cuda")))
    assert optimizer.update is not None
    if not kernel:
        optimizer.update = None
    for step, size in enumerate(sizes):
        for parameter in parameters:
            parameter.grad = size * draw(1, *parameter.shape)[0]
        optimizer.step(torch.tensor(1.0, device="cuda"), 1e-2 / (1 + step))
    return [*(p.detach() for p in parameters), *(x for state in optimizer.adamw.state.values() for x in state.values())]


def test_beside_torchs_fused_adamw():
    for ours, expected in zip(optimize(True), optimize(False), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_bit_equal_twice():
    assert all(torch.equal(a, b) for a, b in zip(optimize(True), optimize(True), strict=True))


def test_a_step_does_not_wait_for_the_device():
    draw = Draw("cuda")
    parameters = [torch.nn.Parameter(draw(64, 64)) for _ in range(3)]
    optimizer = Optimizer(
        [{"params": parameters, "weight_decay": 0.05}], OptimizerConfig(), LossScale(False, torch.device("cuda"))
    )
    loss = torch.tensor(1.0, device="cuda")
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(loss, 1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(loss, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
