"""Training steps from end to end: `python -m bench.training --output reports/data/training_h100.json`.

HMAR's stage 1 and VAR, on random codes that lie on the device, at the depths and resolutions of the published models,
with several implementations of attention in the same model and engine: ours, FlexAttention, and SDPA with the dense
additive mask. The last is how VAR and HMAR were published: in eager mode, with plain operators (`plain.py`); it is also
measured with our other operators, compiled. The method:

* Checked first. Loss and gradients of some parameters are compared with the model in float32 with the reference
  attention, few images at a time. They may be off by twice what the model in eager bf16 with the reference attention is
  (`Oracle`), gradients of few numbers by twice what any other may. What fails is recorded and has no time; so is, as
  "unchecked", what had no such model to be compared with. Gates and logits are made as large as a trained model's
  beforehand: at the published initialisation attention hardly reaches the loss.
* `ms` is forward + backward of model and loss, from inputs to the gradients of all weights: median over steps that
  follow each other without a pause, between device events, host included. `forward_ms` is its first part, null in a
  CUDA graph, which has no parts. All ways but the published one run as training does on one GPU: as a CUDA graph, the
  copies of its inputs included (hmar/cuda_graphs.py).
* `optimizer_ms` is clipping and AdamW (and the averaged weights with --ema) within whole steps, `step_ms` such a step;
  `optimizer_share` is optimizer_ms / ms.
* `peak_bytes` is the largest allocation of forward + backward, weights and gradients included, before the optimizer has
  any state; `step_peak_bytes` is that of whole steps. Of a CUDA graph all memory that it holds counts.
* `flops` are model FLOPs (hmar.flops), `mfu` those per second of `ms` over the data sheet's peak.

Nothing that one measurement does ends the run: what raises or runs out of memory is recorded with the reason. Results
are in the file as soon as they are known; after Ctrl-C, a crash or --minutes the same command with --continue goes on.
reports/training.py makes tables/training.csv and the plots. Read next: hmar/train.py, whose parts are measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hmar.model
from hmar.config import ModelConfig
from hmar.cuda_graphs import CapturedStep, Recorder
from hmar.flops import training_flops, utilization
from hmar.loss import token_weights
from hmar.model import DropPath, NextScaleTransformer, ScaleMasks
from hmar.optimizer import AveragedWeights, LossScale, Optimizer
from hmar.parallelize import checkpoint_activations, compile_objective, narrow_residual_stream
from hmar.pyramid import Pyramid
from hmar.recipe import OptimizerConfig
from hmar.stages import NextScaleObjective, parameter_groups
from hmar_kernels import IMPLEMENTATIONS, SpanMask, attention

from . import options
from .check import CheckFailed
from .environment import environment
from .plain import plain_operators
from .results import Results, partial_of
from .shapes import DTYPES
from .subject import failure, release
from .timing import clock, quantile

PATTERNS = {"hmar": "block_diagonal", "var": "block_causal"}
ATTENTION = ("auto", *IMPLEMENTATIONS, "sdpa_dense")
# (resolution, depth, batch): the targets, then larger models of the same tokens a step.
CELLS = ((256, 16, 32), (256, 24, 16), (512, 16, 8), (512, 24, 8), (1024, 24, 2))
MORE_CELLS = ((256, 30, 16), (512, 30, 4), (1024, 16, 4), (1024, 30, 2))
# (attention, operators, compile, cuda_graphs) of a default run: ours, as published, the rivals at their best, and ours
# without graphs and without a compiler. Each is measured in all cells before the next one, so that a run that is cut
# short has the targets.
WAYS = (
    ("auto", "auto", "blocks", "true"),
    ("sdpa_dense", "reference", "false", "false"),
    ("flex", "auto", "blocks", "true"),
    ("sdpa_dense", "auto", "blocks", "true"),
    ("auto", "auto", "blocks", "false"),
    ("auto", "auto", "false", "true"),
)
SMOKE_WAYS = (("reference", "auto", "false", "false"), ("sdpa_dense", "reference", "false", "false"))
WATCHED = (
    "embedding.codes.weight",
    "blocks.0.attention.qkv.weight",
    "blocks.0.attention.log_scale_H",
    "blocks.1.mlp.fc1.weight",
    "blocks.1.modulation.linear.weight",
    "head.linear.weight",
)
FEW_NUMBERS = 64
# Of the reference at a time, whose attention is dense, in float32. Its backward holds five times its logits.
PART_TOKENS = 8192
PART_LOGIT_BYTES = 4e9


@dataclass(frozen=True)
class Case:
    """One measurement: which model, at which size, run in which way."""

    model: str
    resolution: int
    depth: int
    batch: int
    dtype: str
    residual: str
    attention: str
    operators: str
    compile: str
    cuda_graphs: str
    activation_checkpointing: str

    @property
    def cell(self) -> tuple:
        """What cases have in common that compute the same."""
        return self.model, self.resolution, self.depth, self.batch, self.dtype, self.residual

    @property
    def key(self) -> tuple:
        return tuple(asdict(self).values())

    def config(self) -> ModelConfig:
        if self.resolution < 256:  # tries the benchmark on a CPU
            sides = tuple(range(1, self.resolution // 16 + 1))
            return ModelConfig(depth=self.depth, width=64, num_heads=2, vocab_size=128, code_dim=8, sides=sides)
        return ModelConfig(depth=self.depth, sides=Pyramid.for_resolution(self.resolution).sides)

    def __str__(self) -> str:
        size = f"{self.model} {self.resolution} px d{self.depth} B{self.batch} {self.dtype}"
        ways = f"{self.attention} operators={self.operators} compile={self.compile} graphs={self.cuda_graphs}"
        return f"{size} residual={self.residual} {ways} recompute={self.activation_checkpointing}"


class Step:
    """Model, loss and fixed inputs of a case on a device; the same numbers for all cases of a cell."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0):
        self.case, self.device = case, device
        dtype = DTYPES[case.dtype]
        self.dtype = None if dtype == torch.float32 else dtype
        config = case.config()
        torch.manual_seed(seed)
        with device:
            named = case.attention if case.attention != "sdpa_dense" else "reference"
            self.model = NextScaleTransformer(config, PATTERNS[case.model], named)
        # NOTE: the masks' own numbers stay on the CPU.
        self.model.masks = ScaleMasks(config.pyramid, PATTERNS[case.model])
        _make_lively(self.model)
        weights_L = token_weights(config.pyramid) if case.model == "hmar" else None
        self.objective = NextScaleObjective(self.model.train(), weights_L).to(device)
        if case.residual != "float32":
            narrow_residual_stream(self.objective, DTYPES[case.residual])
        checkpoint_activations(self.objective, case.activation_checkpointing)
        compile_objective(self.objective, False if case.compile == "false" else case.compile)

        generator = torch.Generator().manual_seed(seed)
        num_inputs = config.pyramid.length - config.pyramid.sizes[0]
        self.arguments = (
            torch.randint(config.num_classes, (case.batch,), generator=generator).to(device),
            torch.randn(case.batch, num_inputs, config.code_dim, generator=generator).to(device),
            torch.randint(config.vocab_size, (case.batch, config.pyramid.length), generator=generator).to(device),
        )
        self.drop_paths = [m for m in self.model.modules() if isinstance(m, DropPath) and m.p > 0]
        kept_DB = torch.rand(len(self.drop_paths), case.batch, generator=generator)
        p_D1 = torch.tensor([module.p for module in self.drop_paths])[:, None]
        self.factors_DB = ((kept_DB >= p_D1) / (1 - p_D1)).to(device)
        recorder = Recorder(device) if case.cuda_graphs == "true" else None
        self.captured = CapturedStep([self.objective], recorder)

    def forward(self, images: slice = slice(None)) -> Tensor:
        return self._loss(*(argument[images] for argument in self.arguments), self.factors_DB[:, images])

    def _loss(self, class_B: Tensor, inputs_BLE: Tensor, codes_BL: Tensor, factors_DB: Tensor) -> Tensor:
        for module, factor_B in zip(self.drop_paths, factors_DB, strict=True):
            module.factor_B = factor_B
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.objective(class_B, inputs_BLE, codes_BL)[0]

    def forward_backward(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        return self.captured(self._forward_backward, *self.arguments, self.factors_DB)

    def _forward_backward(self, *arguments: Tensor) -> Tensor:
        loss = self._loss(*arguments)
        loss.backward()
        return loss.detach()

    def peak_bytes(self) -> int | None:
        return self.captured.peak_bytes(self.device) if self.device.type == "cuda" else None

    def in_parts(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and watched gradients of the batch, computed by as many images at a time as have PART_TOKENS."""
        self.model.zero_grad(set_to_none=True)
        images, loss = torch.arange(self.case.batch), 0.0
        for part in images.split(max(1, PART_TOKENS // self.model.config.pyramid.length)):
            part = self.forward(slice(int(part[0]), int(part[-1]) + 1)) * (len(part) / len(images))
            part.backward()
            loss += part.item()
        return loss, self.watched()

    def watched(self) -> dict[str, Tensor]:
        """The gradients to compare, float64 on the CPU."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].grad.double().cpu() for name in WATCHED if name in parameters}


def _make_lively(model: NextScaleTransformer) -> None:
    """Give gates and logits the size that they have in a trained model."""
    config = model.config
    for block in model.blocks:
        rows = block.modulation.linear.weight
        rows.data[: 2 * config.width].mul_(0.5 / config.gate_init)
    model.head.linear.weight.data.mul_(50)


@contextlib.contextmanager
def model_attention(attend: Callable[..., Tensor]) -> Iterator[None]:
    """Within it hmar.model calls `attend` for attention."""
    own, hmar.model.masked_attention = hmar.model.masked_attention, attend
    try:
        yield
    finally:
        hmar.model.masked_attention = own


def dense_attention(mask: SpanMask, device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """SDPA with an additive mask [L, L] of 0 and -inf in place of the model's attention, as it was published."""
    visible = mask.to_dense(device)
    bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask, *, scale: float, **_: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    return model_attention(attend)


def reference_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: SpanMask, *, scale: float, **_: Any) -> Tensor:
    """The reference attention, of as many heads at a time as have PART_LOGIT_BYTES of float32 logits, at least one.

    Where these are not all, each part is computed again for its backward, so that one part's [heads, L, L] are held.
    """
    attend = functools.partial(attention, mask=mask, scale=scale, impl="reference")
    heads = max(1, int(PART_LOGIT_BYTES // (4 * len(q) * mask.num_queries * mask.num_keys)))
    if heads >= q.shape[1]:
        return attend(q, k, v)
    parts = zip(*(x.split(heads, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False) for part in parts], 1)


class Oracle:
    """What loss and gradients of a cell are, in float32, and how far eager low precision is off."""

    def __init__(self, case: Case, device: torch.device):
        plain = replace(
            case,
            attention="reference",
            operators="reference",
            compile="false",
            cuda_graphs="false",
            activation_checkpointing="blocks",
        )
        with plain_operators(), model_attention(reference_by_heads):
            exact = replace(plain, dtype="float32", residual="float32")
            self.loss, self.gradients = Step(exact, device).in_parts()
            release(device)
            loss, gradients = Step(plain, device).in_parts()
            release(device)
        errors = {name: self._error(name, gradient) for name, gradient in gradients.items()}
        # NOTE: one draw of the error of few numbers, as of a scale a head, is .002 or .02 as it happens.
        usual = max(error for name, error in errors.items() if gradients[name].numel() >= FEW_NUMBERS)
        few = {name for name in errors if gradients[name].numel() < FEW_NUMBERS}
        errors |= {name: max(errors[name], 2 * usual) for name in few}
        self.limits = {"loss": 2 * abs(loss - self.loss) / self.loss + 1e-3}
        self.limits |= {name: 2 * error + 1e-3 for name, error in errors.items()}

    def _error(self, name: str, gradient: Tensor) -> float:
        return float((gradient - self.gradients[name]).norm() / self.gradients[name].norm())

    def compare(self, loss: float, gradients: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Relative error and limit of the loss and of each gradient; CheckFailed where one is over."""
        errors = {"loss": abs(loss - self.loss) / self.loss}
        errors |= {name: self._error(name, gradient) for name, gradient in gradients.items()}
        for name, error in errors.items():
            if not error <= self.limits[name]:
                raise CheckFailed(f"{name} is off by {error:.3g}, at most {self.limits[name]:.3g} is tolerated")
        return {name: {"error": error, "limit": self.limits[name]} for name, error in errors.items()}


class Marks:
    """Instants of a device that are read after all work is queued."""

    def __init__(self, device: torch.device):
        self.now = clock(device)
        self.instants: list = []

    def mark(self) -> None:
        self.instants.append(self.now())

    def milliseconds(self, parts: int) -> list[list[float]]:
        """Times between marks, `parts` of them a step that begins where the one before ends."""
        times = [1e3 * (later - earlier) for earlier, later in zip(self.instants, self.instants[1:], strict=False)]
        return [times[part::parts] for part in range(parts)]


def measure(case: Case, oracle: Oracle, device: torch.device, steps: int, ema: float) -> dict:
    """The numbers of a case. Raises whatever goes wrong."""
    with contextlib.ExitStack() as stack:
        if case.operators == "reference":
            stack.enter_context(plain_operators())
        if case.attention == "sdpa_dense":
            pyramid = case.config().pyramid
            stack.enter_context(dense_attention(getattr(pyramid, PATTERNS[case.model])(), device, DTYPES[case.dtype]))
        started = time.perf_counter()
        step = Step(case, device)
        loss = step.forward_backward().item()
        found = {
            "first_step_s": time.perf_counter() - started,
            "loss": loss,
            "flops": case.batch * training_flops(step.model),
        }
        found["check"] = oracle.compare(loss, step.watched())
        found |= _time_forward_backward(step, steps)
        found["mfu"] = utilization(found["flops"] / found["ms"] * 1e3, device, step.dtype)
        found |= _time_steps(step, steps, ema)
    return found


def _warm_up(call: Callable[[], object], device: torch.device, calls: int = 3) -> None:
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _time_forward_backward(step: Step, steps: int) -> dict:
    _warm_up(step.forward_backward, step.device)
    marks = Marks(step.device)
    marks.mark()
    if step.captured.recorder is not None:
        for _ in range(steps):
            step.forward_backward()
            marks.mark()
        (both,) = marks.milliseconds(1)
        forward_ms = None
    else:
        for _ in range(steps):
            step.model.zero_grad(set_to_none=True)
            loss = step.forward()
            marks.mark()
            loss.backward()
            marks.mark()
        forward, backward = marks.milliseconds(2)
        both = [a + b for a, b in zip(forward, backward, strict=True)]
        forward_ms = quantile(forward, 0.5)
    return {
        "ms": quantile(both, 0.5),
        "p10_ms": quantile(both, 0.1),
        "p90_ms": quantile(both, 0.9),
        "steps": steps,
        "forward_ms": forward_ms,
        "peak_bytes": step.peak_bytes(),
    }


def _time_steps(step: Step, steps: int, ema: float) -> dict:
    optimizer = Optimizer(
        parameter_groups(step.model, 0.05), OptimizerConfig(), LossScale(step.dtype == torch.float16, step.device)
    )
    averaged = AveragedWeights(step.model, ema) if ema else None

    def finish(loss: Tensor) -> None:
        _, found_inf = optimizer.step(loss, 1e-6)
        if averaged is not None:
            averaged.update(found_inf)

    _warm_up(lambda: finish(step.forward_backward()), step.device)
    marks = Marks(step.device)
    marks.mark()
    for _ in range(steps):
        loss = step.forward_backward()
        marks.mark()
        finish(loss)
        marks.mark()
    computing, finishing = marks.milliseconds(2)
    milliseconds = quantile(finishing, 0.5)
    return {
        "step_ms": quantile([a + b for a, b in zip(computing, finishing, strict=True)], 0.5),
        "optimizer_ms": milliseconds,
        "optimizer_share": milliseconds / quantile(computing, 0.5),
        "ema": ema,
        "step_peak_bytes": step.peak_bytes(),
    }


NUMBERS = (
    *("ms", "p10_ms", "p90_ms", "steps", "forward_ms", "peak_bytes", "step_ms", "optimizer_ms", "optimizer_share"),
    *("ema", "step_peak_bytes", "flops", "mfu", "loss", "first_step_s", "check"),
)


class TrainingResults(Results):
    kind, version = "training", 3

    @staticmethod
    def key_of(row: dict) -> tuple:
        return tuple(row[name] for name in Case.__dataclass_fields__)

    def go_on(self, facts: dict) -> None:
        """Keep what was measured on this machine and commit, and say of what was at work that it crashed."""
        self.check_environment(facts)
        self.keep(lambda row: row["status"] == "ok" and row["commit"] == facts["commit"])
        for row in self.running:
            self.rows[self.key_of(row)] = {**row, "status": "crashed", "reason": "the process did not survive it"}
        self.running = []


def run(
    cases: list[Case], results: TrainingResults, device: torch.device, steps: int, ema: float, minutes: float
) -> bool:
    """Measure what is not in the results yet; whether nothing is left."""
    deadline = time.monotonic() + 60 * minutes
    oracles: dict[tuple, Oracle | str] = {}
    commit = results.head["environment"]["commit"]
    for case in cases:
        if case.key in results.rows:
            continue
        if time.monotonic() > deadline:
            return False
        row = {**asdict(case), "commit": commit, "status": "ok", "reason": None, **dict.fromkeys(NUMBERS)}
        results.begin([row])
        if case.cell not in oracles:
            oracles[case.cell] = reference_of(case, device)
        oracle = oracles[case.cell]
        if isinstance(oracle, str):
            row["status"], row["reason"] = "unchecked", oracle
        else:
            try:
                row |= measure(case, oracle, device, steps, ema)
            except Exception as error:
                row["status"], row["reason"] = failure(error)
        release(device)
        results.add(row)
        print(describe(case, row), flush=True)
    return True


def reference_of(case: Case, device: torch.device) -> Oracle | str:
    """The oracle of a case's cell, or why there is none."""
    started = time.monotonic()
    try:
        oracle = Oracle(case, device)
    except Exception as error:
        oracle = f"the reference: {failure(error)[1]}"
    release(device)
    size = f"{case.model} {case.resolution} px d{case.depth} B{case.batch}"
    print(f"reference of {size}: {time.monotonic() - started:.0f} s", flush=True)
    return oracle


def describe(case: Case, row: dict) -> str:
    if row["status"] != "ok":
        return f"{case}  {row['status']}: {row['reason']}"
    forward = "" if row["forward_ms"] is None else f" (forward {row['forward_ms']:.2f})"
    line = f"{case}  {row['ms']:.2f} ms{forward}, optimizer {row['optimizer_share']:.1%}"
    if row["peak_bytes"] is not None:
        line += f", {row['peak_bytes'] / 1e9:.2f} GB (whole step {row['step_peak_bytes'] / 1e9:.2f})"
    return line + (f", MFU {row['mfu']:.1%}" if row["mfu"] is not None else "")


def parse_cells(text: str) -> list[tuple[int, int, int]]:
    try:
        cells = [tuple(int(number) for number in part.split(":")) for part in options.names(text)]
    except ValueError:
        cells = [()]
    if not all(len(cell) == 3 for cell in cells):
        raise argparse.ArgumentTypeError(f"expected resolution:depth:batch, such as 256:16:32,512:24:8; got {text!r}")
    return cells


def chosen_from(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for name in (found := options.names(text)):
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; known are {', '.join(known)}")
        return found

    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    takes = parser.add_argument
    takes("--cells", type=parse_cells, help="resolution:depth:batch,...; default: those of the targets")
    takes("--full", action="store_true", help="d30, and d16 at 1024 px, as well")
    takes("--models", type=chosen_from(tuple(PATTERNS)), default=list(PATTERNS))
    takes("--attention", type=chosen_from(ATTENTION), help="with the next three instead of the default ways")
    takes("--operators", type=chosen_from(("auto", "reference")), help="fused or plain norms and loss")
    takes("--compile", type=chosen_from(("false", "blocks", "model")), help="without, with regional, with whole graphs")
    takes("--cuda-graphs", type=chosen_from(("false", "true")), help="forward and backward as one; default: on a GPU")
    takes("--activation-checkpointing", type=chosen_from(("none", "mlp", "blocks")), default=["none"])
    takes("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    takes("--residual", choices=("bfloat16", "float32"), help="dtype of the residual stream; default: that of --dtype")
    takes("--ema", type=float, default=0.0, help="decay of averaged weights in whole steps; default: none")
    takes("--steps", type=int, default=20, help="measured steps (20)")
    takes("--minutes", type=float, default=math.inf, help="begin nothing new after so long; --continue goes on")
    takes("--continue", dest="go_on", action="store_true", help="keep what the file, or the partial one, holds")
    options.add_device(parser)
    options.add_record(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    chosen = parser.parse_args(arguments)
    device = options.find_device(parser, chosen)
    residual = chosen.residual or chosen.dtype
    if (chosen.dtype, residual) == ("float32", "bfloat16"):
        parser.error("--residual bfloat16 goes with --dtype bfloat16: training has no other use of it")
    smoke = device.type == "cpu"
    cells = chosen.cells or ([(64, 3, 2)] if smoke else [*CELLS, *(MORE_CELLS if chosen.full else ())])
    ways = SMOKE_WAYS if smoke else WAYS
    given = (chosen.attention, chosen.operators, chosen.compile, chosen.cuda_graphs)
    if smoke and "true" in (chosen.cuda_graphs or ()):
        parser.error("--cuda-graphs true needs a GPU, the device is cpu")
    if any(given):
        defaults = ["reference"], ["auto"], ["false"], ["false"]
        if not smoke:
            defaults = ["auto"], ["auto"], ["blocks"], ["true"]
        ways = itertools.product(*(names or default for names, default in zip(given, defaults, strict=True)))
    cases = [
        Case(model, *cell, chosen.dtype, residual, *way, recompute)
        for way, recompute, model, cell in itertools.product(
            ways, chosen.activation_checkpointing, chosen.models, cells
        )
    ]
    method = {"clock": "device events" if device.type == "cuda" else "host clock", "warm_up_steps": 3}
    path, facts = chosen.output and partial_of(chosen.output), environment(device, chosen.commit)
    results = TrainingResults(path)
    if chosen.go_on:
        sources = [source for source in (path, chosen.output) if source is not None and source.is_file()]
        if not sources:
            parser.error(f"--continue: neither {path} nor the file of --output is there to go on from")
        try:
            results = TrainingResults.read(sources[0], path)
            results.go_on(facts)
        except ValueError as error:
            parser.error(str(error))
    results.head = {"environment": facts, "method": method}
    results.write(complete=False)
    try:
        complete = run(cases, results, device, chosen.steps, chosen.ema, chosen.minutes)
    except KeyboardInterrupt:
        complete = False
    if chosen.output and complete:
        results.finish(chosen.output)
    where = chosen.output if complete else f"incomplete: {path}; the same command with --continue goes on"
    print(f"raw results: {where}" if chosen.output else "raw results not kept; --output FILE keeps them")
    return int(any(row["status"] in ("failed", "unchecked", "crashed") for row in results.rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
