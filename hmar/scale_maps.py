"""The quantizer's maps as the engine computes them: a gather and products of matrices (`hmar_kernels.code_maps`).

    contribution   phi_k(bicubic_resize(codebook[z], n_K))                  to f_hat
    own_residual   area_resize(contribution, n_k)                           to masked passes
    inputs         area_resize(f_hat, n_k)                                  to the next scale

All of `hmar.quantizer`'s maps are linear, and resizing treats rows and columns alike. With A_k the matrix [n_K, n_k] of
bicubic resizing, S_d that which shifts rows by d - 1, P_k [n_k, n_K] that of area resizing, W_dd' the taps of
(1 - r) h + r conv3x3(h), and T_dd' = codebook W_dd' (a row for each code, made beforehand, the bias in the middle tap,
for rows of A_k add up to 1):

    contribution = sum_dd' (S_d A_k) T_dd'[z] (S_d' A_k)^T;     own_residual: the same with P_k S_d A_k

So nothing is convolved or interpolated (torch's bicubic kernel goes through images and channels one after another).
What a scale contributes is added and the next scale's inputs are made together. Read `hmar.engine` for who calls it.

Shapes: B images, n = n_k^2 tokens of scale k, E code dimensions, V codes, h w latent sides, m rows of a result; d of
three taps.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hmar.quantizer import MultiScaleQuantizer
from hmar_kernels import accumulate_codes_, map_codes


class ScaleMaps(nn.Module):
    """Maps of one quantizer, in its codebook's dtype.

    What follows from codebook and phis is kept; call `derive` after they have changed. No gradients.
    """

    def __init__(self, quantizer: MultiScaleQuantizer):
        super().__init__()
        self.pyramid, self.config = quantizer.pyramid, quantizer.config
        self.phi_of_scale = quantizer.phi_of_scale
        # NOTE: not a submodule, for its weights are not this module's to move.
        self._quantizer = (quantizer,)
        weight = quantizer.codebook.weight
        sides, side = self.pyramid.sides, self.pyramid.side
        self.grow, self.own, self.downsample = [], [], []
        for n in sides:
            up, down = resizing(n, side, "bicubic"), resizing(side, n, "area")
            padded = F.pad(up, (0, 0, 1, 1))
            shifted = torch.stack([padded[d : d + side] for d in range(3)], dim=1)  # [n_K, d, n_k]
            self.grow.append(both_orders(shifted, weight))
            self.own.append(both_orders(torch.einsum("mi,idn->mdn", down, shifted), weight))
            self.downsample.append(down.to(weight))
        self.tables = [torch.empty_like(table) for table in self._tables()]
        self.derive()

    def derive(self) -> None:
        """Make the tables again, in place, from codebook and phis."""
        for table, new in zip(self.tables, self._tables(), strict=True):
            table.copy_(new)

    def _tables(self) -> list[Tensor]:
        """By phi: T of every code, [3, V, 3 E], of every d rows of codes, columns (d', e)."""
        (quantizer,), ratio = self._quantizer, self.config.phi_ratio
        codebook_VE = quantizer.codebook.weight.detach().double()
        tables = []
        for phi in quantizer.phis:
            taps = ratio * torch.einsum("vc,ecdx->dvxe", codebook_VE, phi.weight.detach().double())
            taps[1, :, 1] += (1 - ratio) * codebook_VE + ratio * phi.bias.detach().double()
            tables.append(taps.flatten(2).to(quantizer.codebook.weight))
        return tables

    def empty_f_hat(self, batch: int) -> Tensor:
        """f_hat [B, E, h, w] before the first scale: zeros, with channels side by side in memory."""
        side = self.pyramid.side
        return self.tables[0].new_zeros(batch, side, side, self.config.code_dim).permute(0, 3, 1, 2)

    def first_inputs(self, f_hat_BEhw: Tensor) -> Tensor:
        """What the first scale reads: nothing, [B, 0, E]."""
        batch, dims = f_hat_BEhw.shape[:2]
        return f_hat_BEhw.new_empty(batch, 0, dims)

    def accumulate_(self, f_hat_BEhw: Tensor, codes_Bn: Tensor, k: int, *, overlap: bool = False) -> Tensor | None:
        """Add what the codes of a scale contribute to f_hat, and make what the next one reads.

        Args:
            f_hat_BEhw: laid out as `empty_f_hat`; changed in place.
            codes_Bn: int64 [B, n] of scale k, from 0.
            overlap: as in `hmar_kernels.map_codes`; without effect where the plain implementation runs.
        Returns:
            [B, n, E] of the next scale, `MultiScaleQuantizer.resize_input`; None after the last one. Where the next
            scale has f_hat's size it is a view of f_hat, which the next call changes.
        """
        f_hat_BhwE = f_hat_BEhw.permute(0, 2, 3, 1)
        is_last = k + 1 == self.pyramid.num_scales
        at_full_size = not is_last and self.pyramid.sides[k + 1] == self.pyramid.side
        downsample = None if is_last or at_full_size else self.downsample[k + 1]
        table = self.tables[self.phi_of_scale[k]]
        inputs_BhwE = accumulate_codes_(f_hat_BhwE, codes_Bn, table, *self.grow[k], downsample, overlap=overlap)
        if is_last:
            return None
        return f_hat_BhwE.flatten(1, 2) if at_full_size else inputs_BhwE.flatten(1, 2)

    def own_residual(self, codes_Bn: Tensor, k: int, *, overlap: bool = False) -> Tensor:
        """`MultiScaleQuantizer.own_residual`: [B, n, E]. overlap: as in `accumulate_`."""
        table = self.tables[self.phi_of_scale[k]]
        return map_codes(codes_Bn, table, *self.own[k], overlap=overlap).flatten(1, 2)


def resizing(source: int, target: int, mode: str) -> Tensor:
    """The matrix [target, source] by which `F.interpolate` resizes one side of a map, in float64."""
    identity = torch.eye(source, dtype=torch.float64)
    return F.interpolate(identity[None, None], size=(target, source), mode=mode)[0, 0]


def both_orders(matrix_mdn: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix for rows, whose taps lie (d, position) in memory, and for columns, where they lie (position, d)."""
    row_matrix, column_matrix = matrix_mdn.flatten(1), matrix_mdn.transpose(1, 2).flatten(1)
    return row_matrix.to(like), column_matrix.contiguous().to(like)
