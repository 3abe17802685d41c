"""AdamW over many tensors: what the kernel can take, its tables, the launch.

torch's fused AdamW, given a `grad_scale` to clip gradients by, writes the scaled gradients back: 4 of the 36 bytes that
it moves for a value with their norm. Here they are read only. The mathematics is in reference.py, the kernel in
triton.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..triton_device import on_device
from ..triton_device import unavailable as triton_unavailable
from . import triton

__all__ = ["AdamWUpdate", "unavailable"]

Tensors = Sequence[torch.Tensor]


def unavailable(tensors: Tensors) -> str | None:
    """Why AdamWUpdate cannot take these tensors; None when it can."""
    if not tensors:
        return "there is nothing to update"
    device = tensors[0].device
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != device:
            return (
                f"the kernel takes contiguous float32 tensors of one device, not {tensor.dtype} with strides "
                f"{tensor.stride()} on {tensor.device}"
            )
    return triton_unavailable(device, torch.float32)


class AdamWUpdate:
    """Steps of AdamW in place over tensors that stay where they are.

    Args:
        weights, exp_avgs, exp_avg_sqs: contiguous float32 tensors of the same sizes, in the same order.
        steps: float32 scalars on the device, the steps taken so far; counted on.
        decays: weight decay of each.
    Raises:
        ValueError: tensors that the kernel cannot take, see `unavailable`, or lists that do not go together.
    """

    def __init__(
        self, weights: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, decays: Sequence[float]
    ):
        self.tensors, self.steps = (list(weights), list(exp_avgs), list(exp_avg_sqs)), list(steps)
        self._check(*self.tensors)
        if not len(weights) == len(steps) == len(decays):
            raise ValueError(f"{len(weights)} weights need as many steps and decays, got {len(steps)}, {len(decays)}")
        device = weights[0].device
        sizes = torch.tensor([weight.numel() for weight in weights])
        counts = (sizes + triton.CHUNK - 1) // triton.CHUNK
        owners = torch.arange(len(sizes)).repeat_interleave(counts)
        begins = (torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]) * triton.CHUNK
        self.sizes, self.chunks = sizes.to(device), torch.stack([owners, begins]).to(device)
        self.decays = torch.tensor(decays, dtype=torch.float32, device=device)

    def __call__(
        self,
        gradients: Tensors,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        grad_scale: torch.Tensor,
        skip: torch.Tensor,
    ) -> None:
        """One step, without waiting for the device. The gradients stay as they are.

        gradients: contiguous float32, of the weights' sizes. lr, betas, eps: as in torch.optim.AdamW. grad_scale, skip:
        float32 scalars on the device; gradients are divided by the first, and nothing changes unless the second is 0.
        """
        self._check(self.tensors[0], gradients)
        device, num_tensors, num_chunks = self.sizes.device, len(self.sizes), self.chunks.shape[1]
        torch._foreach_add_(self.steps, [1 - skip] * num_tensors)
        counted = torch.stack(self.steps).double()
        corrections = torch.stack([1 - beta**counted for beta in betas]).float()
        pointers = [[tensor.data_ptr() for tensor in tensors] for tensors in (*self.tensors, gradients)]
        # NOTE: gradients lie elsewhere in each step. From pinned memory the copy does not wait for the device.
        addresses = torch.tensor(pointers, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        if num_chunks == 0:
            return
        with on_device(self.sizes):
            triton.adamw_kernel[(num_chunks,)](
                addresses_ptr=addresses,
                sizes_ptr=self.sizes,
                decays_ptr=self.decays,
                chunks_ptr=self.chunks,
                corrections_ptr=corrections,
                grad_scale_ptr=grad_scale,
                skip_ptr=skip,
                num_tensors=num_tensors,
                num_chunks=num_chunks,
                lr=lr,
                beta1=betas[0],
                beta2=betas[1],
                eps=eps,
                ALIGNED=all(pointer % 16 == 0 for row in pointers for pointer in row),
                CHUNK=triton.CHUNK,
                BLOCK=triton.BLOCK,
                num_warps=triton.WARPS,
            )

    @staticmethod
    def _check(*lists: Tensors) -> None:
        if any([tensor.shape for tensor in tensors] != [tensor.shape for tensor in lists[0]] for tensors in lists[1:]):
            raise ValueError("weights, gradients and averages must be of the same shapes, tensor by tensor")
        reason = unavailable([tensor for tensors in lists for tensor in tensors])
        if reason is not None:
            raise ValueError(f"{reason}; torch.optim.AdamW takes others")
