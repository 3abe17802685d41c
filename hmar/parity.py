"""Parity with the published code: `python -m hmar.parity FOLDER`.

A folder holds golden files: random weights under the published names (`w.*`), inputs, and the outputs that the
published code gave for them on a CPU in float32. Each file's metadata is its configuration, so any pyramid, depth,
vocabulary or schedule can be checked. In float32 codes must be equal and everything else within LIMIT; in other
precisions agreement is reported. Generation is greedy, so that nothing depends on random numbers. Read published.py
for the names, generate.py for what is compared at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hmar.checkpoint import replacing
from hmar.generate import GenerationOutput, SamplingConfig, generate_hmar, generate_var
from hmar.processes import find_device
from hmar.published import import_published
from hmar.weightfile import read_weightfile

LIMIT = 2e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# File name -> the kind of module whose weights it holds.
KIND_OF_FILE = {
    "tokenizer": "tokenizer",
    "var": "var",
    "hmar_next_scale": "next-scale",
    "hmar_masked": "masked",
    "hmar": "hmar",
}
# Metadata of a file -> fields of the configurations; "pyramid" is sides in both.
TOKENIZER_FIELDS = {"tokenizer_channels": "channels", "vocab": "vocab_size", "code_dim": "code_dim"}
MODEL_FIELDS = {
    "depth": "depth",
    "width": "width",
    "heads": "num_heads",
    "num_classes": "num_classes",
    "vocab": "vocab_size",
    "code_dim": "code_dim",
}


@dataclass(frozen=True)
class Row:
    """One quantity of one file, compared.

    equal: share of codes, or of logits' likeliest codes, that agree; None for other values. median, p99 and largest:
    absolute errors of values; `largest` is the number of differing codes for codes. limit: what `largest` may be, None
    where agreement is only reported. passed: whether it is; None without a limit, but False for values not finite.
    """

    file: str
    quantity: str
    count: int
    equal: float | None
    median: float | None
    p99: float | None
    largest: float
    limit: float | None
    passed: bool | None


@dataclass
class Golden:
    """One golden file: its metadata, published weights and other tensors, and which of these have been used."""

    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path) -> Golden:
        """Raises ValueError if there is no such file, or if it is damaged."""
        tensors, metadata = read_weightfile(path)
        weights = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")}
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith("w.")}
        return cls(path, {name: _parsed(text) for name, text in metadata.items()}, weights, others)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.path} lacks the tensor {name}; it has {', '.join(sorted(self.tensors))}")
        self.used.add(name)
        return self.tensors[name]

    def setting(self, name: str) -> Any:
        if name not in self.config:
            raise ValueError(f"{self.path} lacks {name} in its metadata; it has {', '.join(sorted(self.config))}")
        return self.config[name]

    def module(self, kind: str, *, attention: str = "auto", sides: Sequence[int] | None = None) -> nn.Module:
        """The module of the file's weights, in eval mode; its sizes are the metadata's, which the tensors must have."""
        fields = TOKENIZER_FIELDS if kind == "tokenizer" else MODEL_FIELDS
        given = {ours: self.setting(theirs) for theirs, ours in fields.items()}
        given["sides"] = list(sides or self.setting("pyramid"))
        if kind in ("masked", "hmar"):
            given["mask_depth"] = self.config.get("mask_layers")
        try:
            return import_published(self.weights, kind=kind, given=given, attention=attention).module.eval()
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def measure_folder(
    folder: str | Path, *, device: str = "cpu", dtype: str = "float32", attention: str = "auto"
) -> Iterator[Row]:
    """Every golden file of a folder, file by file. ValueError if there is none or one cannot be used."""
    names = [name for name in KIND_OF_FILE if (Path(folder) / f"{name}.safetensors").is_file()]
    if not names:
        what = "holds no golden file" if Path(folder).is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}: expected {', '.join(f'{name}.safetensors' for name in KIND_OF_FILE)}")
    for name in names:
        yield from measure_file(Path(folder) / f"{name}.safetensors", device=device, dtype=dtype, attention=attention)


@torch.no_grad()
def measure_file(
    path: str | Path, *, device: str = "cpu", dtype: str = "float32", attention: str = "auto"
) -> list[Row]:
    """One golden file; var and hmar also need the tokenizer.safetensors beside it.

    Args:
        path: one of the names in KIND_OF_FILE, with the suffix .safetensors.
        device: "cpu", "cuda" or "cuda:N". dtype: "float32", where the limit holds, or "bfloat16" or "float16", which
            are autocast as in training and sampling. attention: implementation, see `hmar_kernels.attention`.
    Raises:
        ValueError: if a file is damaged, contradicts its metadata, or lacks something that is compared.
    """
    path = Path(path)
    if path.stem not in KIND_OF_FILE:
        raise ValueError(f"{path} is no golden file: expected one of {', '.join(KIND_OF_FILE)}")
    if dtype not in DTYPES:
        raise ValueError(f'dtype is "{dtype}", expected {", ".join(DTYPES)}')
    where = find_device(device)
    golden = Golden.open(path)
    limit = LIMIT if dtype == "float32" else None
    rows = []
    try:
        with (
            torch.autocast(where.type, DTYPES[dtype], enabled=dtype != "float32"),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            for quantity, actual, expected in QUANTITIES[path.stem](golden, where, attention):
                rows.append(_compare(path.stem, quantity, actual.cpu(), expected, limit))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} has inputs or metadata that cannot be used: {error}") from error
    for name in sorted(set(golden.tensors) - golden.used):
        print(f"{path}: nothing is compared with its tensor {name}", file=sys.stderr)
    return rows


# What a file's function yields: the name of a quantity, what we compute, what the published code gave.
Quantities = Iterator[tuple[str, Tensor, Tensor]]


def tokenizer_quantities(golden: Golden, device: torch.device, attention: str) -> Quantities:
    tokenizer = golden.module("tokenizer").to(device)
    image_BCHW, codes_BL = golden["image"].to(device), golden["idx"].to(device)
    yield "latent", tokenizer.latent(image_BCHW), golden["latent"]
    yield "codes", tokenizer.encode(image_BCHW), golden["idx"]
    for k, f_hat_BEhw in enumerate(tokenizer.quantizer.f_hats(codes_BL)):
        yield f"f_hat after scale {k + 1}", f_hat_BEhw, golden[f"f_hat.{k}"]
    yield "next-scale inputs", tokenizer.quantizer.next_scale_inputs(codes_BL), golden["teacher_forcing_input"]
    yield "image", tokenizer.decode(codes_BL), golden["reconstruction"]
    # The forward pass of training goes another way to the same codes and, but for the clamp, the same image.
    output = tokenizer(image_BCHW)
    yield "codes in training", output.codes_BL, golden["idx"]
    yield "image in training", output.reconstruction.clamp(-1, 1), golden["reconstruction"]


def next_scale_quantities(golden: Golden, device: torch.device, attention: str) -> Quantities:
    model = golden.module(KIND_OF_FILE[golden.path.stem], attention=attention).to(device)
    inputs_BLE = golden["teacher_forcing_input"].to(device)
    yield "logits", model(golden["label"].to(device), inputs_BLE), golden["logits"]


def var_quantities(golden: Golden, device: torch.device, attention: str) -> Quantities:
    yield from next_scale_quantities(golden, device, attention)
    model = golden.module("var", attention=attention).to(device)
    tokenizer = _tokenizer_beside(golden, device)
    sampling = SamplingConfig(cfg=golden.setting("cfg"), greedy=True)
    for use_cache, cache in ((True, "with cache"), (False, "without cache")):
        output = generate_var(model, tokenizer, golden["label"].to(device), sampling, use_cache=use_cache)
        yield from _generated(golden, output, f"generated {cache}", "")


def masked_quantities(golden: Golden, device: torch.device, attention: str) -> Quantities:
    model = golden.module("masked", attention=attention).to(device)
    pyramid = model.config.pyramid
    masked_L = torch.zeros(pyramid.length, dtype=torch.bool)
    # NOTE: positions are counted from the first token of scale 2.
    masked_L[golden["masked_position"] + pyramid.sizes[0]] = True
    inputs = [golden[name].to(device) for name in ("label", "teacher_forcing_input", "visible_code_input")]
    yield "logits", model(*inputs, masked_L.to(device)), golden["logits"]


def hmar_quantities(golden: Golden, device: torch.device, attention: str) -> Quantities:
    model = golden.module("hmar", attention=attention).to(device)
    tokenizer = _tokenizer_beside(golden, device)
    schedules = (("masked passes", golden.setting("mask_schedule"), ""), ("one pass a scale", "none", "_no_mask"))
    for what, schedule, suffix in schedules:
        sampling = SamplingConfig(
            cfg=golden.setting("cfg"),
            schedule=schedule,
            masked_cfg_factor=golden.setting("masked_pass_cfg_factor"),
            greedy=True,
        )
        output = generate_hmar(model, tokenizer, golden["label"].to(device), sampling)
        yield from _generated(golden, output, f"generated, {what}", suffix)


QUANTITIES = {
    "tokenizer": tokenizer_quantities,
    "var": var_quantities,
    "hmar_next_scale": next_scale_quantities,
    "hmar_masked": masked_quantities,
    "hmar": hmar_quantities,
}


def _generated(golden: Golden, output: GenerationOutput, what: str, suffix: str) -> Quantities:
    yield f"{what}: codes", output.codes_BL, golden[f"generated_idx{suffix}"]
    yield f"{what}: f_hat", output.f_hat_BEhw, golden[f"generated_f_hat{suffix}"]
    # The published code returns images in [0, 1].
    yield f"{what}: image", (output.images_BCHW + 1) / 2, golden[f"generated_image{suffix}"]


def _tokenizer_beside(golden: Golden, device: torch.device) -> nn.Module:
    path = golden.path.with_name("tokenizer.safetensors")
    return Golden.open(path).module("tokenizer", sides=golden.setting("pyramid")).to(device)


def _compare(file: str, quantity: str, actual: Tensor, expected: Tensor, limit: float | None) -> Row:
    if actual.shape != expected.shape:
        raise ValueError(
            f"{file}: {quantity} has shape {tuple(actual.shape)} here and {tuple(expected.shape)} in the file"
        )
    if not expected.is_floating_point():
        differing = int((actual != expected).sum())
        passed = None if limit is None else differing == 0
        share = 1 - differing / max(1, expected.numel())
        return Row(file, quantity, expected.numel(), share, None, None, differing, limit and 0, passed)
    likeliest = None
    if quantity == "logits":
        likeliest = (actual.argmax(-1) == expected.argmax(-1)).double().mean().item()
    errors = (actual.double() - expected.double()).abs().flatten().numpy()
    errors = errors if errors.size else np.zeros(1)
    finite = bool(np.isfinite(errors).all())
    median, p99, largest = np.percentile(errors, (50, 99, 100)).tolist() if finite else [math.inf] * 3
    passed = False if not finite else None if limit is None else largest <= limit
    return Row(file, quantity, expected.numel(), likeliest, median, p99, largest, limit, passed)


def _parsed(text: str) -> Any:
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def format_row(row: Row) -> str:
    """One line, aligned with HEADING."""
    if row.median is None:
        cells = ["", "", f"{row.largest} of {row.count} differ"]
    else:
        cells = [f"{error:.1e}" for error in (row.median, row.p99, row.largest)]
    equal = "" if row.equal is None else f"{row.equal:.2%}"
    limit = "" if row.limit is None else f"{row.limit:.0e}" if row.limit else "0"
    return _line(row.file, row.quantity, equal, *cells, limit, {True: "pass", False: "FAIL", None: ""}[row.passed])


def _line(*cells: str) -> str:
    return "{:<16}{:<39}{:>8}{:>9}{:>9}{:>17}{:>7}  {}".format(*cells).rstrip()


HEADING = _line("file", "quantity", "equal", "median", "99 %", "largest error", "limit", "result")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 parity, 1 none, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m hmar.parity", description="Compare with golden files.")
    parser.add_argument(
        "folder", type=Path, help="golden files: " + ", ".join(f"{n}.safetensors" for n in KIND_OF_FILE)
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="others than float32 report agreement only")
    parser.add_argument("--attention", default="auto", help="attention implementation, see hmar info")
    parser.add_argument("--output", type=Path, help="also write the rows to this JSON file")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    try:
        for row in measure_folder(
            options.folder, device=options.device, dtype=options.dtype, attention=options.attention
        ):
            if not rows:
                print(HEADING)
            print(format_row(row), flush=True)
            rows.append(row)
        if options.output is not None:
            _write_json(options.output, rows, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = sum(row.passed is False for row in rows)
    verdict = "parity" if options.dtype == "float32" else f"agreement in {options.dtype}, without limits"
    print(f"{failed} of {len(rows)} quantities failed" if failed else f"{len(rows)} quantities: {verdict}")
    return 1 if failed else 0


def _write_json(path: Path, rows: Sequence[Row], options: argparse.Namespace) -> None:
    device = find_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    content = {
        "device": name,
        "dtype": options.dtype,
        "attention": options.attention,
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
