"""AdamWUpdate: the kernel under the interpreter beside the reference and torch's fused AdamW, refusals."""

import pytest
import torch

from hmar.optimizer import LossScale, Optimizer
from hmar.recipe import OptimizerConfig
from hmar_kernels.adamw import AdamWUpdate, api, reference, unavailable
from operator_cases import Draw

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_adamw_gpu.py runs the kernel")
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
SHAPES = [(3, 50), (1,), (2, api.triton.CHUNK + 5), (), (0, 4), (7,)]
DECAYS = [0.05, 0.0, 0.05, 0.0, 0.1, 0.0]


class Weights:
    def __init__(self, offset=0):
        """offset: values by which every tensor is away from where memory was allocated."""
        draw = Draw("cpu")
        self.draw = lambda: [self.shifted(draw(1, *shape)[0], offset) for shape in SHAPES]
        self.weights = self.draw()
        self.m, self.v = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.steps = [torch.zeros(()) for _ in self.weights]
        self.update = AdamWUpdate(self.weights, self.m, self.v, self.steps, DECAYS)

    @staticmethod
    def shifted(x, offset):
        return torch.cat([torch.zeros(offset), x.flatten()])[offset:].view(x.shape)

    def step(self, gradients, grad_scale=1.0, skip=0.0):
        self.update(gradients, **OPTIONS, grad_scale=torch.tensor(grad_scale), skip=torch.tensor(skip))


@interpreted
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_steps_beside_the_reference_in_float64(offset):
    ours = Weights(offset)
    expected = [[w.double(), m.double(), v.double()] for w, m, v in zip(ours.weights, ours.m, ours.v, strict=True)]
    for step, grad_scale in enumerate((1.0, 3.0, 0.5), start=1):
        gradients = ours.draw()
        before = [g.clone() for g in gradients]
        ours.step(gradients, grad_scale)
        assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
        for state, g, decay in zip(expected, gradients, DECAYS, strict=True):
            w, m, v = state
            state[:] = reference.adamw(w, g.double(), m, v, step, decay=decay, grad_scale=grad_scale, **OPTIONS)
    for found, state in zip(zip(ours.weights, ours.m, ours.v, strict=True), expected, strict=True):
        torch.testing.assert_close([x.double() for x in found], state, atol=1e-6, rtol=2e-6)
    assert [float(s) for s in ours.steps] == [3.0] * len(SHAPES)


def test_reference_is_what_torch_does():
    w = torch.nn.Parameter(Draw("cpu")(5, 7))
    state = w.detach().clone(), torch.zeros(5, 7), torch.zeros(5, 7)
    torch_adamw = torch.optim.AdamW([w], weight_decay=0.1, **OPTIONS)
    for step in (1, 2, 3):
        w.grad = Draw("cpu", seed=step)(5, 7)
        state = reference.adamw(state[0], w.grad, *state[1:], step, decay=0.1, **OPTIONS)
        torch_adamw.step()
    torch.testing.assert_close(w.detach(), state[0])


@interpreted
def test_a_skipped_step_changes_nothing():
    ours = Weights()
    ours.step(ours.draw())
    state = [t.clone() for t in (*ours.weights, *ours.m, *ours.v, *ours.steps)]
    ours.step([torch.full(s, torch.nan) for s in SHAPES], skip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(state, (*ours.weights, *ours.m, *ours.v, *ours.steps), strict=True))
    ours.step(ours.draw())
    assert not torch.equal(state[0], ours.weights[0]) and float(ours.steps[0]) == 2


@interpreted
def test_the_optimizer_with_the_kernel_beside_torchs_fused_adamw():
    """Steps that clip and steps that do not, one that is skipped, one in which a parameter has no gradient."""
    optimizers = []
    for kernel in (False, True):
        draw = Draw("cpu")
        parameters = [torch.nn.Parameter(draw(*shape)) for shape in ((40, 30), (30,), (9,))]
        groups = [
            {"params": parameters[:1], "weight_decay": 0.05},
            {"params": parameters[1:], "weight_decay": 0.0},
        ]
        optimizer = Optimizer(groups, OptimizerConfig(clip=2.0), LossScale(False, torch.device("cpu")))
        assert optimizer.update is None
        optimizer.update = optimizer.kernel() if kernel else None
        for step, size in enumerate((100.0, 1e-3, torch.nan, 1.0, 1.0)):
            for parameter in optimizer.parameters[: 2 if step == 3 else 3]:
                parameter.grad = size * draw(*parameter.shape)
            optimizer.step(torch.tensor(1.0), 1e-2 / (1 + step))
        optimizers.append(optimizer)
    plain, ours = ([p.detach() for p in optimizer.parameters] for optimizer in optimizers)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=2e-6)
    plain, ours = (optimizer.adamw.state_dict()["state"] for optimizer in optimizers)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=2e-6)
    assert [float(ours[i]["step"]) for i in range(3)] == [4, 4, 3]


@interpreted
def test_what_the_kernel_cannot_take_is_refused_with_a_reason():
    x = torch.zeros(4, 6)
    assert unavailable([x]) is None
    assert unavailable([]) == "there is nothing to update"
    with pytest.raises(ValueError, match=r"not torch.float64.*torch\.optim\.AdamW takes others"):
        AdamWUpdate([x.double()], [x], [x], [torch.zeros(())], [0.0])
    with pytest.raises(ValueError, match=r"strides \(1, 4\)"):
        AdamWUpdate([x.view(6, 4).T], [x], [x], [torch.zeros(())], [0.0])
    with pytest.raises(ValueError, match="same shapes"):
        AdamWUpdate([x], [x], [x[:2]], [torch.zeros(())], [0.0])
    with pytest.raises(ValueError, match="1 weights need as many steps and decays, got 1, 2"):
        AdamWUpdate([x], [x], [x], [torch.zeros(())], [0.0, 0.1])
    with pytest.raises(ValueError, match="same shapes"):
        Weights().step([x])
