"""What a training run is told: frozen dataclasses, read from YAML and from `section.key=value` overrides.

A TrainConfig names a preset (hmar.config) and overrides parts of it; every field has a type that is checked, an
unknown key is an error that lists the known ones, and the complete configuration goes back to YAML so that it can be
kept beside the checkpoints. `learning_rate` is the schedule as a pure function. Read next: train.py, which runs a
TrainConfig.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import cattrs
import yaml
from cattrs.errors import ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from hmar.config import PRESETS, ModelConfig, TokenizerConfig, require
from hmar_kernels import IMPLEMENTATIONS

STAGES = ("tokenizer", "next-scale", "masked", "var")
ATTENTION = ("auto", *IMPLEMENTATIONS)


@dataclass(frozen=True)
class DataConfig:
    """Which images. `size` None means the side that the tokenizer and the pyramid ask for (last side x stride).

    name      "folder" (ImageNet layout under `path`), "codes" (that `hmar tokenize` wrote to `path`), "digits" or
              "photographs" (built in, no download)
    on_error  a broken image file or shard of codes stops the run with its name ("raise") or is skipped and counted
              ("skip")
    workers   loader processes; 0 loads in the training process. The result does not depend on it.
    """

    name: Literal["folder", "codes", "digits", "photographs"] = "digits"
    path: str | None = None
    size: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.name == "folder" and not self.path:
            raise ValueError(
                'data.path is missing: data.name "folder" needs the folder of images, as in data.path=/images'
            )
        if self.name == "codes" and not self.path:
            raise ValueError(
                'data.path is missing: data.name "codes" needs a folder that `hmar tokenize` wrote, as in '
                "data.path=/codes"
            )
        if self.name in ("digits", "photographs") and self.path:
            raise ValueError(
                f'data.path={self.path} has no effect on the built-in set "{self.name}": set data.name=folder'
            )
        require(self.size is None or self.size > 0, "data.size", self.size, "a positive number of pixels")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are the published recipe (peak lr and final ratio of d16).

    warmup and flat are fractions of the run; clip 0 switches clipping off.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 2.0
    warmup: float = 0.02
    flat: float = 0.05
    start_ratio: float = 0.005
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "positive")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "positive")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.clip >= 0, "optimizer.clip", self.clip, "positive, or 0 for no clipping")
        fractions = self.warmup >= 0 and self.flat >= 0 and self.warmup + self.flat <= 1
        require(
            fractions,
            "optimizer.warmup + optimizer.flat",
            (self.warmup, self.flat),
            "fractions of the run, in all <= 1",
        )
        require(0 <= self.start_ratio <= 1, "optimizer.start_ratio", self.start_ratio, "in [0, 1]")
        require(0 <= self.final_ratio <= 1, "optimizer.final_ratio", self.final_ratio, "in [0, 1]")


@dataclass(frozen=True)
class ReconstructionConfig:
    """Weights of the tokenizer's losses. The adversarial term starts at the step adversarial_start.

    `perceptual` has an effect only if hmar.train.train is given a perceptual module: none is built in.
    """

    l1: float = 0.2
    l2: float = 1.0
    quantizer: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.0
    adversarial_start: int = 0

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self)):
            require(getattr(self, name) >= 0, f"reconstruction.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """One training run of one stage.

    `tokenizer` and `model` left out are those of the preset. The stages build on each other through folders of weights
    (a run's output folder, or a folder written by hmar.checkpoint.save_pretrained): every stage but "tokenizer" needs
    tokenizer_weights, and "masked" needs next_scale_weights as well.

    steps, epochs  how long: optimisation steps (1000 if neither is given), or passes over the data
    batch_size     images of one optimisation step, over all processes
    accumulate     into how many micro-batches each process divides its share of them; the result does not depend on it
    precision      "auto" is bf16 autocast on CUDA and fp32 on the CPU; fp16 scales the loss dynamically
    residual_precision  of the transformer's residual stream: "auto" is bf16 where precision is, and fp32 elsewhere.
                   What is computed of it (norms, gates, sums) is float32 in any case
    attention      "auto" or one of hmar_kernels.IMPLEMENTATIONS
    compile        torch.compile: false, "blocks" (one graph for all blocks of a transformer: compiles in seconds) or
                   "model" (model and loss in one graph); true means "model"
    cuda_graphs    forward and backward of a micro-batch as one CUDA graph, so that a step does not wait for the host:
                   "auto" is true for transformers on GPUs in one process or with parallel=ddp, and false elsewhere,
                   where true is an error
    activation_checkpointing  what the backward pass computes again instead of keeping it: "none", "mlp" (the inner
                   layers of the blocks' MLPs) or "blocks" (everything but the blocks' inputs)
    parallel       what several processes (torchrun) share: "ddp" keeps all of the model in each, "fsdp" shards
                   parameters, gradients and optimizer state over all, "hsdp" over groups of shard_size that are copies
                   of each other (0: the processes of a host)
    cache_codes    encode the whole data set once and keep the codes in memory (only for data without random crops)
    ema            decay of the averaged weights that are written at the end; 0 switches averaging off
    on_nonfinite   a step whose loss or gradient is not finite stops the run ("raise") or is skipped, counted ("skip")
    keep           how many checkpoints are kept
    """

    stage: Literal["tokenizer", "next-scale", "masked", "var"]
    output_dir: str
    preset: str
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig | None = None
    model: ModelConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    tokenizer_weights: str | None = None
    next_scale_weights: str | None = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    residual_precision: Literal["auto", "fp32", "bf16"] = "auto"
    attention: str = "auto"
    compile: Literal[False, True, "blocks", "model"] = False
    cuda_graphs: Literal["auto", True, False] = "auto"
    activation_checkpointing: Literal["none", "mlp", "blocks"] = "none"
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: int = 0
    cache_codes: bool = False
    ema: float = 0.0
    on_nonfinite: Literal["raise", "skip"] = "raise"
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(unknown("stage", self.stage, STAGES))
        if self.attention not in ATTENTION:
            raise ValueError(unknown("attention", self.attention, ATTENTION))
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps={self.steps} and epochs={self.epochs} both say how long the run is: leave one out, as in "
                f"epochs=null steps={self.steps}"
            )
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 1000)
        if self.compile is True:
            object.__setattr__(self, "compile", "model")
        tokenizer, model = find_preset(self.preset)
        object.__setattr__(self, "tokenizer", self.tokenizer or tokenizer)
        object.__setattr__(self, "model", self.model or model)
        size = self.model.sides[-1] * self.tokenizer.stride
        if self.data.size is None:
            object.__setattr__(self, "data", dataclasses.replace(self.data, size=size))
        if self.data.size != size:
            raise ValueError(
                f"data.size={self.data.size} does not fit the pyramid {tuple(self.model.sides)}: its last side times "
                f"the tokenizer's stride {self.tokenizer.stride} is {size}; leave data.size out or change model.sides"
            )
        for name in ("vocab_size", "code_dim"):
            got, expected = getattr(self.model, name), getattr(self.tokenizer, name)
            if got != expected:
                raise ValueError(f"model.{name}={got} does not fit tokenizer.{name}={expected}: they must be equal")
        if self.stage != "tokenizer" and not self.tokenizer_weights:
            raise ValueError(
                f"stage {self.stage} trains on a tokenizer's codes: give the folder of a trained one, as in "
                "tokenizer_weights=runs/tokenizer"
            )
        if self.stage == "masked" and not self.next_scale_weights:
            raise ValueError(
                "stage masked starts from a trained stage next-scale: give its folder, as in "
                "next_scale_weights=runs/next-scale"
            )
        unused = [("tokenizer_weights", self.tokenizer_weights)] if self.stage == "tokenizer" else []
        unused += [("next_scale_weights", self.next_scale_weights)] if self.stage != "masked" else []
        for name, value in unused:
            if value is not None:
                raise ValueError(f"{name}={value} has no effect in stage {self.stage}: leave it out")
        if self.data.name == "codes" and self.stage == "tokenizer":
            raise ValueError('stage tokenizer trains on images, not on data.name "codes": give data.name=folder')
        if self.cache_codes and self.data.name == "codes":
            raise ValueError('cache_codes=true has no effect on data.name "codes": leave it out')
        if self.cache_codes and self.stage == "tokenizer":
            raise ValueError("cache_codes=true has no effect in stage tokenizer, which trains on images: leave it out")
        if self.cache_codes and self.data.name != "digits":
            raise ValueError(
                f'cache_codes=true would freeze the random crops of data.name={self.data.name}: it is for "digits" only'
            )
        for name in ("steps", "epochs", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        require(
            self.batch_size % self.accumulate == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulate={self.accumulate}",
        )
        if self.stage == "tokenizer" and self.accumulate > 1:
            raise ValueError(
                f"accumulate={self.accumulate} has no effect in stage tokenizer, whose adversary and restarted codes "
                "look at whole batches: leave it out"
            )
        if self.stage == "tokenizer" and self.activation_checkpointing != "none":
            raise ValueError(
                f"activation_checkpointing={self.activation_checkpointing} is for transformers' blocks and has no "
                "effect in stage tokenizer: leave it out"
            )
        if self.stage == "tokenizer" and self.cuda_graphs is True:
            raise ValueError(
                "cuda_graphs=true is for transformers: a tokenizer's loss depends on the step, and its host waits for "
                "the device after each; leave it out"
            )
        if self.stage == "tokenizer" and self.precision == "fp16":
            raise ValueError(
                "precision=fp16 is for transformers: nothing scales a tokenizer's adversary; use bf16 or fp32"
            )
        require(self.shard_size >= 0, "shard_size", self.shard_size, "0 (the processes of a host) or more")
        if self.shard_size and self.parallel != "hsdp":
            raise ValueError(
                f"shard_size={self.shard_size} has no effect with parallel={self.parallel}: set parallel=hsdp"
            )
        require(0 <= self.ema < 1, "ema", self.ema, "in [0, 1), 0 for none")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


def with_steps(config: TrainConfig, num_images: int) -> TrainConfig:
    """The configuration with `epochs` passes over `num_images` images as steps; the last one may begin another pass."""
    if config.epochs is None:
        return config
    steps = math.ceil(config.epochs * num_images / config.batch_size)
    return dataclasses.replace(config, steps=steps, epochs=None)


def find_preset(name: str) -> tuple[TokenizerConfig, ModelConfig]:
    """The configurations of a preset; ValueError with close matches and the known names otherwise."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(unknown("preset", name, PRESETS))
    return PRESETS[name]


def learning_rate(
    step: int, *, steps: int, peak: float, warmup: float, flat: float, start_ratio: float, final_ratio: float
) -> float:
    """The learning rate of optimisation step `step` (0-based) of `steps`.

    Linear from start_ratio x peak over the first `warmup` of the run, `peak` for the next `flat` of it, then linear
    down to final_ratio x peak, which the last step has (VAR's and HMAR's schedule; warmup and flat are shares of the
    run).
    """
    warmup_steps, flat_end = warmup * steps, (warmup + flat) * steps
    if step < warmup_steps:
        return peak * (start_ratio + (1 - start_ratio) * step / warmup_steps)
    last = steps - 1
    if step <= flat_end or last <= flat_end:
        return peak
    return peak * (1 + (final_ratio - 1) * (step - flat_end) / (last - flat_end))


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file, not yet checked against TrainConfig."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"no configuration file {path}") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from None
    content = _parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r}, expected lines of the form `key: value`")
    return content


def recipes() -> dict[str, Path]:
    """The configurations that come with this package, by name: whole chains of stages, as imagenet-256-d16."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def read_stage_config(source: str | Path, stage: str) -> dict[str, Any]:
    """What a YAML file, or the recipe of that name, says of a stage, not yet checked against TrainConfig.

    The file may hold a section `stages` with keys that are for one stage only; those of `stage` win over the others.
    """
    path = Path(source)
    if not path.exists() and str(source) in recipes():
        path = recipes()[str(source)]
    elif not path.exists():
        raise ValueError(f"no configuration file {source}, and {unknown('recipe', source, recipes())}")
    config = read_config(path)
    sections = config.pop("stages", None) or {}
    if not isinstance(sections, Mapping) or not all(isinstance(section, Mapping) for section in sections.values()):
        raise ValueError(f"{path}: stages is {sections!r}, expected a section of keys for each stage")
    for name in sections:
        if name not in STAGES:
            raise ValueError(f"{path}: {unknown('stage', name, STAGES)}")
    return _merge(config, sections.get(stage, {}))


def apply_overrides(config: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the mapping `config` with overrides such as "optimizer.lr=1e-3"; values are read as YAML."""
    merged = _copy(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ValueError(f'"{override}" is not an override: expected key=value, as in optimizer.lr=1e-3')
        section = merged
        for depth, name in enumerate(path[:-1]):
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                parent = ".".join(path[: depth + 1])
                raise ValueError(f'unknown key "{key}": {parent} is a value, not a section')
        section[path[-1]] = _parse_yaml(text, f"the value of {key}")
    return merged


def make_config(mapping: Mapping[str, Any]) -> TrainConfig:
    """Check a mapping and complete it from its preset; ValueError with the key, what was given and what is known.

    `tokenizer` and `model` in the mapping override single fields of the preset. Inverse of config_mapping.
    """
    mapping = _copy(mapping)
    _check_keys(mapping, TrainConfig, "")
    for required, example in (("stage", "next-scale"), ("preset", "digits-32"), ("output_dir", "runs/digits")):
        if mapping.get(required) is None:
            raise ValueError(f"{required} is missing: add {required}={example}, for example")
    if mapping["stage"] not in STAGES:
        raise ValueError(unknown("stage", mapping["stage"], STAGES))
    for name, default in zip(("tokenizer", "model"), find_preset(mapping["preset"]), strict=True):
        changes = mapping.get(name)
        if changes is None:
            mapping[name] = _CONVERTER.unstructure(default)
        elif isinstance(changes, Mapping):
            _check_keys(changes, type(default), name)
            mapping[name] = _override_preset(default, changes)
        else:
            raise ValueError(
                f"{name}={changes!r} is a value, expected a section such as {name}.{fields(default)[0].name}"
            )
    return structure(mapping, TrainConfig)


def config_mapping(config: TrainConfig) -> dict[str, Any]:
    """The complete configuration as plain dicts, lists, numbers and strings, for YAML and JSON."""
    return _plain(_CONVERTER.unstructure(config))


def config_yaml(config: TrainConfig) -> str:
    """The complete configuration as YAML; make_config(read_config(file)) gives the same TrainConfig back."""
    return yaml.safe_dump(config_mapping(config), sort_keys=False)


def structure(mapping: Mapping[str, Any], cls: type) -> Any:
    """An instance of the dataclass `cls` from plain values, strictly typed; ValueError in one sentence otherwise."""
    try:
        return _CONVERTER.structure(mapping, cls)
    except cattrs.BaseValidationError as error:
        raise ValueError("; ".join(_sentences(error, ""))) from None


def unstructure(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return _plain(_CONVERTER.unstructure(config))


def unknown(what: str, got: object, known: Iterable[str]) -> str:
    """The sentence for an unknown name: close matches first, then all that are known."""
    known = list(known)
    close = difflib.get_close_matches(str(got), known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f'unknown {what} "{got}": {hint}known: {", ".join(known)}'


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """In words, every entry that differs between two nested mappings with the same keys."""
    found = []
    for name in now:
        key = f"{path}{name}"
        if isinstance(now[name], Mapping) and isinstance(before.get(name), Mapping):
            found += differences(before[name], now[name], f"{key}.")
        elif before.get(name) != now[name]:
            found.append(f"{key} was {before.get(name)}, now {now[name]}")
    return found


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings in one, section by section; where both have a value, that of `above`."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(below.get(name), Mapping)
        merged[name] = _merge(below[name], value) if both else value
    return merged


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does, and does not read on, off, yes and no as booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$", re.IGNORECASE),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _check_keys(mapping: Mapping[str, Any], cls: type, path: str) -> None:
    """Unknown keys are reported before anything else, with their full path."""
    known = {item.name: item.type for item in fields(cls)}
    for key in mapping:
        if key not in known:
            raise ValueError(_unknown_key(path, key, known))


def _unknown_key(path: str, key: object, known: Iterable[str]) -> str:
    prefix = f"{path}." if path else ""
    return unknown("key", f"{prefix}{key}", [prefix + name for name in known])


def _override_preset(default: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's values under `changes`; values that the preset derived (width from depth) are derived anew."""
    derivable = [item.name for item in fields(default) if item.default is None]
    derived = {name for name in derivable if dataclasses.replace(default, **{name: None}) == default}
    kept = {name: value for name, value in _CONVERTER.unstructure(default).items() if name not in derived}
    return {**kept, **changes}


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)

    def exactly(expected: str, accepted: tuple[type, ...], convert: type):
        def hook(value: Any, _: Any) -> Any:
            if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
                raise ValueError(f"expected {expected}, got {value!r}")
            return convert(value)

        return hook

    converter.register_structure_hook(bool, exactly("true or false", (bool,), bool))
    converter.register_structure_hook(int, exactly("a whole number", (int,), int))
    converter.register_structure_hook(float, exactly("a number", (int, float), float))
    converter.register_structure_hook(str, exactly("text", (str,), str))

    def literal(value: Any, cls: Any) -> Any:
        known = get_args(cls)
        if not any(type(value) is type(item) and value == item for item in known):  # NOTE: 1 == True
            names = [str(item).lower() if isinstance(item, bool) else item for item in known]
            raise ValueError(unknown("value", value, names))
        return value

    converter.register_structure_hook_func(lambda cls: get_origin(cls) is Literal, literal)

    def sequence(value: Any, cls: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"expected a list such as [1, 2], got {value!r}")
        types_of_items = get_args(cls)
        if types_of_items[-1] is Ellipsis:
            types_of_items = types_of_items[:1] * len(value)
        if len(value) != len(types_of_items):
            raise ValueError(f"expected a list of {len(types_of_items)} values, got {value!r}")
        return tuple(converter.structure(item, kind) for item, kind in zip(value, types_of_items, strict=True))

    converter.register_structure_hook_func(lambda cls: get_origin(cls) is tuple, sequence)

    def dataclass_hook(cls: type):
        inner = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)

        def hook(value: Any, target: type) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(f"expected a section with keys, got {value!r}")
            return inner(value, target)

        return hook

    converter.register_structure_hook_factory(is_dataclass, dataclass_hook)
    return converter


def _sentences(error: BaseException, path: str) -> list[str]:
    """cattrs' tree of errors as one sentence a leaf, each with the path of its key."""
    if not isinstance(error, cattrs.BaseValidationError):
        if isinstance(error, ForbiddenExtraKeysError):
            known = [item.name for item in fields(error.cl)]
            return [_unknown_key(path, key, known) for key in sorted(error.extra_fields)]
        if isinstance(error, KeyError):
            return [f"{path + '.' if path else ''}{error.args[0]} is missing"]
        # A leaf about one key names the key; a message of __post_init__ already does.
        named = f"{path}: " if path and str(error).startswith(("expected", "unknown value")) else ""
        return [f"{named}{error}"]
    sentences = []
    for inner in error.exceptions:
        notes = [note for note in getattr(inner, "__notes__", []) if isinstance(note, cattrs.AttributeValidationNote)]
        key = notes[-1].name if notes else ""
        sentences += _sentences(inner, ".".join(part for part in (path, key) if part))
    return sentences


_CONVERTER = _make_converter()
