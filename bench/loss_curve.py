"""Does fast training learn like plain training? `python -m bench.loss_curve --output FILE`.

Stage 1 or VAR is trained twice with each of several seeds: by the engine with everything that makes it fast (bf16,
the residual stream too, fused operators, our attention, torch.compile, fused AdamW), and by a plain loop in float32
(reference operators and attention, eager, torch's clipping and unfused AdamW). Both begin with the same weights and see
the same batches, dropped labels and drop paths. Their curves, averaged over windows of steps, may differ by no more
than the plain curve does from seed to seed: in each window the mean over seeds of |engine - plain| is at most the
standard deviation of plain over seeds.

The images are codes that can be learned: each class has a few prototypes, of which an image is one with a share of its
codes replaced. Read next: hmar/train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from hmar import checkpoint
from hmar.codes import CodesIndex, tokenizer_fingerprint, write_index, write_shard
from hmar.processes import Processes, find_device
from hmar.progress import read_metrics
from hmar.recipe import TrainConfig, learning_rate, make_config
from hmar.stages import make_stage, parameter_groups
from hmar.tokenizer import Tokenizer
from hmar.train import load_batches, open_images, step_generator, train

from .environment import environment
from .options import add_record
from .plain import plain_operators
from .results import rounded

KIND, VERSION = "loss_curve", 1
PROTOTYPES, REPLACED = 4, 0.3


def write_codes(folder: Path, tokenizer: Tokenizer, num_images: int, num_classes: int, seed: int = 0) -> None:
    """A folder of codes [num_images, L] that a model can learn something about."""
    draw = np.random.default_rng(seed)
    length, vocab_size = tokenizer.pyramid.length, tokenizer.config.vocab_size
    prototypes_CPL = draw.integers(vocab_size, size=(num_classes, PROTOTYPES, length))
    classes_N = draw.integers(num_classes, size=num_images)
    codes_NL = prototypes_CPL[classes_N, draw.integers(PROTOTYPES, size=num_images)]
    replaced_NL = draw.random(codes_NL.shape) < REPLACED
    codes_NL = np.where(replaced_NL, draw.integers(vocab_size, size=codes_NL.shape), codes_NL)
    folder.mkdir(parents=True)
    index = CodesIndex(
        sides=tokenizer.pyramid.sides,
        vocab_size=vocab_size,
        tokenizer=tokenizer_fingerprint(tokenizer),
        images=f"prototypes of seed {seed}",
        source="prototypes",
        split="train",
        seed=seed,
        num_images=num_images,
        crops=1,
        shard_size=num_images,
        class_names=tuple(map(str, range(num_classes))),
    )
    (shard,) = index.shards()
    write_shard(folder, index, shard, codes_NL, classes_N)
    write_index(folder, index, complete=True)


def write_inputs(folder: Path, preset: str, num_images: int, num_classes: int | None = None) -> None:
    """folder/tokenizer, of random weights and the preset's sizes, and folder/codes for it."""
    sizes = make_config({"stage": "tokenizer", "preset": preset, "output_dir": "unused"})
    torch.manual_seed(0)
    tokenizer = Tokenizer(sizes.tokenizer, sizes.model.pyramid)
    checkpoint.save_pretrained(folder / "tokenizer", tokenizer)
    write_codes(folder / "codes", tokenizer, num_images, num_classes or sizes.model.num_classes)


def engine_curve(config: TrainConfig) -> list[float]:
    """Losses of the steps of a run by hmar.train."""
    train(config, overwrite=True, progress=False)
    return [row["loss"] for row in read_metrics(Path(config.output_dir) / "metrics.jsonl")]


def plain_curve(config: TrainConfig) -> list[float]:
    """Losses of the same steps, as the equations say it and in float32."""
    device = find_device(config.device)
    torch.manual_seed(config.seed)
    dataset = open_images(config)
    stage = make_stage(config, device)
    stage.module.train()
    optimizer = torch.optim.AdamW(
        parameter_groups(stage.module, config.optimizer.weight_decay),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        foreach=False,
        fused=False,
    )
    schedule = {name: getattr(config.optimizer, name) for name in ("warmup", "flat", "start_ratio", "final_ratio")}
    batches = load_batches(stage.prepare(dataset, None), config, 0, device, Processes())
    losses = []
    with plain_operators():
        for step in range(config.steps):
            batch, classes_B = next(batches)
            draws = stage.draw(step_generator(config.seed, step), config.batch_size)
            loss, _ = stage.loss(batch, classes_B, draws.of(slice(None), device), step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(stage.module.parameters(), config.optimizer.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps=config.steps, peak=config.optimizer.lr, **schedule)
            optimizer.step()
            losses.append(loss.item())
    batches.close()
    return losses


def windows(losses: list[float], width: int) -> list[float]:
    """Means over windows of steps."""
    return [statistics.fmean(losses[start : start + width]) for start in range(0, len(losses), width)]


def compare(engine: list[list[float]], plain: list[list[float]], width: int) -> dict:
    """Curves by seed -> by window the spread of plain over seeds, the mean deviation, and the largest ratio of both."""
    engine, plain = ([windows(curve, width) for curve in curves] for curves in (engine, plain))
    spread = [statistics.stdev(values) for values in zip(*plain, strict=True)]
    deviation = [
        statistics.fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(zip(*engine, strict=True), zip(*plain, strict=True), strict=True)
    ]
    ratio = max((d / s if s > 0 else float("inf")) for d, s in zip(deviation, spread, strict=True))
    learned = all(curve[-1] < curve[0] for curve in (*engine, *plain))
    finite = bool(np.isfinite([*engine, *plain]).all())
    passed = finite and learned and ratio <= 1
    return {"spread": spread, "deviation": deviation, "largest_ratio": ratio, "passed": passed}


def configure(chosen: argparse.Namespace, folder: Path, seed: int, plain: bool) -> TrainConfig:
    fast = {
        "precision": chosen.precision,
        "residual_precision": chosen.residual_precision,
        "compile": False if chosen.compile == "false" else chosen.compile,
    }
    slow = {"precision": "fp32", "compile": False, "attention": "reference"}
    mapping = {
        "stage": chosen.stage,
        "preset": chosen.preset,
        "output_dir": str(folder / f"run-{seed}"),
        "steps": chosen.steps,
        "batch_size": chosen.batch,
        "seed": seed,
        "data": {"name": "codes", "path": str(folder / "codes")},
        "optimizer": {"lr": chosen.lr},
        "model": {"num_classes": chosen.classes},
        "tokenizer_weights": str(folder / "tokenizer"),
        "device": chosen.device,
        "log_every": 1,
        "checkpoint_every": chosen.steps,
        **(slow if plain else fast),
    }
    if chosen.depth:
        mapping["model"] |= {"depth": chosen.depth, "gate_init": 0.1}
    return make_config(mapping)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.loss_curve", description=__doc__.splitlines()[0])
    takes = parser.add_argument
    takes("--stage", choices=("next-scale", "var"), default="next-scale")
    takes("--preset", default="d16-256", help="sizes of tokenizer and model")
    takes("--depth", type=int, default=8, help="of the model; 0 for that of the preset")
    takes("--classes", type=int, default=16)
    takes("--images", type=int, default=4096)
    takes("--batch", type=int, default=32)
    takes("--steps", type=int, default=200)
    takes("--window", type=int, default=20, help="steps that are averaged")
    takes("--seeds", type=int, default=4)
    takes("--lr", type=float, default=3e-4)
    takes("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    takes("--residual-precision", choices=("auto", "bf16", "fp32"), default="auto")
    takes("--compile", choices=("false", "blocks", "model"), default="blocks")
    takes("--device", default="auto")
    add_record(parser)
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 2:
        parser.error("--seeds is below 2: one seed has no spread")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    curves: dict[str, list[list[float]]] = {"engine": [], "plain": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, chosen.preset, chosen.images, chosen.classes)
        for seed in range(chosen.seeds):
            curves["engine"].append(engine_curve(configure(chosen, folder, seed, plain=False)))
            curves["plain"].append(plain_curve(configure(chosen, folder, seed, plain=True)))
            print(
                f"seed {seed}: engine {curves['engine'][-1][-1]:.4f}, plain {curves['plain'][-1][-1]:.4f}", flush=True
            )
    verdict = compare(curves["engine"], curves["plain"], chosen.window)
    told = "within" if verdict["passed"] else "NOT within"
    print(f"{told} the spread of seeds: the largest deviation is {verdict['largest_ratio']:.2f} of it")
    if chosen.output:
        settings = {name: value for name, value in vars(chosen).items() if name not in ("output", "commit")}
        content = {
            "kind": KIND,
            "version": VERSION,
            "environment": environment(find_device(chosen.device), chosen.commit),
        }
        content |= {"settings": settings, **rounded(verdict), "curves": curves}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(content) + "\n")
    return int(not verdict["passed"])


if __name__ == "__main__":
    sys.exit(main())
