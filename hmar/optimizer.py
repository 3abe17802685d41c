"""The end of a step: loss scale, clipping, AdamW and averaged weights, without waiting for the device.

Whether loss and gradient are finite is a number on the device. Fused AdamW takes it (`found_inf`) and leaves weights,
moments and step counts as they were; the loss scale and the averaged weights obey the same number. The host learns of
it whenever it reads the figures. The factor of clipping is handed to AdamW as well (`grad_scale`), so that gradients
are read twice, for their norm and for the update. torch's AdamW writes the scaled ones, which nobody reads; the kernel
of hmar_kernels.adamw, which takes its place on a GPU, does not.

Read next: train.py, which calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hmar.recipe import OptimizerConfig
from hmar_kernels.adamw import AdamWUpdate, unavailable


class LossScale:
    """Dynamic scale of an fp16 run's loss (Micikevicius et al., arXiv 1710.03740, section 3.2): halved by a step whose
    gradient is not finite, doubled after GROWTH_INTERVAL others. Float32 scalar `value`; 1 for good if not enabled."""

    START, GROWTH_INTERVAL = 2.0**16, 2000

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.value = torch.tensor(self.START if enabled else 1.0, device=device)
        self.steps_since_change = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        if self.enabled:
            torch._amp_update_scale_(self.value, self.steps_since_change, found_inf, 2.0, 0.5, self.GROWTH_INTERVAL)

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "steps_since_change": self.steps_since_change}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.enabled:
            self.value.copy_(state["value"])
            self.steps_since_change.copy_(state["steps_since_change"])


class AveragedWeights:
    """Exponential moving average of trained weights: a = decay a + (1 - decay) w after every step but skipped ones.

    The first step's weights are the first average. Frozen parameters have none: they are their own average.
    """

    def __init__(self, module: nn.Module, decay: float):
        """The averages are sharded as the module's parameters are."""
        self.decay = decay
        self.weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: weight.clone() for name, weight in self.weights.items()}
        self.num_averaged = torch.zeros((), device=next(iter(self.weights.values())).device)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages out of a checkpoint's `ema`, which has them in the names of torch's AveragedModel."""
        for name, average in self.averages.items():
            assign(average, state[f"module.{name}"])
        self.num_averaged.copy_(state["n_averaged"])

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        weight = torch.where(self.num_averaged == 0, 1.0, 1 - self.decay) * (1 - found_inf)
        averages = [local(average) for average in self.averages.values()]
        torch._foreach_lerp_(averages, [local(w) for w in self.weights.values()], [weight] * len(averages))
        self.num_averaged += 1 - found_inf


class Optimizer:
    """AdamW over parameter groups, with what belongs to its step.

    Args:
        groups: torch's parameter groups (stages.parameter_groups); the same order in every process and resumed run.
        config: learning rates and clipping.
        loss_scale: see LossScale.
        total_norm: norm over all processes of the norm of this process's gradients, for sharded ones.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        loss_scale: LossScale,
        total_norm: Callable[[Tensor], Tensor] = lambda norm: norm,
    ):
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.lr, self.clip = config.lr, config.clip or math.inf
        self.betas, self.eps = config.betas, config.eps
        self.loss_scale, self.total_norm = loss_scale, total_norm
        self.parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        for parameter in self.parameters:
            self.adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        weights = [local(p.detach()) for p in self.parameters]
        on_gpu = all(weight.is_cuda for weight in weights)
        self.update = self.kernel() if on_gpu and unavailable(weights) is None else None

    def kernel(self) -> AdamWUpdate:
        """hmar_kernels.adamw over the parameters and the state of `adamw`, which stay where they are."""
        weights = [local(p.detach()) for p in self.parameters]
        exp_avgs, exp_avg_sqs = (
            [local(self.adamw.state[p][name]) for p in self.parameters] for name in ("exp_avg", "exp_avg_sq")
        )
        steps = [self.adamw.state[p]["step"] for p in self.parameters]
        decays = [group["weight_decay"] for group in self.adamw.param_groups for _ in group["params"]]
        return AdamWUpdate(weights, exp_avgs, exp_avg_sqs, steps, decays)

    @torch.no_grad()
    def step(self, loss: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Update the weights from their gradients, which are let go, unless loss or gradient is not finite.

        loss: scalar, unscaled. Returns the norm of the gradient before clipping and 1.0 where the step was skipped, 0.0
        elsewhere: scalars on the device.
        """
        scale = self.loss_scale.value
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        norm = self.total_norm(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) / scale
        found_inf = 1 - (loss.isfinite() & norm.isfinite()).float()
        grad_scale = scale * ((norm + 1e-6) / self.clip).clamp_min(1)
        self.lr = lr
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self.update is None or len(gradients) < len(self.parameters) or unavailable(gradients) is not None:
            self.adamw.found_inf, self.adamw.grad_scale = found_inf, grad_scale
            self.adamw.step()
        else:
            self.update(gradients, lr=lr, betas=self.betas, eps=self.eps, grad_scale=grad_scale, skip=found_inf)
        self.adamw.zero_grad(set_to_none=True)
        self.loss_scale.update(found_inf)
        return norm, found_inf

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moments and step counts out of `adamw.state_dict()`; learning rate, decay and betas stay the configured."""
        if len(state["state"]) != len(self.parameters):
            raise ValueError(
                f"the checkpoint's optimizer has {len(state['state'])} parameters, here are {len(self.parameters)}"
            )
        for parameter, saved in zip(self.parameters, state["state"].values(), strict=True):
            for name, tensor in self.adamw.state[parameter].items():
                assign(tensor, saved[name])


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all processes have to call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or the part of it that lies here if the target is sharded."""
    if target.shape != value.shape:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} does not fit one of shape {tuple(target.shape)}")
    if isinstance(target, DTensor):
        # NOTE: src_data_rank=None: each process cuts its part out of its own copy, and none is sent.
        value = value.to(target.to_local().device)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all values of all tensors are finite: a bool scalar on their device."""
    parts = [part for part in (local(tensor.detach()) for tensor in tensors) if part.numel()]
    return torch.stack(torch._foreach_norm(parts, math.inf)).isfinite().all()
