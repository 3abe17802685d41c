"""Sizes of the tokenizer and the transformers, and the table of presets.

Plain frozen dataclasses of numbers, so that they go through YAML and JSON unchanged; None means "derive it", and is
replaced by the derived value on construction. Read `hmar.tokenizer` and `hmar.model` next.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmar.pyramid import SIDES_BY_RESOLUTION, Pyramid


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """ValueError that names a field, its value and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {got}, expected {expected}")


@dataclass(frozen=True)
class TokenizerConfig:
    """The convolutional VQGAN and its multi-scale residual codebook (VAR, section 3.2; spec of VQGAN f16).

    `restart_after`: a code that no token has chosen for so many training steps is put back among the current
    residuals (see `MultiScaleQuantizer.restart_unused_codes`). 0 turns that off, as in the published training, which
    sees enough data to do without; small data sets lose most of their codebook otherwise.
    """

    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    code_dim: int = 32
    vocab_size: int = 4096
    image_channels: int = 3
    dropout: float = 0.0
    norm_groups: int = 32
    num_phis: int = 4
    phi_ratio: float = 0.5
    commitment: float = 0.25
    restart_after: int = 0

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        for name in ("channels", "num_res_blocks", "code_dim", "vocab_size", "image_channels", "num_phis"):
            value = getattr(self, name)
            require(value >= 1, f"TokenizerConfig.{name}", value, "at least 1")
        require(
            len(self.multipliers) > 0 and all(m >= 1 for m in self.multipliers),
            "TokenizerConfig.multipliers",
            self.multipliers,
            "one positive factor a level, as (1, 2, 2)",
        )
        require(
            self.norm_groups >= 1 and all(width % self.norm_groups == 0 for width in self.level_channels),
            "TokenizerConfig.norm_groups",
            self.norm_groups,
            f"a divisor of the channels of every level, {self.level_channels}",
        )
        require(0 <= self.dropout < 1, "TokenizerConfig.dropout", self.dropout, "in [0, 1)")
        require(self.restart_after >= 0, "TokenizerConfig.restart_after", self.restart_after, "0 (off) or more")

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels a latent position spans: one halving between every two levels."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class ModelConfig:
    """A transformer over the pyramid's codes; VAR, HMAR stage 1 and HMAR stage 2 share it.

    Derived when None: width 64 depth; num_heads width / 64; drop_path 0.1 depth / 24; mask_depth 8, or half of a
    model of fewer than 16 blocks; gate_init (factor on the initial weights that produce a block's gates) 1e-3 up to
    20 blocks, 1e-4 up to 24, 1e-5 beyond.
    """

    depth: int
    width: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    vocab_size: int = 4096
    code_dim: int = 32
    sides: tuple[int, ...] = SIDES_BY_RESOLUTION[256]
    drop_path: float | None = None
    mask_depth: int | None = None
    class_drop: float = 0.1
    shared_modulation: bool = False
    gate_init: float | None = None

    def __post_init__(self):
        def derive(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        require(self.depth >= 1, "ModelConfig.depth", self.depth, "at least 1 block")
        object.__setattr__(self, "sides", self.pyramid.sides)
        derive("width", 64 * self.depth)
        derive("num_heads", max(1, self.width // 64))
        derive("drop_path", 0.1 * self.depth / 24)
        derive("mask_depth", 8 if self.depth >= 16 else max(1, self.depth // 2))
        derive("gate_init", 1e-3 if self.depth <= 20 else 1e-4 if self.depth <= 24 else 1e-5)
        heads = max(1, self.width // 64)
        require(
            self.num_heads >= 1 and self.width % self.num_heads == 0,
            "ModelConfig.num_heads",
            self.num_heads,
            f"a divisor of width {self.width}; {heads} with width {64 * heads} would do",
        )
        require(1 <= self.mask_depth <= self.depth, "ModelConfig.mask_depth", self.mask_depth, f"1 to {self.depth}")
        for name in ("num_classes", "vocab_size", "code_dim"):
            value = getattr(self, name)
            require(value >= 1, f"ModelConfig.{name}", value, "at least 1")
        for name in ("drop_path", "class_drop"):
            value = getattr(self, name)
            require(0 <= value < 1, f"ModelConfig.{name}", value, "in [0, 1)")

    @property
    def pyramid(self) -> Pyramid:
        return Pyramid(self.sides)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        """Width of the MLP's inner layer."""
        return round(self.width * self.mlp_ratio)

    @property
    def null_class(self) -> int:
        """Class index of "no class": the last row of the embedding table."""
        return self.num_classes


def _published() -> dict[str, tuple[TokenizerConfig, ModelConfig]]:
    presets = {}
    for pixels, sides in SIDES_BY_RESOLUTION.items():
        for depth in (16, 20, 24, 30):
            presets[f"d{depth}-{pixels}"] = (TokenizerConfig(), ModelConfig(depth=depth, sides=sides))
    presets["d36-512"] = (
        TokenizerConfig(),
        ModelConfig(depth=36, sides=SIDES_BY_RESOLUTION[512], shared_modulation=True),
    )
    return presets


# name -> (tokenizer, transformer). The small ones train on a CPU (tiny, digits-32) or one GPU (photos-256-small):
# their codebooks restart unused codes, and their gates start near their final size, for they get few steps.
PRESETS: dict[str, tuple[TokenizerConfig, ModelConfig]] = {
    **_published(),
    "photos-256-small": (
        TokenizerConfig(channels=64, vocab_size=1024, norm_groups=16, restart_after=50),
        ModelConfig(depth=8, width=512, vocab_size=1024, num_classes=16, gate_init=0.1),
    ),
    "digits-32": (
        TokenizerConfig(
            channels=16,
            multipliers=(1, 2, 4, 4),
            num_res_blocks=1,
            code_dim=16,
            vocab_size=128,
            norm_groups=4,
            restart_after=20,
        ),
        ModelConfig(
            depth=5,
            width=128,
            num_heads=4,
            sides=(1, 2, 3, 4),
            num_classes=10,
            vocab_size=128,
            code_dim=16,
            drop_path=0.0,
            mask_depth=2,
            gate_init=0.5,
        ),
    ),
    "tiny": (
        TokenizerConfig(
            channels=8,
            multipliers=(1, 2, 2),
            num_res_blocks=1,
            code_dim=8,
            vocab_size=32,
            norm_groups=4,
            restart_after=10,
        ),
        ModelConfig(
            depth=2,
            width=32,
            num_heads=2,
            sides=(1, 2, 4),
            num_classes=4,
            vocab_size=32,
            code_dim=8,
            drop_path=0.0,
            mask_depth=1,
            gate_init=0.5,
        ),
    ),
}
