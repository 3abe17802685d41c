"""The stages of training: what each trains, on which inputs and with which loss.

The Trainer (train.py) calls a stage in this order: `prepare` once, then for every step `draw`, `loss` for each
micro-batch and, after the optimizer, `after_step` if it has one; at the end `write`. Its `config` is the run's with
what the stage has found out, its `sources` are fingerprints of the weights it builds on, its `module` is what is
trained, and `forward` what is called for it: `objective`, the module with its loss, or what the Trainer has wrapped
around that; `modules` are all that `loss` reads. Read next: loss.py for the losses, model.py and tokenizer.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hmar import checkpoint
from hmar.codes import CodesFolder, read_index
from hmar.discriminator import PatchDiscriminator
from hmar.loss import TokenizerLoss, draw_mask, masked_targets, next_scale_targets, share, token_weights
from hmar.model import HMAR, DropPath, MaskedTransformer, NextScaleTransformer
from hmar.optimizer import AveragedWeights, Optimizer
from hmar.recipe import STAGES, TrainConfig, differences, find_preset
from hmar.tokenizer import Tokenizer


@dataclass(frozen=True)
class Draws:
    """All that is random in a step of some images.

    It is drawn for the whole batch of the step and then divided, so that what an image gets depends neither on
    micro-batches nor on the number of processes.

    dropped_B: bool, whose class is replaced by the null class; None if the stage has no classes.
    drop_path_DB: float32 factors of the D drop paths, 0 or 1 / (1 - p).
    masked_L: bool, the codes that masked prediction hides; None elsewhere.
    generator: what is left of the step's random numbers, for `after_step`.
    """

    dropped_B: Tensor | None = None
    drop_path_DB: Tensor | None = None
    masked_L: Tensor | None = None
    generator: torch.Generator | None = None

    def of(self, images: slice, device: torch.device) -> Draws:
        """The part of these images, on the device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or device.type == "cpu":
                return tensor
            return tensor.contiguous().pin_memory().to(device, non_blocking=True)

        return Draws(
            None if self.dropped_B is None else move(self.dropped_B[images]),
            None if self.drop_path_DB is None else move(self.drop_path_DB[:, images]),
            move(self.masked_L),
            self.generator,
        )


class TokenizerStage:
    """Reconstruction, quantizer loss, optionally perceptual loss and adversary (VAR, eq. 5; VQGAN, section 3.1)."""

    def __init__(self, config: TrainConfig, device: torch.device, perceptual: nn.Module | None = None):
        self.config, self.device = config, device
        self.sources: dict[str, str] = {}
        self.module = self.objective = self.forward = Tokenizer(config.tokenizer, config.model.pyramid).to(device)
        weights = config.reconstruction
        self.modules = (self.module,)
        discriminator = None
        if weights.adversarial > 0:
            discriminator = PatchDiscriminator(config.tokenizer.image_channels).to(device)
            self.discriminator_optimizer = torch.optim.AdamW(
                parameter_groups(discriminator, config.optimizer.weight_decay),
                betas=config.optimizer.betas,
                eps=config.optimizer.eps,
            )
        self.criterion = TokenizerLoss(
            l1=weights.l1,
            l2=weights.l2,
            perceptual=None if perceptual is None else perceptual.to(device).eval(),
            perceptual_weight=weights.perceptual,
            discriminator=discriminator,
            adversarial_weight=weights.adversarial,
            adversarial_start=weights.adversarial_start,
        )

    def prepare(self, dataset: Dataset, console: Console) -> Dataset:
        return dataset

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        return Draws(generator=generator)

    def loss(self, batch, classes_B, draws, step) -> tuple[Tensor, dict[str, Tensor]]:
        self.images, self.output = batch, self.forward(batch)
        if self.criterion.discriminator is not None:
            self.criterion.discriminator.requires_grad_(False)
        last_weight = self.module.decoder.conv_out.weight
        loss, parts = self.criterion(self.output.reconstruction.float(), batch, step, last_weight)
        parts["quantizer"] = self.output.quantizer_loss
        parts["codebook_use"] = self.module.quantizer.usage(self.output.codes_BL)
        return loss + self.config.reconstruction.quantizer * self.output.quantizer_loss, parts

    def after_step(self, optimizer: Optimizer, averaged: AveragedWeights | None, draws, step) -> dict[str, float]:
        """Put unused codes back into use; train the adversary on the same images, and return what to log of that.

        Not called after a step that was skipped, for which the host has to wait for the device.
        """
        output, self.output = self.output, None
        quantizer = self.module.quantizer
        moved_V = quantizer.restart_unused_codes(output.latent_BEhw.detach(), output.codes_BL, draws.generator)
        # The optimizer's momentum of a moved code, and its average, belong to the place where it was.
        codebook = quantizer.codebook.weight
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.adamw.state[codebook][name].masked_fill_(moved_V[:, None], 0)
        if averaged is not None:
            average = averaged.averages["quantizer.codebook.weight"]
            average.copy_(torch.where(moved_V[:, None], codebook.detach(), average))
        if self.criterion.discriminator is None or step < self.criterion.adversarial_start:
            return {}
        return self._train_discriminator(output.reconstruction.detach().float(), optimizer.lr, step)

    def _train_discriminator(self, reconstruction: Tensor, lr: float, step: int) -> dict[str, float]:
        """A step of the adversary, unless its loss or gradient is not finite; clipped like the tokenizer's."""
        discriminator = self.criterion.discriminator.requires_grad_(True)
        loss = self.criterion.discriminator_loss(reconstruction, self.images, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(discriminator.parameters(), self.config.optimizer.clip or math.inf)
        values = torch.stack([loss.detach().float(), norm.float()]).tolist()
        if all(map(math.isfinite, values)):
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = lr
            self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        return dict(zip(("discriminator_loss", "discriminator_grad_norm"), values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"perceptual": self.criterion.perceptual is not None}
        if self.criterion.discriminator is not None:
            state["discriminator"] = self.criterion.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        had, has = state["perceptual"], self.criterion.perceptual is not None
        if had != has:
            raise ValueError(
                f"the run began {'with' if had else 'without'} a perceptual module and cannot go on "
                f"{'with' if has else 'without'} one: call hmar.train.train(config, resume=True"
                f"{', perceptual=...) with the same module' if had else ')'}"
            )
        if self.criterion.discriminator is not None:
            self.criterion.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def write(self, folder: Path, state: Mapping[str, Tensor], **notes: Any) -> Path:
        with torch.device("meta"):
            module = Tokenizer(self.config.tokenizer, self.config.model.pyramid)
        module.load_state_dict(state, assign=True)
        return checkpoint.save_pretrained(folder, module, **notes)


class CodesStage:
    """What next-scale prediction, masked prediction and VAR share: codes of a frozen tokenizer, dropped labels."""

    module: nn.Module
    objective: nn.Module
    after_step = None

    def __init__(self, config: TrainConfig, device: torch.device):
        self.device = device
        self.tokenizer = load_fitting_tokenizer(config, device)
        self.config = dataclasses.replace(config, tokenizer=self.tokenizer.config)
        self.sources = {"tokenizer_weights": checkpoint.fingerprint(config.tokenizer_weights)}
        if config.data.name == "codes":
            self.sources["data.path"] = read_index(config.data.path).fingerprint()
        self.class_drop = config.model.class_drop

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.objective, self.tokenizer

    def prepare(self, dataset: Dataset, console: Console) -> Dataset:
        """The data set to train on: with cache_codes, codes in place of images. ValueError for another tokenizer's."""
        if dataset.num_classes > self.config.model.num_classes:
            raise ValueError(
                f"the data has {dataset.num_classes} classes, but model.num_classes={self.config.model.num_classes}: "
                f"set model.num_classes={dataset.num_classes}"
            )
        if isinstance(dataset, CodesFolder):
            dataset.check_tokenizer(self.tokenizer)
            self.tokenizer.to("cpu").quantizer.to(self.device)  # nothing else of it is needed
        if not self.config.cache_codes:
            return dataset
        with console.status(f"encoding {len(dataset)} images"):
            return CachedCodes(dataset, self.encode, self.config.batch_size, self.device)

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        """The draws of a step: CPU tensors for all images of its batch, in an order that is part of the format of
        checkpoints."""
        dropped_B = torch.rand(batch_size, generator=generator) < self.class_drop
        masked_L = self.draw_mask(generator)
        p_D = torch.tensor([module.p for module in self.drop_paths])
        kept_DB = torch.rand(len(p_D), batch_size, generator=generator) >= p_D[:, None]
        return Draws(dropped_B, kept_DB / (1 - p_D[:, None]), masked_L, generator)

    def draw_mask(self, generator: torch.Generator) -> Tensor | None:
        return None

    def apply_drop_paths(self, drop_path_DB: Tensor) -> None:
        for module, factor_B in zip(self.drop_paths, drop_path_DB, strict=True):
            module.factor_B = factor_B

    @functools.cached_property
    def drop_paths(self) -> list[DropPath]:
        """Those that drop anything in training."""
        return [m for m in self.module.modules() if isinstance(m, DropPath) and m.p > 0 and m.training]

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Codes [B, L]. In the tokenizer's own precision: they must not depend on the model's."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(images_B3HW)

    def inputs(self, batch: Tensor, classes_B: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, L], classes [B] with some dropped, and teacher-forced inputs [B, L - n_1^2, E]."""
        codes_BL = batch if batch.ndim == 2 else self.encode(batch)
        classes_B = torch.where(draws.dropped_B, self.config.model.null_class, classes_B)
        self.apply_drop_paths(draws.drop_path_DB)
        with torch.no_grad():
            inputs_BLE = self.tokenizer.quantizer.next_scale_inputs(codes_BL)
        return codes_BL, classes_B, inputs_BLE

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state

    def write(self, folder: Path, state: Mapping[str, Tensor], **notes: Any) -> Path:
        """Weights of the trained module, whose whole state dict is `state`, with what they were made of."""
        with torch.device("meta"):
            module = self.make_module()
        module.load_state_dict(state, assign=True)
        return checkpoint.save_pretrained(folder, self.assemble(module), **self._provenance(), **notes)

    def make_module(self) -> nn.Module:
        raise NotImplementedError

    def assemble(self, module: nn.Module) -> nn.Module:
        """What is written in place of the trained module."""
        return module

    def _provenance(self) -> dict[str, str]:
        return {
            "tokenizer_weights": self.config.tokenizer_weights,
            "tokenizer_sha256": self.sources["tokenizer_weights"],
        }


class NextScaleStage(CodesStage):
    """HMAR's stage 1 (block-diagonal, weighted loss; HMAR, section 4.2) and VAR (block-causal, uniform loss)."""

    def __init__(self, config: TrainConfig, device: torch.device):
        super().__init__(config, device)
        self.module = self.make_module().to(device)
        weights_L = token_weights(config.model.pyramid) if config.stage == "next-scale" else None
        self.objective = self.forward = NextScaleObjective(self.module, weights_L).to(device)

    def make_module(self) -> NextScaleTransformer:
        pattern = "block_diagonal" if self.config.stage == "next-scale" else "block_causal"
        return NextScaleTransformer(self.config.model, pattern=pattern, attention=self.config.attention)

    def loss(self, batch, classes_B, draws, step) -> tuple[Tensor, dict[str, Tensor]]:
        codes_BL, classes_B, inputs_BLE = self.inputs(batch, classes_B, draws)
        loss, accuracy = self.forward(classes_B, inputs_BLE, codes_BL)
        return loss, {"accuracy": accuracy}


class MaskedStage(CodesStage):
    """HMAR's stage 2: mask blocks on the frozen trunk of stage 1 (HMAR, section 4.3)."""

    def __init__(self, config: TrainConfig, device: torch.device):
        super().__init__(config, device)
        self.sources["next_scale_weights"] = checkpoint.fingerprint(config.next_scale_weights)
        self.next_scale = load_stage_one(config)
        self.module = MaskedTransformer.from_next_scale(self.next_scale, attention=config.attention).to(device)
        self.objective = self.forward = MaskedObjective(self.module)

    def make_module(self) -> MaskedTransformer:
        return MaskedTransformer(self.config.model, attention=self.config.attention)

    def draw_mask(self, generator: torch.Generator) -> Tensor:
        return draw_mask(self.config.model.pyramid, generator=generator)

    def loss(self, batch, classes_B, draws, step) -> tuple[Tensor, dict[str, Tensor]]:
        codes_BL, classes_B, inputs_BLE = self.inputs(batch, classes_B, draws)
        with torch.no_grad():
            residuals_BLE = self.tokenizer.quantizer.own_residuals(codes_BL)
        loss, accuracy = self.forward(classes_B, inputs_BLE, residuals_BLE, draws.masked_L, codes_BL)
        return loss, {"accuracy": accuracy}

    def assemble(self, module: MaskedTransformer) -> HMAR:
        """The whole HMAR: trunk, next-scale blocks of stage 1 and the mask blocks trained here."""
        return HMAR.from_stages(self.next_scale, module)


class NextScaleObjective(nn.Module):
    """A NextScaleTransformer and its loss as one module, so that what is wrapped around a module takes in both.

    weights_L: float32 weights of the tokens, None for equal ones (see `next_scale_loss`).
    """

    def __init__(self, model: NextScaleTransformer, weights_L: Tensor | None):
        super().__init__()
        self.model = model
        self.register_buffer("weights_L", weights_L, persistent=False)

    def forward(self, class_B: Tensor, inputs_BLE: Tensor, codes_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and token accuracy: scalars. Arguments as of the model, and the codes to predict, int64 [B, L]."""
        loss, correct_BL = self.model(class_B, inputs_BLE, targets=next_scale_targets(codes_BL, self.weights_L))
        return loss, share(correct_BL)


class MaskedObjective(nn.Module):
    """A MaskedTransformer and its loss as one module."""

    def __init__(self, model: MaskedTransformer):
        super().__init__()
        self.model = model

    def forward(
        self, class_B: Tensor, inputs_BLE: Tensor, residuals_BLE: Tensor, masked_L: Tensor, codes_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy over the hidden tokens: scalars. Arguments as of the model, and the codes, int64 [B, L]."""
        targets = masked_targets(codes_BL, masked_L)
        loss, correct_BL = self.model(class_B, inputs_BLE, residuals_BLE, masked_L, targets=targets)
        return loss, share(correct_BL, masked_L)


def make_stage(
    config: TrainConfig, device: torch.device, perceptual: nn.Module | None = None
) -> TokenizerStage | CodesStage:
    assert config.stage in STAGES
    if config.stage == "tokenizer":
        return TokenizerStage(config, device, perceptual)
    return MaskedStage(config, device) if config.stage == "masked" else NextScaleStage(config, device)


class CachedCodes(Dataset):
    """Codes [L] and class of every image of a data set without random crops, in memory."""

    def __init__(self, dataset: Dataset, encode, batch_size: int, device: torch.device):
        codes, classes = [], []
        for images_B3HW, classes_B in DataLoader(dataset, batch_size):
            codes.append(encode(images_B3HW.to(device)).cpu())
            classes.append(classes_B)
        self.codes_NL, self.classes_N = torch.cat(codes), torch.cat(classes).tolist()

    def __len__(self) -> int:
        return len(self.codes_NL)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        _, index = item
        return self.codes_NL[index], self.classes_N[index]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: decayed ones and others.

    Decay is for the weights of linear layers and convolutions. Biases, norms, tables of positions, scales, classes and
    modulation, the codebook, the mask embedding and the learned scale of q go without.
    """
    decayed, others = [], []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_weight = name == "weight" and isinstance(owner, (nn.Linear, nn.Conv2d))
                (decayed if is_weight else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def load_fitting_tokenizer(config: TrainConfig, device: torch.device) -> Tokenizer:
    """The frozen tokenizer of config.tokenizer_weights; ValueError if the model cannot work with it."""
    tokenizer = checkpoint.load_tokenizer(config.tokenizer_weights, device)
    expected = {
        "sides": config.model.sides,
        "vocab_size": config.model.vocab_size,
        "code_dim": config.model.code_dim,
        "image size": config.data.size,
    }
    got = {
        "sides": tokenizer.pyramid.sides,
        "vocab_size": tokenizer.config.vocab_size,
        "code_dim": tokenizer.config.code_dim,
        "image size": tokenizer.image_size,
    }
    for name in expected:
        if got[name] != expected[name]:
            raise ValueError(
                f"the tokenizer in {config.tokenizer_weights} has {name} {got[name]}, the model of preset "
                f"{config.preset} expects {expected[name]}: use the preset and overrides that the tokenizer had"
            )
    if config.tokenizer not in (tokenizer.config, find_preset(config.preset)[0]):
        found = differences(dataclasses.asdict(tokenizer.config), dataclasses.asdict(config.tokenizer), "tokenizer.")
        raise ValueError(
            f"stage {config.stage} takes the tokenizer in {config.tokenizer_weights} as it is, but {found[0]}: "
            "leave the override out"
        )
    return tokenizer


def load_stage_one(config: TrainConfig) -> NextScaleTransformer:
    """Stage 1 of config.next_scale_weights, with the sizes of config.model (mask_depth may differ), on the CPU."""
    trained = checkpoint.load_pretrained(config.next_scale_weights, ("next-scale",))
    free = {name: getattr(config.model, name) for name in ("mask_depth", "class_drop", "drop_path", "gate_init")}
    if dataclasses.replace(trained.config, **free) != config.model:
        found = differences(
            {"model": dataclasses.asdict(trained.config)}, {"model": {**dataclasses.asdict(config.model), **free}}
        )
        raise ValueError(f"config.model does not fit the stage 1 in {config.next_scale_weights}: {'; '.join(found)}")
    stage_one = NextScaleTransformer(config.model, pattern="block_diagonal", attention=config.attention)
    stage_one.load_state_dict(trained.state_dict())
    return stage_one.eval()
