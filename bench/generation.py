"""Time and memory of generation, from classes to pixels: `python -m bench.generation --output FILE` on a CUDA GPU.

The method, in one place:

* Random weights of the published sizes, heads `HEAD_GAIN` times as large as they are initialised, so that logits differ
  as those of a trained model do, and the published sampling settings (`SAMPLING`).
* Engines. "eager": `generate_hmar` and `generate_var` as they stand, this repo's plain path: float32 weights under
  bfloat16 autocast, HMAR's masked passes with the published factor 1e-6. "optimised": `hmar.engine.Engine`,
  bfloat16 weights, CUDA graphs, masked passes without the null class. HMAR with its default schedule and with one pass
  a scale; VAR has one pass a scale.
* `ms` is the median time of a whole batch on the host's clock, device idle before and after: what one who waits for
  the images waits. Warm-up first (it compiles and captures); p10 and p90 tell the spread. Throughput and memory against
  the batch, up to 128 images or the first batch that does not fit: --full --brief.
* `peak_gb` is the largest amount of memory allocated from the first batch on, weights and capture included (2^30
  bytes); `graph_gb` what the pool of the graphs reserves, which can be more.
* Checked first: images are finite, f_hat is that of the codes, and the optimised engine gives the codes of the eager
  one for the same seed, but for what bfloat16 turns over, and what follows from that (`same_codes`, at least
  `MIN_SAME_CODES`; unrelated logits would give less than a tenth).
* `parts_ms` (optimised): transformer, sampling, quantizer and decode, each captured and timed alone with all its
  passes; `scales_ms`: the graph of each scale, then of decoding.
* `transformer_tflop` (optimised): operations of the transformer for one image, counted (`hmar.flops`).
* `decoder_ms` (optimised): the stages of decoding, each captured and timed alone on as many images as are decoded at
  once, times the number of such parts; the levels run from the smallest maps to the largest.
* Variants of the optimised engine (--decoder, --convolutions, --products, --attention, --no-overlap, --compile,
  --compile-decoder, --no-cudnn-benchmark) are one to a run and a file, `method` says which: what cuDNN has
  once chosen for a shape stays for the process.
* What runs out of memory or fails is recorded with the reason. The file is valid after every row; --minutes ends a run
  in good time and --continue goes on, with a row for what ended the process before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn as nn

from hmar.config import PRESETS
from hmar.decoder import CONVOLUTIONS, FusedDecoder
from hmar.engine import ATTENTIONS, DECODERS, PRODUCTS, Engine, Program
from hmar.flops import generation_flops
from hmar.generate import (
    GenerationOutput,
    LayerKeysValues,
    SamplingConfig,
    draw,
    generate_hmar,
    generate_var,
    masked_step,
)
from hmar.model import HMAR, Head, NextScaleTransformer
from hmar.tokenizer import Level, Tokenizer

from .environment import environment
from .options import integers, names
from .results import partial_of, rounded
from .timing import quantile

KIND, VERSION = "generation", 1
# (resolution, depth) -> batches: those of the targets; --full takes FULL_BATCHES, up to the first that does not fit.
CELLS = {(256, 16): (1, 16), (256, 30): (1, 16), (512, 24): (1, 16), (1024, 24): (1, 8)}
FULL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
MODELS = ("hmar", "var")
ENGINES = ("eager", "optimised")
SCHEDULES = ("default", "none")
TARGETS = ("hmar", "optimised", "default")
# Published: cfg, top-k, top-p by depth (HMAR, arXiv 2506.04421), and for VAR (arXiv 2404.02905).
SAMPLING = {
    16: (1.7, 1000, 0.99),
    20: (1.9, 950, 0.99),
    24: (2.1, 900, 0.99),
    30: (1.6, 650, 0.99),
    36: (1.6, 650, 0.99),
}
VAR_SAMPLING = (1.5, 900, 0.96)
PUBLISHED_MASKED_FACTOR = 1e-6
MIN_SAME_CODES = 0.5
HEAD_GAIN = 50
CHECKED_BATCH = 2
VARIANTS = ("decoder", "convolutions", "products", "attention", "compile", "compile_decoder")
MIN_ROUNDS, MAX_ROUNDS, WARMUP_ROUNDS = 5, 50, 2
LONG_SECONDS = 15  # after which fewer rounds than MIN_ROUNDS are enough, as of large batches


@dataclass(frozen=True)
class Cell:
    model: str
    engine: str
    schedule: str
    resolution: int | None
    depth: int
    batch: int

    def sampling(self) -> SamplingConfig:
        cfg, top_k, top_p = SAMPLING.get(self.depth, SAMPLING[16]) if self.model == "hmar" else VAR_SAMPLING
        factor = PUBLISHED_MASKED_FACTOR if self.engine == "eager" else 0.0
        return SamplingConfig(
            cfg=cfg, top_k=top_k, top_p=top_p, schedule=self.schedule, masked_cfg_factor=factor, seed=1
        )


def choose_cells(options: argparse.Namespace) -> list[Cell]:
    """The cells that targets are set for, then the others; each part in an order that makes every model once."""
    if options.device == "cpu":
        sizes = {(None, PRESETS["tiny"][1].depth): tuple(options.batches or (2,))}
    elif options.resolutions or options.depths:
        pairs = product(options.resolutions or (256, 512, 1024), options.depths or (16, 24, 30))
        sizes = {
            pair: tuple(options.batches or (FULL_BATCHES if options.full else CELLS.get(pair, (1,)))) for pair in pairs
        }
    else:
        sizes = {pair: tuple(options.batches or (FULL_BATCHES if options.full else own)) for pair, own in CELLS.items()}
    cells = [
        Cell(model, engine, schedule, resolution, depth, batch)
        for (resolution, depth), batches in sizes.items()
        for model in options.models or MODELS
        for engine in options.engines or ENGINES
        for schedule in (options.schedules or SCHEDULES if model == "hmar" else ("none",))
        for batch in batches
    ]
    return sorted(cells, key=lambda cell: (cell.model, cell.engine, cell.schedule) != TARGETS)


class Subject:
    """The model of some cells, as its engines have it. `engine` must not go back from "optimised" to "eager"."""

    def __init__(self, cell: Cell, device: torch.device, variant: dict | None = None):
        self.device, self.variant = device, variant or {}
        tokenizer_config, config = PRESETS["tiny" if cell.resolution is None else f"d{cell.depth}-{cell.resolution}"]
        torch.manual_seed(0)
        with torch.device(device):
            self.tokenizer = Tokenizer(tokenizer_config, config.pyramid).eval().requires_grad_(False)
            self.model = HMAR(config) if cell.model == "hmar" else NextScaleTransformer(config, "block_causal")
            self.model.eval().requires_grad_(False)
            nn.init.normal_(self.tokenizer.quantizer.codebook.weight)
            for module in self.model.modules():
                if isinstance(module, Head):
                    module.linear.weight.mul_(HEAD_GAIN)
        self.engine: Engine | None = None

    def expected(self, cell: Cell) -> GenerationOutput:
        """A small batch by the plain functions, which the optimised engine is held against."""
        return self._eager(CHECKED_BATCH, cell.sampling())

    def optimise(self) -> None:
        """Weights in the engine's precision, in place, so that nothing is held twice."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        for module in (self.tokenizer.decoder, self.tokenizer.post_quant_conv):
            module.to(torch.bfloat16, memory_format=torch.channels_last)
        self.tokenizer.encoder = None
        self.engine = Engine(self.model, self.tokenizer, dtype=torch.bfloat16, **self.variant)

    def generate(self, cell: Cell, batch: int) -> GenerationOutput:
        if cell.engine == "eager":
            return self._eager(batch, cell.sampling())
        return self.engine.generate(self._classes(batch), cell.sampling())

    def _eager(self, batch: int, sampling: SamplingConfig) -> GenerationOutput:
        generate = generate_hmar if isinstance(self.model, HMAR) else generate_var
        with torch.autocast(self.device.type, torch.bfloat16):
            return generate(self.model, self.tokenizer, self._classes(batch).to(self.device), sampling)

    def _classes(self, batch: int) -> torch.Tensor:
        return torch.arange(batch) % self.model.config.num_classes


class CheckFailed(Exception):
    """A result that must not be timed."""


def check(subject: Subject, cell: Cell, expected: GenerationOutput | None) -> float | None:
    """The share of codes equal to the eager engine's; CheckFailed for images that are wrong."""
    output = subject.generate(cell, CHECKED_BATCH)
    if not output.images_BCHW.isfinite().all() or output.images_BCHW.float().std() == 0:
        raise CheckFailed("the images are not finite, or of one colour")
    f_hat_BEhw = subject.tokenizer.quantizer.f_hats(output.codes_BL)[-1]
    if not torch.allclose(f_hat_BEhw, output.f_hat_BEhw, rtol=1e-2, atol=1e-2):
        raise CheckFailed("f_hat is not that of the codes")
    if expected is None:
        return None
    same = (output.codes_BL == expected.codes_BL).double().mean().item()
    if same < MIN_SAME_CODES:
        raise CheckFailed(f"{same:.1%} of the codes are those of the eager engine, expected {MIN_SAME_CODES:.0%}")
    return same


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def single(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call on the host's clock, device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def seconds(call: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """Times of single calls, as many as `budget` seconds allow."""
    samples: list[float] = []
    while (
        not samples
        or (len(samples) < MIN_ROUNDS and sum(samples) < LONG_SECONDS)
        or (len(samples) < MAX_ROUNDS and sum(samples) < budget)
    ):
        samples.append(single(call, device))
    return samples


def measure(subject: Subject, cell: Cell, budget: float, brief: bool = False) -> dict:
    """The numbers of a row. brief: but those of parts, scales and stages."""
    device = subject.device
    release(device)
    if device.type == "cuda":
        # NOTE: before the warm-up, for graphs allocate when they are captured and not when they run.
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP_ROUNDS):
        subject.generate(cell, cell.batch)
    milliseconds = [1e3 * s for s in seconds(lambda: subject.generate(cell, cell.batch), device, budget)]
    middle = quantile(milliseconds, 0.5)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    numbers = {
        "ms": middle,
        "p10_ms": quantile(milliseconds, 0.1),
        "p90_ms": quantile(milliseconds, 0.9),
        "rounds": len(milliseconds),
        "images_per_s": 1e3 * cell.batch / middle,
        "peak_gb": peak,
        "graph_gb": None,
        "parts_ms": None,
        "scales_ms": None,
        "decoder_ms": None,
        "sides": None,
        "transformer_tflop": None,
    }
    if cell.engine == "optimised":
        program = next(reversed(subject.engine.programs.values()))
        numbers["graph_gb"] = subject.engine.graph_bytes / 2**30 if device.type == "cuda" else None
        numbers |= counts(subject.engine, program)
    if cell.engine == "optimised" and not brief:
        numbers["scales_ms"] = segment_times(program, device)
        # NOTE: a large batch of VAR has no room for the caches of the parts beside those of its graphs.
        for segment in program.segments:
            segment.graph = None
        subject.engine.forget()
        numbers["parts_ms"] = part_times(subject.engine, program, device)
        numbers["decoder_ms"] = decoder_times(subject.engine, cell.batch, device)
    return numbers


def counts(engine: Engine, program: Program) -> dict:
    """What the tables set beside times: sides of the scales, and operations of the transformer for one image, 1e12."""
    settings = program.settings
    flops = generation_flops(engine.config, settings.schedule, settings.guided_S, engine.is_cached)
    return {"sides": list(engine.pyramid.sides), "transformer_tflop": flops / 1e12}


def segment_times(program: Program, device: torch.device) -> list[float]:
    """Milliseconds of each graph of an image, in order; the last one decodes."""
    rounds = []
    with program.engine._surroundings(), torch.no_grad():
        for _ in range(MIN_ROUNDS):
            # NOTE: in their order, for a scale of VAR adds to what earlier ones have cached.
            rounds.append([single(segment.run, device) for segment in program.segments])
    return [1e3 * statistics.median(samples) for samples in zip(*rounds, strict=True)]


def part_times(engine: Engine, program: Program, device: torch.device) -> dict[str, float]:
    """Milliseconds of transformer, sampling, quantizer and decode: all passes of an image, each part in one graph."""
    times = {}
    with engine._surroundings(), torch.no_grad():
        for name, calls in parts(engine, program).items():

            def run(calls=calls):
                for call in calls:
                    call()

            times[name] = 1e3 * statistics.median(seconds(captured(run, device), device, 0.0))
    program._drop()
    return times


def decoder_times(engine: Engine, batch: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each stage of decoding a batch."""
    times = {}
    with engine._surroundings(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        x, factor = first_latents(engine, batch)
        for name, stage in decoder_stages(engine):

            def run(stage=stage, x=x):
                stage(x)

            times[name] = factor * 1e3 * statistics.median(seconds(captured(run, device), device, 0.0))
            x = stage(x)
    return times


def first_latents(engine: Engine, batch: int) -> tuple[torch.Tensor, float]:
    """Latents of the images that are decoded at once, and how many times so many images a batch has."""
    at_once = min(batch, engine.decoded_at_once)
    f_hat_BEhw = torch.randn_like(engine.quantizer.empty_f_hat(at_once))
    return engine.latents(f_hat_BEhw), batch / at_once


def decoder_stages(engine: Engine) -> list[tuple[str, Callable]]:
    """`FusedDecoder.stages` with the convolution before, or the same of the tokenizer's modules."""
    decoder = engine.decoder
    stages = [("post_quant_conv", engine.post_quant_conv)]
    if isinstance(engine.decoding, FusedDecoder):
        return [*stages, *engine.decoding.stages()]
    stages.append(("middle", lambda x: decoder.middle(decoder.conv_in(x))))
    for i, level in enumerate(decoder.levels):
        stages.append((f"level {i + 1}", lambda x, level=level: blocks(level, x)))
        if i < len(decoder.levels) - 1:
            stages.append((f"upsample {i + 1}", level.resample))
    return [*stages, ("out", lambda x: decoder.conv_out(decoder.norm_out(x, silu=True)))]


def blocks(level: Level, x_BChw: torch.Tensor) -> torch.Tensor:
    """A level without its change of resolution."""
    for block, attention in zip(level.blocks, level.attentions, strict=True):
        x_BChw = attention(block(x_BChw))
    return x_BChw


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`run` as a graph on a GPU."""
    run()
    if device.type != "cuda":
        return run
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def parts(engine: Engine, program: Program) -> dict[str, list[Callable[[], object]]]:
    """The calls of a program, by part, on arguments of the right shapes."""
    settings, model, maps, pyramid = program.settings, engine.model, engine.scale_maps, engine.pyramid
    batch, config = settings.batch, engine.config
    program._begin()
    f_hat_BEhw = torch.randn_like(program.f_hat_BEhw)
    transformer, sampling, quantizing = [], [], []

    def pass_(call: Callable[..., torch.Tensor], guided: bool, tensors, positions, row: int, step: int) -> None:
        class_R, arguments = program._with_null(guided, *tensors)
        transformer.append(lambda: call(class_R, *arguments))
        rows = (2 if guided else 1) * batch
        dtype = engine.dtype or f_hat_BEhw.dtype
        logits = torch.randn(rows, positions.shape[-1], config.vocab_size, device=engine.device).to(dtype)
        strength_B, chosen = program.strengths_SB[row], program.sampling
        given = logits, chosen, strength_B, program.keys_B, positions, step
        sampling.append(lambda: draw(*given, overlap=engine.overlap))

    def next_scale(k: int) -> Callable[..., torch.Tensor]:
        if engine.is_hmar:
            return lambda class_R, inputs: model.next_scale(class_R, inputs, (k, k + 1))
        return lambda class_R, inputs: model(class_R, inputs, (k, k + 1), program.caches)

    if program.caches is not None:
        transformer.append(lambda: setattr(program, "caches", [LayerKeysValues(pyramid.length) for _ in model.blocks]))
    for k, size in enumerate(pyramid.sizes):
        inputs_BnE = f_hat_BEhw.new_zeros(batch, size if k > 0 else 0, f_hat_BEhw.shape[1])
        codes_Bn = torch.randint(config.vocab_size, (batch, size), device=engine.device)
        span = pyramid.slice(k)
        pass_(next_scale(k), settings.guided_S[k], [inputs_BnE], program.positions_L[span], k, 0)
        for i in (i for scale, i in program.rows if scale == k):
            num_hidden = sum(settings.schedule[k][i:])
            wanted_Bm = torch.arange(num_hidden, device=engine.device).expand(batch, -1)
            hidden_Bn = torch.arange(size, device=engine.device).expand(batch, -1) < num_hidden

            wanted_Rm = wanted_Bm.repeat(1 + settings.masked_guided, 1)

            def masked(class_R, inputs, residuals, hidden, wanted=wanted_Rm, k=k):
                return model.masked(class_R, inputs, residuals, hidden, (k, k + 1), wanted)

            tensors = [inputs_BnE, inputs_BnE, hidden_Bn]
            positions = wanted_Bm + pyramid.offsets[k]
            pass_(masked, settings.masked_guided, tensors, positions, -1, masked_step(i))
            quantizing.append(partial(maps.own_residual, codes_Bn, k, overlap=engine.overlap))
        quantizing.append(partial(maps.accumulate_, f_hat_BEhw, codes_Bn, k, overlap=engine.overlap))
    return {
        "transformer": [program._begin, *transformer],
        "sampling": sampling,
        "quantizer": quantizing,
        "decode": [lambda: engine.decode(f_hat_BEhw)],
    }


class Rows:
    """Results by cell, in a file that is rewritten with every row."""

    def __init__(self, path: Path, head: dict):
        self.path, self.head = path, head
        self.rows: dict[Cell, dict] = {}

    def read(self, source: Path) -> None:
        """Go on from an earlier run. ValueError for one of another machine or kind; failures are tried again."""
        content = json.loads(source.read_text())
        variant = self.head["method"]["variant"]
        if (content.get("kind"), content.get("version")) != (KIND, VERSION):
            raise ValueError(
                f"{source} holds {content.get('kind')} version {content.get('version')}, not {KIND} {VERSION}"
            )
        for name in ("gpu", "driver", "torch", "cuda", "triton", "commit"):
            then, now = content["environment"][name], self.head["environment"][name]
            if then != now:
                raise ValueError(f"cannot continue: the results were measured with {name} {then}, here it is {now}")
        if content["method"].get("variant", {}) != variant:
            raise ValueError(
                f"cannot continue: the results are of the variant {content['method'].get('variant', {})}, asked for is "
                f"{variant}; give it a file of its own"
            )
        running = content.get("running")
        for row in content["results"]:
            if row["status"] in ("ok", "out of memory", "crashed"):
                self.rows[cell_of(row)] = row
        if running is not None:
            cell = cell_of(running)
            self.rows[cell] = empty_row(cell, "crashed", "the process ended while this was measured", self.commit)

    @property
    def commit(self) -> str | None:
        return self.head["environment"]["commit"]

    def add(self, cell: Cell, row: dict) -> None:
        self.rows[cell] = rounded(row)
        self.write(complete=False)

    def write(self, complete: bool, running: Cell | None = None, path: Path | None = None) -> None:
        path = path or self.path
        head = {"kind": KIND, "version": VERSION, **self.head, "complete": complete}
        head["running"] = running and asdict(running)
        lines = "\n".join(f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items())
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.rows.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")
        beside.write_text("{\n" + lines + '\n  "results": [\n' + rows + "\n  ]\n}\n")
        os.replace(beside, path)


NUMBERS = (
    "ms",
    "p10_ms",
    "p90_ms",
    "rounds",
    "images_per_s",
    "peak_gb",
    "graph_gb",
    "parts_ms",
    "scales_ms",
    "decoder_ms",
    "sides",
    "transformer_tflop",
    "same_codes",
)


def cell_of(row: dict) -> Cell:
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def empty_row(cell: Cell, status: str, reason: str | None, commit: str | None) -> dict:
    return asdict(cell) | {"commit": commit, "status": status, "reason": reason} | dict.fromkeys(NUMBERS)


def run_cell(
    subjects: dict,
    cell: Cell,
    device: torch.device,
    budget: float,
    commit: str | None,
    variant: dict | None = None,
    brief: bool = False,
) -> dict:
    """Check, then measure one cell; whatever goes wrong is in the row."""
    try:
        subject, expected = subjects.get("subject"), subjects.setdefault("expected", {})
        if subjects.get("key") != (cell.model, cell.resolution, cell.depth) or (
            cell.engine == "eager" and subject.engine is not None
        ):
            subjects.clear()
            release(device)
            subject, expected = Subject(cell, device, variant), {}
            subjects.update(key=(cell.model, cell.resolution, cell.depth), subject=subject, expected=expected)
        if cell.engine == "optimised" and subject.engine is None:
            schedules = SCHEDULES if cell.model == "hmar" else ("none",)
            for schedule in schedules:
                other = Cell(cell.model, "optimised", schedule, cell.resolution, cell.depth, cell.batch)
                expected[schedule] = subject.expected(other)
            subject.optimise()
        if subject.engine is not None:
            subject.engine.forget()
        same = check(subject, cell, expected.get(cell.schedule) if cell.engine == "optimised" else None)
        if subject.engine is not None:
            subject.engine.forget()
        return empty_row(cell, "ok", None, commit) | measure(subject, cell, budget, brief) | {"same_codes": same}
    except torch.OutOfMemoryError as error:
        status, reason = "out of memory", str(error).splitlines()[0]
    except Exception as error:
        status, reason = "failed", f"{type(error).__name__}: {error}"
    subjects.clear()
    release(device)
    return empty_row(cell, status, reason[:300], commit)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line(row: dict) -> str:
    size = f"{row['model']:<5} {row['engine']:<9} {row['schedule']:<8} {row['resolution'] or 'tiny'} d{row['depth']}"
    if row["status"] != "ok":
        return f"{size} x{row['batch']:<4} {row['status']}: {row['reason']}"
    memory = f"{row['peak_gb']:6.2f} GB" if row["peak_gb"] is not None else ""
    return f"{size} x{row['batch']:<4} {row['ms']:9.2f} ms {row['images_per_s']:8.2f} images/s {memory}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="raw results, JSON")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the harness on a tiny model"
    )
    parser.add_argument("--models", type=names, metavar="A,B", help=f"default: {','.join(MODELS)}")
    parser.add_argument("--engines", type=names, metavar="A,B", help=f"default: {','.join(ENGINES)}")
    parser.add_argument("--schedules", type=names, metavar="A,B", help=f"of HMAR; default: {','.join(SCHEDULES)}")
    parser.add_argument("--resolutions", type=integers, metavar="N,N", help="pixels")
    parser.add_argument("--depths", type=integers, metavar="N,N")
    parser.add_argument("--batches", type=integers, metavar="N,N", help="images at once")
    parser.add_argument(
        "--full", action="store_true", help=f"batches {FULL_BATCHES}, up to the first that does not fit"
    )
    parser.add_argument("--brief", action="store_true", help="no times of parts, scales and stages: for many batches")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on one measurement (default 2)")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin nothing new after so long; --continue goes on"
    )
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep what FILE, or FILE.partial, holds")
    parser.add_argument("--decoder", choices=DECODERS, help="of the optimised engine; see hmar.engine.Engine")
    parser.add_argument("--convolutions", choices=CONVOLUTIONS, help="the same: of the decoder")
    parser.add_argument("--products", choices=PRODUCTS, help="the same: of few rows")
    parser.add_argument("--attention", choices=ATTENTIONS, help="the same: of short scales")
    parser.add_argument("--no-overlap", action="store_true", help="start kernels after the end of the one before them")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile for blocks, as inductor; default: none")
    parser.add_argument("--compile-decoder", metavar="BACKEND", help="the same for the decoder")
    parser.add_argument("--no-cudnn-benchmark", action="store_true", help="let cuDNN guess its fastest algorithms")
    parser.add_argument("--commit", help="commit to record where git cannot be asked")
    options = parser.parse_args(arguments)
    for given, known in ((options.models, MODELS), (options.engines, ENGINES), (options.schedules, SCHEDULES)):
        if given and not set(given) <= set(known):
            parser.error(f"{','.join(given)}: known are {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the harness on a tiny model")
    device = torch.device(options.device)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    variant = {name: getattr(options, name) for name in VARIANTS}
    variant = {name: value for name, value in variant.items() if value is not None}
    if options.no_cudnn_benchmark:
        variant["cudnn_benchmark"] = False
    if options.no_overlap:
        variant["overlap"] = False
    method = {
        "clock": "host, device idle before and after",
        "seconds_per_measurement": options.seconds,
        "variant": variant,
    }
    partial = partial_of(options.output)
    rows = Rows(partial, {"environment": environment(device, options.commit), "method": method})
    sources = [path for path in (partial, options.output) if path.is_file()]
    if options.go_on and sources:
        try:
            rows.read(sources[0])
        except ValueError as error:
            parser.error(str(error))
    cells, subjects = choose_cells(options), {}
    too_large: set[tuple] = set()
    for cell in cells:
        series = (cell.model, cell.engine, cell.schedule, cell.resolution, cell.depth)
        if cell in rows.rows:
            too_large |= {series} if rows.rows[cell]["status"] == "out of memory" else set()
            continue
        if time.monotonic() > deadline:
            print(f"the minutes are over; the same command with --continue goes on from {partial}")
            return 0
        if series in too_large:
            row = empty_row(cell, "out of memory", "a smaller batch did not fit", rows.commit)
        else:
            rows.write(complete=False, running=cell)
            row = run_cell(subjects, cell, device, options.seconds, rows.commit, variant, options.brief)
        too_large |= {series} if row["status"] == "out of memory" else set()
        rows.add(cell, row)
        print(line(rows.rows[cell]), flush=True)
    rows.write(complete=True, path=options.output)
    partial.unlink(missing_ok=True)
    print(f"raw results: {options.output}")
    return int(any(rows.rows[cell]["status"] in ("failed", "crashed") for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
