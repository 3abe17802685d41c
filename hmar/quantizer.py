"""Multi-scale residual quantisation: a latent becomes one code map per scale, and code maps become a latent again.

    r = f, f_hat = 0;  for k = 1..K:  z_k = nearest code of area_resize(r, n_k)
                                      h_k = phi_k(bicubic_resize(codebook[z_k], n_K))
                                      f_hat += h_k,  r -= h_k
    phi(h) = 0.5 h + 0.5 conv3x3(h)

(VAR, arXiv 2404.02905, algorithms 1 and 2.) What the transformers read is derived from f_hat here too, so that
training and generation cannot disagree. Read `hmar.tokenizer` for the networks around it.

Shapes: B images, L tokens of the pyramid, n tokens of one scale, E code dimensions, V codes, h w latent sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hmar.config import TokenizerConfig
from hmar.pyramid import Pyramid


def phi_of_scale(num_scales: int, num_phis: int) -> tuple[int, ...]:
    """Which of the shared phis each scale uses: the one whose tick lies nearest to k / (K - 1), k from 0.

    Ticks are linspace(1/(3n), 1 - 1/(3n), n) for the published n = 4 and linspace(1/(2n), 1 - 1/(2n), n) otherwise.
    Several scales lie exactly between two ticks, so the float64 arithmetic is part of the format.
    """
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    positions = [k / (num_scales - 1) if num_scales > 1 else 0.0 for k in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - position))) for position in positions)


class MultiScaleQuantizer(nn.Module):
    """Codebook and phis of one tokenizer over one pyramid. Always computes in the codebook's dtype."""

    def __init__(self, config: TokenizerConfig, pyramid: Pyramid):
        super().__init__()
        self.config = config
        self.pyramid = pyramid
        self.codebook = nn.Embedding(config.vocab_size, config.code_dim)
        nn.init.uniform_(self.codebook.weight, -1 / config.vocab_size, 1 / config.vocab_size)
        self.phis = nn.ModuleList(
            nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1) for _ in range(config.num_phis)
        )
        self.phi_of_scale = phi_of_scale(pyramid.num_scales, config.num_phis)
        # Steps since each code was last chosen. The start value lets the first restart fill the codebook from data.
        self.register_buffer("idle_steps_V", torch.full((config.vocab_size,), config.restart_after))

    def encode(self, latent_BEhw: Tensor) -> Tensor:
        """Codes [B, L] (int64) of a latent [B, E, n_K, n_K]; no gradient."""
        self._check_latent(latent_BEhw)
        with torch.no_grad(), self._full_precision():
            return torch.cat([codes_Bn for codes_Bn, _, _ in self._quantize(latent_BEhw)], dim=1)

    def forward(self, latent_BEhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise with gradients (VAR, equation 5).

        Returns f_hat [B, E, h, w], whose value is the quantised latent and whose gradient passes straight to the
        latent; the loss, mean over scales of mse(f_hat_k, sg(f)) + commitment mse(sg(f_hat_k), f); codes [B, L].
        """
        self._check_latent(latent_BEhw)
        with self._full_precision():
            f_BEhw = latent_BEhw.to(self.codebook.weight.dtype)
            f_hat_BEhw = torch.zeros_like(f_BEhw)
            loss = f_BEhw.new_zeros(())
            all_codes = []
            for codes_Bn, contribution_BEhw, _ in self._quantize(f_BEhw):
                f_hat_BEhw = f_hat_BEhw + contribution_BEhw
                loss = loss + F.mse_loss(f_hat_BEhw, f_BEhw.detach())
                loss = loss + self.config.commitment * F.mse_loss(f_hat_BEhw.detach(), f_BEhw)
                all_codes.append(codes_Bn)
            straight_through_BEhw = f_BEhw + (f_hat_BEhw - f_BEhw).detach()
            return straight_through_BEhw, loss / self.pyramid.num_scales, torch.cat(all_codes, dim=1)

    def f_hats(self, codes_BL: Tensor) -> list[Tensor]:
        """f_hat [B, E, n_K, n_K] after each scale."""
        self._check_codes(codes_BL)
        f_hats, f_hat_BEhw = [], self.empty_f_hat(codes_BL.shape[0])
        for k in range(self.pyramid.num_scales):
            f_hat_BEhw = self.accumulate(f_hat_BEhw, codes_BL[:, self.pyramid.slice(k)], k)
            f_hats.append(f_hat_BEhw)
        return f_hats

    def empty_f_hat(self, batch: int) -> Tensor:
        """f_hat [B, E, n_K, n_K] before the first scale: zeros."""
        side = self.pyramid.side
        return self.codebook.weight.new_zeros(batch, self.config.code_dim, side, side)

    def accumulate(self, f_hat_BEhw: Tensor, codes_Bn: Tensor, k: int) -> Tensor:
        """f_hat with the codes [B, n_k^2] of scale k (from 0) added."""
        return f_hat_BEhw + self.contribution(codes_Bn, k)

    def contribution(self, codes_Bn: Tensor, k: int) -> Tensor:
        """What the codes [B, n_k^2] of scale k add to f_hat: phi_k of the upsampled code map, [B, E, n_K, n_K]."""
        side = self.pyramid.sides[k]
        with self._full_precision():
            h_BEhw = self.codebook(codes_Bn).transpose(1, 2).unflatten(2, (side, side))
            if k < self.pyramid.num_scales - 1:
                h_BEhw = F.interpolate(h_BEhw, size=(self.pyramid.side, self.pyramid.side), mode="bicubic")
            phi = self.phis[self.phi_of_scale[k]]
            return (1 - self.config.phi_ratio) * h_BEhw + self.config.phi_ratio * phi(h_BEhw)

    def resize_input(self, f_hat_BEhw: Tensor, k: int) -> Tensor:
        """A map of the latent's side as a transformer reads it at scale k: area-resized, [B, n_k^2, E]."""
        side = self.pyramid.sides[k]
        return F.interpolate(f_hat_BEhw, size=(side, side), mode="area").flatten(2).transpose(1, 2)

    def next_scale_inputs(self, codes_BL: Tensor) -> Tensor:
        """Teacher forcing: for every scale but the first, f_hat of the scales before it. [B, L - n_1^2, E]."""
        f_hats = self.f_hats(codes_BL)
        return self._sequence(
            codes_BL, (self.resize_input(f_hats[k - 1], k) for k in range(1, self.pyramid.num_scales))
        )

    def own_residual(self, codes_Bn: Tensor, k: int) -> Tensor:
        """Scale k's own contribution at its own side, which masked prediction shows for known tokens. [B, n_k^2, E]."""
        return self.resize_input(self.contribution(codes_Bn, k), k)

    def own_residuals(self, codes_BL: Tensor) -> Tensor:
        """`own_residual` of every scale but the first. [B, L - n_1^2, E]."""
        self._check_codes(codes_BL)
        scales = range(1, self.pyramid.num_scales)
        return self._sequence(codes_BL, (self.own_residual(codes_BL[:, self.pyramid.slice(k)], k) for k in scales))

    def usage(self, codes_BL: Tensor) -> Tensor:
        """Share of the codebook that a batch of codes makes use of: a scalar in (0, 1]."""
        return self._used(codes_BL).float().mean()

    @torch.no_grad()
    def restart_unused_codes(self, latent_BEhw: Tensor, codes_BL: Tensor, generator: torch.Generator) -> Tensor:
        """Count how long each code went unused, and move those past `config.restart_after` onto current residuals.

        Call it once a training step with that step's latent [B, E, n_K, n_K] and codes [B, L]. A code that nothing
        chooses gets no gradient from the codebook loss and would stay dead for good; here it is placed on a residual
        vector drawn uniformly from all scales of the batch, where the next batch can find it. The result depends on
        the arguments and the buffer alone, so a resumed run repeats it. With several processes the arguments must be
        the same in all of them (gather the latents, or do it in one and broadcast the codebook).

        Returns a bool mask [V] of the codes that were moved, for resetting their optimizer state; all False when
        `restart_after` is 0.
        """
        self._check_latent(latent_BEhw)
        if self.config.restart_after == 0:
            return torch.zeros_like(self.idle_steps_V, dtype=torch.bool)
        idle_V = torch.where(self._used(codes_BL), 0, self.idle_steps_V + 1)
        moved_V = idle_V > self.config.restart_after
        with self._full_precision():
            pool_NE = torch.cat([residual_NE for _, _, residual_NE in self._quantize(latent_BEhw)])
        picks_V = torch.randint(
            pool_NE.shape[0], (self.config.vocab_size,), generator=generator, device=generator.device
        ).to(pool_NE.device)
        self.codebook.weight.copy_(torch.where(moved_V[:, None], pool_NE[picks_V], self.codebook.weight))
        self.idle_steps_V.copy_(idle_V.masked_fill(moved_V, 0))
        return moved_V

    def _quantize(self, latent_BEhw: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per scale: codes [B, n_k^2], contribution [B, E, h, w] and the residual vectors matched [B n_k^2, E]."""
        residual_BEhw = latent_BEhw.detach().to(self.codebook.weight.dtype)
        for k, side in enumerate(self.pyramid.sides):
            r_BEhw = residual_BEhw
            if k < self.pyramid.num_scales - 1:
                r_BEhw = F.interpolate(r_BEhw, size=(side, side), mode="area")
            r_NE = r_BEhw.permute(0, 2, 3, 1).reshape(-1, self.config.code_dim)
            codes_Bn = self._nearest(r_NE).view(latent_BEhw.shape[0], side * side)
            contribution_BEhw = self.contribution(codes_Bn, k)
            residual_BEhw = residual_BEhw - contribution_BEhw.detach()
            yield codes_Bn, contribution_BEhw, r_NE

    def _nearest(self, r_NE: Tensor) -> Tensor:
        codebook_VE = self.codebook.weight.detach()
        distance_NV = r_NE.square().sum(1, keepdim=True) + codebook_VE.square().sum(1)
        return torch.addmm(distance_NV, r_NE, codebook_VE.T, alpha=-2).argmin(1)

    def _used(self, codes_BL: Tensor) -> Tensor:
        used_V = torch.zeros_like(self.idle_steps_V, dtype=torch.bool)
        return used_V.scatter(0, codes_BL.flatten(), True)

    def _sequence(self, codes_BL: Tensor, maps) -> Tensor:
        """Maps [B, n_k^2, E] one after another; none for a pyramid of one scale."""
        empty = self.codebook.weight.new_empty(codes_BL.shape[0], 0, self.config.code_dim)
        return torch.cat([empty, *maps], dim=1)

    def _full_precision(self):
        # NOTE: codes are an argmin over near ties. Under a trainer's autocast they would differ between the tokenizer's
        # training and everything that later reads its codes.
        return torch.autocast(self.codebook.weight.device.type, enabled=False)

    def _check_latent(self, latent_BEhw: Tensor) -> None:
        expected = (self.config.code_dim, self.pyramid.side, self.pyramid.side)
        if latent_BEhw.ndim != 4 or tuple(latent_BEhw.shape[1:]) != expected:
            raise ValueError(
                f"Latent has shape {tuple(latent_BEhw.shape)}, expected (batch, {', '.join(map(str, expected))}) for "
                f"the pyramid {self.pyramid.sides}."
            )

    def _check_codes(self, codes_BL: Tensor) -> None:
        if codes_BL.ndim != 2 or codes_BL.shape[1] != self.pyramid.length or codes_BL.is_floating_point():
            raise ValueError(
                f"Codes have shape {tuple(codes_BL.shape)} and dtype {codes_BL.dtype}, expected integers "
                f"(batch, {self.pyramid.length}) for the pyramid {self.pyramid.sides}."
            )
