"""A short run at 256 px: tokenizer and a small HMAR on crops of real photographs, for one GPU.

    python -m hmar.photographs            # about seven minutes on an H100

trains the preset photos-256-small (pyramid of 680 tokens) with the engine of every other run, then writes to
reports/photographs: reconstructions of crops that were not trained on, generated crops of every photograph, loss
curves, and summary.json. The class of a crop is the photograph it was cut from; a support vector machine trained on
real crops, shrunk to 16 x 16 pixels, says how many generated crops look like the photograph that was asked for.

The photographs are sixteen, so this shows that the system works at full resolution; it is not a generative model of
photographs at large. Interrupted, the same command goes on where it stopped. Read next: demo.py, train.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hmar import figures
from hmar.checkpoint import load_model, load_tokenizer
from hmar.classifier import PixelClassifier
from hmar.data import Photographs
from hmar.demo import machine_record, reconstruct, weights_before
from hmar.generate import SamplingConfig, generate_hmar
from hmar.processes import find_device
from hmar.progress import loss_curve, read_metrics
from hmar.recipe import DataConfig, OptimizerConfig, TrainConfig
from hmar.train import train

STAGES = ("tokenizer", "next-scale", "masked")
PHOTOGRAPH_INCHES = 1.15  # side of a crop in the pictures


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run."""

    tokenizer_steps: int = 1300
    next_scale_steps: int = 1300
    masked_steps: int = 400
    tokenizer_batch: int = 16
    model_batch: int = 48
    tokenizer_lr: float = 4e-4
    model_lr: float = 6e-4
    crops_per_class: int = 4
    workers: int = 12
    seed: int = 0
    cfg: float = 2.0
    top_p: float = 0.9

    def steps(self, stage: str) -> int:
        return {
            "tokenizer": self.tokenizer_steps,
            "next-scale": self.next_scale_steps,
            "masked": self.masked_steps,
        }[stage]


QUICK = Plan(
    tokenizer_steps=2,
    next_scale_steps=2,
    masked_steps=2,
    tokenizer_batch=2,
    model_batch=2,
    crops_per_class=1,
    workers=0,
)


def run(
    output: str | Path = "reports/photographs",
    *,
    run_folder: str | Path = "runs/photographs",
    plan: Plan | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Train what `run_folder` does not hold yet, then measure and draw. Returns the summary."""
    plan, output, run_folder = plan or Plan(), Path(output), Path(run_folder)
    console = Console(stderr=True, quiet=not progress, highlight=False)
    where = find_device(device)
    for stage in STAGES:
        train(stage_config(plan, stage, run_folder, device), resume=(run_folder / stage).exists(), progress=progress)

    console.print("measuring and drawing")
    tokenizer = load_tokenizer(run_folder / "tokenizer", device=where)
    hmar = load_model(run_folder / "masked", device=where)
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda")
    real_N3HW, classes_N = crops(Photographs(tokenizer.image_size, "test", seed=plan.seed), per_class=2)
    asked_N = torch.arange(Photographs.num_classes).repeat_interleave(plan.crops_per_class)
    sampling = SamplingConfig(cfg=plan.cfg, top_p=plan.top_p, seed=plan.seed)
    with autocast:
        decoded_N3HW = reconstruct(tokenizer, real_N3HW.to(where)).float().cpu()
        generated_N3HW = torch.cat(
            [
                generate_hmar(hmar, tokenizer, part.to(where), sampling, first_image=first).images_BCHW.float().cpu()
                for first, part in zip(range(0, len(asked_N), 32), asked_N.split(32), strict=True)
            ]
        )
    classifier = crop_classifier(plan.seed)
    named_N = classifier(generated_N3HW)
    summary = {
        "class_accuracy": (named_N == asked_N).float().mean().item(),
        "classifier_accuracy_on_real_crops": (classifier(real_N3HW) == classes_N).float().mean().item(),
        "reconstruction_accuracy": (classifier(decoded_N3HW) == classes_N).float().mean().item(),
        "reconstruction_psnr_db": psnr(decoded_N3HW, real_N3HW),
        "generated_crops": len(asked_N),
        "tokens": tokenizer.pyramid.length,
        "plan": dataclasses.asdict(plan),
        "images_per_second": {stage: images_per_second(run_folder / stage) for stage in STAGES},
        "parameters": {
            "tokenizer": sum(p.numel() for p in tokenizer.parameters()),
            "hmar": sum(p.numel() for p in hmar.parameters()),
        },
        "machine": machine_record(where),
    }
    draw(run_folder, output, real_N3HW, decoded_N3HW, generated_N3HW, named_N != asked_N, summary)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(json.dumps(summary, indent=2), soft_wrap=True)
    return summary


def stage_config(plan: Plan, stage: str, run_folder: Path, device: str = "auto") -> TrainConfig:
    """The training run of one stage, as `hmar train` would take it."""
    on_codes = stage != "tokenizer"
    return TrainConfig(
        stage=stage,
        output_dir=str(run_folder / stage),
        preset="photos-256-small",
        steps=plan.steps(stage),
        batch_size=plan.model_batch if on_codes else plan.tokenizer_batch,
        seed=plan.seed,
        data=DataConfig(name="photographs", workers=plan.workers),
        optimizer=OptimizerConfig(lr=plan.model_lr if on_codes else plan.tokenizer_lr),
        **weights_before(stage, run_folder),
        device=device,
        ema=0.99 if plan.steps(stage) >= 500 else 0.0,
        log_every=max(1, min(20, plan.steps(stage) // 10)),
        keep=1,
    )


def crop_classifier(seed: int, per_class: int = 60) -> PixelClassifier:
    """Names crops by 16 x 16 pixels; trained on so many real crops of each photograph."""
    return PixelClassifier(*crops(Photographs(64, "train", seed=seed), per_class), side=16)


def crops(dataset: Photographs, per_class: int) -> tuple[Tensor, Tensor]:
    """The first crops of every photograph, sorted by class: [N, 3, H, W] and int64 [N]."""
    images, classes = zip(*(dataset[i] for i in range(per_class * dataset.num_classes)), strict=True)
    order = torch.tensor(classes).argsort(stable=True)
    return torch.stack(images)[order], torch.tensor(classes)[order]


def images_per_second(run: Path) -> float:
    """Median throughput of a training run; resuming it does not change what was measured before."""
    return round(statistics.median(row["images_per_second"] for row in read_metrics(run / "metrics.jsonl")), 1)


def psnr(decoded_N3HW: Tensor, real_N3HW: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB, of images in [-1, 1]."""
    error_N = (decoded_N3HW - real_N3HW).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error_N)).mean().item()


def draw(
    run_folder: Path,
    output: Path,
    real_N3HW: Tensor,
    decoded_N3HW: Tensor,
    generated_N3HW: Tensor,
    wrong_N: Tensor,
    summary: dict[str, Any],
) -> None:
    """reconstruction.jpg, generated.jpg and loss_curves.png."""
    names = Photographs.class_names
    half = len(names) // 2
    rows = [images[2 * first : 2 * first + 2 * half : 2] for first in (0, half) for images in (real_N3HW, decoded_N3HW)]
    figures.save(
        figures.image_grid(
            torch.stack(rows),
            title="Crops at 256 px that were not trained on, and what the tokenizer makes of them",
            row_labels=["real", "decoded"] * 2,
            row_gaps=[2],
            note=f"{summary['tokens']} codes an image; mean PSNR {summary['reconstruction_psnr_db']:.1f} dB over "
            f"{len(real_N3HW)} crops, one of each photograph shown.",
            cell_inches=PHOTOGRAPH_INCHES,
        ),
        output / "reconstruction.jpg",
    )
    by_class = generated_N3HW.unflatten(0, (len(names), -1))
    wrong = wrong_N.unflatten(0, (len(names), -1))
    columns = by_class.shape[1]
    figures.save(
        figures.image_grid(
            torch.cat([by_class[:half], by_class[half:]], dim=1),
            title=f"HMAR at 256 px: {summary['class_accuracy']:.1%} of {len(wrong_N)} crops are named as intended",
            row_labels=[f"{a},\n{b}" for a, b in zip(names[:half], names[half:], strict=True)],
            framed_RC=torch.cat([wrong[:half], wrong[half:]], dim=1),
            note=f"Left {columns} columns: the first class of the label; right {columns}: the second. None left out. "
            "Framed: the classifier names another photograph.",
            cell_inches=PHOTOGRAPH_INCHES,
        ),
        output / "generated.jpg",
    )
    curves = {stage: loss_curve(run_folder / stage) for stage in STAGES}
    figures.save(
        figures.loss_curves(
            {
                "Tokenizer: image and codebook loss": {"tokenizer": curves["tokenizer"]},
                "Next-scale prediction: cross-entropy": {"HMAR, stage 1": curves["next-scale"]},
                "Masked prediction: cross-entropy": {"HMAR, stage 2": curves["masked"]},
            },
            title="Training losses at 256 px",
        ),
        output / "loss_curves.png",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="reports/photographs")
    parser.add_argument("--run-folder", default="runs/photographs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="two steps of everything, to see that it works")
    args = parser.parse_args()
    run(args.output, run_folder=args.run_folder, device=args.device, plan=QUICK if args.quick else None)


if __name__ == "__main__":
    main()
