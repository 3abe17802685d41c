"""The demo: tokenizer, HMAR and VAR trained on handwritten digits at 32 px within minutes, then measured and drawn.

``run`` trains four stages with the engine that every other run uses (tokenizer, HMAR next-scale, HMAR masked, VAR), all
on the training digits, and judges the results with a support vector machine trained on the same real digits:

* reconstructions are those of held-out digits, and count when the classifier names the digit that the file says;
* generated digits count when the classifier names the class that was asked for. All of them count, from one fixed seed.

HMAR's two stages together and VAR get the same number of training steps with the same batch size, so both see the same
number of images. Both are sampled as they are, without guidance and truncation, which would hide what they have not
learned. Read next: ``train.py``, ``generate.py``.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

try:
    from hmar import figures
    from hmar.classifier import PixelClassifier, coarse_pixels
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demo needs scikit-learn and matplotlib, and {error.name} is not installed: pip install 'hmar[demo]'.",
        name=error.name,
    ) from error

from hmar.checkpoint import load_model, load_tokenizer
from hmar.data import Digits
from hmar.edit import KnownImage, box_hole, paint
from hmar.generate import GenerationOutput, SamplingConfig, even_schedule, generate_hmar, generate_var, resolve_schedule
from hmar.model import HMAR
from hmar.processes import find_device
from hmar.progress import loss_curve
from hmar.pyramid import Pyramid
from hmar.recipe import DataConfig, OptimizerConfig, TrainConfig
from hmar.tokenizer import Tokenizer
from hmar.train import train

STAGES = ("tokenizer", "next-scale", "masked", "var")


@dataclass(frozen=True)
class Plan:
    """The numbers of a demo. The steps of VAR are those of HMAR's two stages together."""

    tokenizer_steps: int = 600
    next_scale_steps: int = 400
    masked_steps: int = 200
    tokenizer_batch_size: int = 32
    batch_size: int = 64  # of HMAR and VAR
    lr: float = 2e-3
    images_per_class: int = 50
    preset: str = "digits-32"
    seed: int = 0
    cfg: float = 0.0  # no guidance and no truncation: the models' own distributions
    top_p: float = 0.0

    @property
    def steps(self) -> dict[str, int]:
        return {
            "tokenizer": self.tokenizer_steps,
            "next-scale": self.next_scale_steps,
            "masked": self.masked_steps,
            "var": self.next_scale_steps + self.masked_steps,
        }

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(cfg=self.cfg, top_p=self.top_p, seed=self.seed)


FULL = Plan()
QUICK = Plan(
    tokenizer_steps=6,
    next_scale_steps=3,
    masked_steps=2,
    tokenizer_batch_size=16,
    batch_size=16,
    images_per_class=2,
)


def run(
    output: str | Path = "reports/demo",
    *,
    run_folder: str | Path = "runs/demo",
    device: str = "auto",
    quick: bool = False,
    resume: bool | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train everything, then write pictures, a table and summary.json to ``output``. Returns the summary.

    Args:
        run_folder: where the four training runs, their checkpoints and logs go.
        device: "auto", "cpu" or "cuda".
        quick: a few steps of everything, to see that it works; the digits are not recognisable.
        resume: None goes on with an earlier demo that was interrupted and starts anew after one that was finished; True
            keeps a finished one too and only measures and draws again; False starts anew.
        progress: show progress on stderr.

    Raises ValueError for bad input and ``hmar.train.Interrupted`` after SIGINT or SIGTERM; the same call then goes on
    where it stopped.
    """
    plan = QUICK if quick else FULL
    console = Console(stderr=True, quiet=not progress, highlight=False)
    where = find_device(device)
    ledger = Ledger(Path(run_folder), {**dataclasses.asdict(plan), "device": where.type})
    ledger.open(resume, console)
    if quick:
        console.print("quick demo: too few steps for recognisable digits", style="yellow")
    for number, stage in enumerate(STAGES, start=1):
        config = stage_config(plan, stage, Path(run_folder), device)
        console.print(f"{number}/{len(STAGES) + 1} {stage}: {config.steps} steps of {config.batch_size} images")
        with ledger.timed(stage):
            train(config, resume=Path(config.output_dir).exists(), progress=progress)
    console.print(f"{len(STAGES) + 1}/{len(STAGES) + 1} measuring and drawing")
    with ledger.timed("measuring and drawing"):
        results = measure_all(plan, Path(run_folder), where)
        rows = table_rows(plan, results)
        _write_table(Path(output), rows, table_notes(plan, results, where))
        draw(plan, results, Path(run_folder), Path(output))
    summary = summarise(plan, results, rows, where)
    summary |= {"seconds": round(ledger.seconds, 1), "seconds_of": ledger.rounded()}
    _write_json(Path(output) / "summary.json", summary)
    ledger.finish()
    console.print(f"\n{(Path(output) / 'table.md').read_text(encoding='utf-8')}", soft_wrap=True)
    console.print(f"{summary['seconds']:.0f} seconds; pictures, table and summary.json are in {output}")
    return summary


def stage_config(plan: Plan, stage: str, run_folder: Path, device: str = "auto") -> TrainConfig:
    """The training run of one stage, as ``hmar train`` would take it."""
    on_codes = stage != "tokenizer"
    return TrainConfig(
        stage=stage,
        output_dir=str(run_folder / stage),
        preset=plan.preset,
        steps=plan.steps[stage],
        batch_size=plan.batch_size if on_codes else plan.tokenizer_batch_size,
        seed=plan.seed,
        data=DataConfig(name="digits"),
        optimizer=OptimizerConfig(lr=plan.lr),
        **weights_before(stage, run_folder),
        cache_codes=on_codes,
        device=device,
        precision="fp32",  # on a GPU these small steps wait for launches, and autocast doubles those
        log_every=max(1, min(5, plan.steps[stage] // 10)),
        checkpoint_every=100,
        keep=1,
    )


def weights_before(stage: str, run_folder: Path) -> dict[str, str]:
    """The arguments of TrainConfig that name what a stage builds on, with a folder for each stage in `run_folder`."""
    tokenizer = {} if stage == "tokenizer" else {"tokenizer_weights": str(run_folder / "tokenizer")}
    return tokenizer | ({"next_scale_weights": str(run_folder / "next-scale")} if stage == "masked" else {})


# --- measuring --------------------------------------------------------------------------------------------------------


DIGIT_SIDE = 8  # in pixels, of the digits before they were enlarged, and as the classifier sees them


def digit_classifier(size: int) -> PixelClassifier:
    """Names digits by their 8 x 8 grey pixels; trained on the real training digits at the demo's size."""
    return PixelClassifier(*all_images(Digits(size, "train")), DIGIT_SIDE, grey=True)


def digit_features(images_N3HW: Tensor) -> Tensor:
    """What the classifier sees of digits in [-1, 1]: [N, 64] numbers from 0 to 1."""
    return torch.from_numpy(coarse_pixels(images_N3HW, DIGIT_SIDE, grey=True))


def all_images(dataset: Digits) -> tuple[Tensor, Tensor]:
    """Every image and class of a data set: [N, 3, H, W] and int64 [N]."""
    images, classes = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(classes)


def diversity(images_N3HW: Tensor, classes_N: Tensor) -> float:
    """Mean distance between two images of one class, in the classifier's features; 0 if all are equal."""
    features = digit_features(images_N3HW)
    distances = [torch.pdist(features[classes_N == c]) for c in classes_N.unique()]
    return torch.cat(distances).mean().item()


def novelty(images_N3HW: Tensor, training_M3HW: Tensor) -> float:
    """Mean distance from an image to the training digit nearest to it, in the classifier's features; 0 for copies."""
    return torch.cdist(digit_features(images_N3HW), digit_features(training_M3HW)).min(dim=1).values.mean().item()


@dataclass(frozen=True)
class Measured:
    """One way to generate, on the same classes and seeds as every other."""

    name: str
    images_N3HW: Tensor
    named_N: Tensor  # what the classifier calls them
    accuracy: float
    seconds_per_image: float
    passes: int  # through the transformer for an image


def measure(
    name: str,
    generate: Callable[[Tensor], GenerationOutput],
    classes_N: Tensor,
    classifier: PixelClassifier,
    passes: int,
) -> Measured:
    """Generate one image for each class index, all in one batch, and let the classifier name them."""
    generate(classes_N[:2])  # the first call pays for memory and kernels
    _synchronize(classes_N.device)
    start = time.perf_counter()
    images_N3HW = generate(classes_N).images_BCHW
    _synchronize(classes_N.device)
    seconds = (time.perf_counter() - start) / len(classes_N)
    named_N = classifier(images_N3HW)
    return Measured(name, images_N3HW.cpu(), named_N, _share(named_N == classes_N.cpu()), seconds, passes)


def schedules(pyramid: Pyramid) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Schedules with more and more masked passes, by name, from none to one token a pass."""
    found = {"no masked passes": resolve_schedule(pyramid, "none"), "default": resolve_schedule(pyramid, "default")}
    largest = max(pyramid.sizes)
    for passes in (2, 4, 8, largest):
        name = "one token a pass" if passes == largest else f"{passes} passes a scale"
        found.setdefault(name, even_schedule(pyramid, passes))
    return dict(sorted(found.items(), key=lambda item: sum(map(len, item[1]))))


@dataclass(frozen=True)
class Edited:
    """Held-out digits with the same part painted anew by HMAR."""

    name: str
    digits: int
    named_as_before: float  # painted without a class: the share that the classifier names as the whole digit
    named_as_itself: float  # painted as the class that it is
    named_as_another: float  # painted as another class: the share that the classifier names as that
    known_error: float  # mean squared difference to the real digits outside of the hole, painted without a class
    decoded_error: float  # the same for the whole digits through the tokenizer
    shown_C3HW: Tensor  # one digit: whole, with its hole, three times without a class, then as every class
    wrong_C: Tensor  # which of these the classifier does not name as asked


def holes(size: int) -> dict[str, Tensor]:
    """What is painted anew, by name: bool [size, size]."""
    half, quarter = size // 2, size // 4
    middle_HW = box_hole(size, size, (quarter, quarter, size - quarter, size - quarter))
    return {
        "lower half": box_hole(size, size, (0, half, size, size)),
        "right half": box_hole(size, size, (half, 0, size, size)),
        "the middle": middle_HW,
        "all around the middle": ~middle_HW,
    }


def measure_edits(
    plan: Plan,
    model: HMAR,
    tokenizer: Tokenizer,
    classifier: PixelClassifier,
    real_N3HW: Tensor,
    real_classes_N: Tensor,
) -> list[Edited]:
    """Every hole in the same digits, at most 20 of each class, painted once each way."""
    device = tokenizer.quantizer.codebook.weight.device
    count = min(20, plan.images_per_class)
    chosen = torch.cat([(real_classes_N == digit).nonzero()[:count, 0] for digit in range(10)])
    images_N3HW, classes_N = real_N3HW[chosen], real_classes_N[chosen]
    others_N = (classes_N + 1 + torch.arange(len(classes_N)) % 9) % 10
    every_class = torch.arange(10, device=device)
    decoded_N3HW = reconstruct(tokenizer, images_N3HW.to(device)).cpu()
    edits = []
    for row, (name, hole_HW) in enumerate(holes(tokenizer.image_size).items()):
        known = KnownImage(tokenizer, images_N3HW, hole_HW)
        painted_N3HW = paint(model, known, sampling=plan.sampling).images_BCHW.cpu()
        as_itself_N3HW, as_another_N3HW = (
            paint(model, known, asked_N.to(device), plan.sampling).images_BCHW for asked_N in (classes_N, others_N)
        )

        digit = (classes_N == 2 * row + 1).nonzero()[0]  # the first 1, 3, 5 and 7
        one = KnownImage(tokenizer, images_N3HW[digit].expand(10, -1, -1, -1), hole_HW)
        as_classes_N3HW = paint(model, one, every_class, plan.sampling).images_BCHW.cpu()
        freely_N3HW = paint(model, one, sampling=plan.sampling).images_BCHW[:3].cpu()
        shown = [images_N3HW[digit], one.blanked_BCHW[:1].cpu(), freely_N3HW, as_classes_N3HW]
        wrong_N = classifier(as_classes_N3HW) != torch.arange(10)
        edits.append(
            Edited(
                name=name,
                digits=len(classes_N),
                named_as_before=_share(classifier(painted_N3HW) == classes_N),
                named_as_itself=_share(classifier(as_itself_N3HW) == classes_N),
                named_as_another=_share(classifier(as_another_N3HW) == others_N),
                known_error=F.mse_loss(painted_N3HW[:, :, ~hole_HW], images_N3HW[:, :, ~hole_HW]).item(),
                decoded_error=F.mse_loss(decoded_N3HW[:, :, ~hole_HW], images_N3HW[:, :, ~hole_HW]).item(),
                shown_C3HW=torch.cat(shown),
                wrong_C=torch.cat([torch.zeros(5, dtype=torch.bool), wrong_N]),
            )
        )
    return edits


@dataclass(frozen=True)
class Results:
    """Everything that the table, the pictures and the summary are made of."""

    tokenizer: Tokenizer
    real_N3HW: Tensor  # all held-out digits
    real_classes_N: Tensor
    decoded_N3HW: Tensor  # their reconstructions
    real_accuracy: float  # share that the classifier names rightly
    decoded_accuracy: float
    asked_N: Tensor  # classes of the generated digits
    by_schedule: dict[str, Measured]  # HMAR
    var: Measured
    edits: list[Edited]
    hmar_parameters: int
    var_parameters: int

    @property
    def default(self) -> Measured:
        return self.by_schedule["default"]


def measure_all(plan: Plan, run_folder: Path, device: torch.device) -> Results:
    """Load what the runs have written, reconstruct the held-out digits and generate with every model and schedule."""
    tokenizer = load_tokenizer(run_folder / "tokenizer", device=device)
    hmar = load_model(run_folder / "masked", device=device)
    var = load_model(run_folder / "var", device=device)
    classifier = digit_classifier(tokenizer.image_size)
    real_N3HW, real_classes_N = all_images(Digits(tokenizer.image_size, "test"))
    decoded_N3HW = reconstruct(tokenizer, real_N3HW.to(device)).cpu()
    asked_N = torch.arange(10, device=device).repeat_interleave(plan.images_per_class)

    def with_schedule(schedule: tuple[tuple[int, ...], ...]) -> Callable[[Tensor], GenerationOutput]:
        sampling = dataclasses.replace(plan.sampling, schedule=schedule)
        return lambda class_B: generate_hmar(hmar, tokenizer, class_B, sampling)

    by_schedule = {
        name: measure(name, with_schedule(schedule), asked_N, classifier, passes=sum(map(len, schedule)))
        for name, schedule in schedules(tokenizer.pyramid).items()
    }
    of_var = measure(
        "VAR",
        lambda class_B: generate_var(var, tokenizer, class_B, plan.sampling),
        asked_N,
        classifier,
        passes=tokenizer.pyramid.num_scales,
    )
    return Results(
        tokenizer=tokenizer,
        real_N3HW=real_N3HW,
        real_classes_N=real_classes_N,
        decoded_N3HW=decoded_N3HW,
        real_accuracy=_share(classifier(real_N3HW) == real_classes_N),
        decoded_accuracy=_share(classifier(decoded_N3HW) == real_classes_N),
        asked_N=asked_N.cpu(),
        by_schedule=by_schedule,
        var=of_var,
        edits=measure_edits(plan, hmar, tokenizer, classifier, real_N3HW, real_classes_N),
        hmar_parameters=sum(p.numel() for p in hmar.parameters()),
        var_parameters=sum(p.numel() for p in var.parameters()),
    )


def table_rows(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """The demo's one table: real digits, HMAR with more and more masked passes, VAR."""
    training_N3HW, _ = all_images(Digits(results.tokenizer.image_size, "train"))
    spread = diversity(results.real_N3HW, results.real_classes_N)
    newness = novelty(results.real_N3HW, training_N3HW)

    def relative(images_N3HW: Tensor, classes_N: Tensor) -> dict[str, float]:
        return {
            "diversity": round(diversity(images_N3HW, classes_N) / spread, 3),
            "novelty": round(novelty(images_N3HW, training_N3HW) / newness, 3),
        }

    def of_real(name: str, images_N3HW: Tensor, accuracy: float) -> dict[str, Any]:
        unlike = dict.fromkeys(("passes", "seconds per image", "parameters", "training steps"))
        return {
            "digits": name,
            "class accuracy": accuracy,
            **relative(images_N3HW, results.real_classes_N),
            **unlike,
        }

    def generated(name: str, measured: Measured, parameters: int, steps: str) -> dict[str, Any]:
        return {
            "digits": name,
            "class accuracy": measured.accuracy,
            **relative(measured.images_N3HW, results.asked_N),
            "passes": measured.passes,
            "seconds per image": float(f"{measured.seconds_per_image:.3g}"),
            "parameters": parameters,
            "training steps": steps,
        }

    next_scale = f"{plan.next_scale_steps} next-scale"
    both = f"{next_scale} + {plan.masked_steps} masked"
    special = {
        "no masked passes": ("HMAR without masked passes", next_scale),
        "default": ("HMAR, default schedule", both),
    }
    by_schedule = [
        (*special.get(name, (f"HMAR, {name}", both)), measured) for name, measured in results.by_schedule.items()
    ]
    return [
        of_real("real, held out", results.real_N3HW, results.real_accuracy),
        of_real("real, through the tokenizer", results.decoded_N3HW, results.decoded_accuracy),
        *(generated(name, measured, results.hmar_parameters, steps) for name, steps, measured in by_schedule),
        generated("VAR", results.var, results.var_parameters, str(plan.steps["var"])),
    ]


def table_notes(plan: Plan, results: Results, device: torch.device) -> list[str]:
    """What the columns mean and how the numbers came about."""
    guidance = f"guidance {plan.cfg:g}" if plan.cfg else "no guidance"
    top_p = f"top-p {plan.top_p:g}" if plan.top_p else "no truncation"
    return [
        f"{len(results.asked_N)} generated digits a row, {plan.images_per_class} of each class, seed {plan.seed}, none "
        f"left out; {len(results.real_classes_N)} real digits that no model was trained on.",
        "Class accuracy: the share that a support vector machine, trained on real digits, names as the class that was "
        "asked for, or that the real digit has.",
        "Diversity: mean distance between two digits of a class; novelty: mean distance from a digit to the training "
        "digit nearest to it. Both relative to real held-out digits: 0 for one digit again and again, or for copies.",
        "Passes: how often an image goes through the transformer. HMAR's parameters include its mask blocks.",
        f"Seconds per image: {device_name(device)}, one batch of {len(results.asked_N)}, decoding included.",
        f"Budget: a step is a batch of {plan.batch_size} images, and HMAR's two stages together take as many steps as "
        f"VAR, {plan.steps['var']}. Both sample with {guidance} and {top_p}.",
    ]


def summarise(plan: Plan, results: Results, rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """summary.json without the times of the training."""
    return {
        "hmar_class_accuracy": results.default.accuracy,
        "var_class_accuracy": results.var.accuracy,
        "reconstruction_accuracy": results.decoded_accuracy,
        "classifier_accuracy_on_real_digits": results.real_accuracy,
        "reconstruction_mean_squared_error": F.mse_loss(results.decoded_N3HW, results.real_N3HW).item(),
        "held_out_digits": len(results.real_classes_N),
        "generated_digits": len(results.asked_N),
        "table": rows,
        "masked_steps": [
            {
                "schedule": name,
                "codes_per_pass": [list(scale) for scale in schedule],
                "passes": results.by_schedule[name].passes,
                "class_accuracy": results.by_schedule[name].accuracy,
                "seconds_per_image": results.by_schedule[name].seconds_per_image,
            }
            for name, schedule in schedules(results.tokenizer.pyramid).items()
        ],
        "edits": [
            {
                "painted": edited.name,
                "digits": edited.digits,
                "without_class_named_as_before": edited.named_as_before,
                "as_itself_named_as_asked": edited.named_as_itself,
                "as_another_class_named_as_asked": edited.named_as_another,
                "mean_squared_error_outside": edited.known_error,
                "mean_squared_error_outside_of_the_tokenizer_alone": edited.decoded_error,
            }
            for edited in results.edits
        ],
        "accuracy_by_class": {
            name: [_share((measured.named_N == results.asked_N)[results.asked_N == digit]) for digit in range(10)]
            for name, measured in (("hmar", results.default), ("var", results.var))
        },
        "plan": dataclasses.asdict(plan),
        "training_steps": plan.steps,
        "machine": machine_record(device),
    }


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images_N3HW: Tensor) -> Tensor:
    """Images encoded to codes and decoded again."""
    return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images_N3HW.split(128)])


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(plan: Plan, results: Results, run_folder: Path, output: Path) -> None:
    """All pictures of the demo."""
    real_N3HW, real_classes_N, tokenizer = results.real_N3HW, results.real_classes_N, results.tokenizer
    digits = [str(digit) for digit in range(10)]
    first_two = torch.stack([(real_classes_N == digit).nonzero()[:2, 0] for digit in range(10)], dim=1)
    pairs = [images[chosen] for chosen in first_two for images in (real_N3HW, results.decoded_N3HW)]
    figures.save(
        figures.image_grid(
            torch.stack(pairs),
            title="Digits the tokenizer has not seen, and what it makes of them",
            row_labels=["real", "decoded"] * 2,
            column_labels=digits,
            row_gaps=[2],
            note=f"The first two held-out digits of each class. Of all {len(real_classes_N)} decoded ones, the "
            f"classifier names {results.decoded_accuracy:.1%} rightly.",
        ),
        output / "reconstruction.png",
    )
    for name, measured in (("HMAR", results.default), ("VAR", results.var)):
        figures.save(_digits_by_class(name, measured, plan), output / f"generated_{name.lower()}.png")
    figures.save(_more_passes(results.by_schedule, plan), output / "masked_steps.png")
    figures.save(_edits(results.edits), output / "edits.png")
    curve = {stage: loss_curve(run_folder / stage) for stage in STAGES}
    figures.save(
        figures.loss_curves(
            {
                "Tokenizer: image and codebook loss": {"tokenizer": curve["tokenizer"]},
                "Next-scale prediction: cross-entropy": {"HMAR, stage 1": curve["next-scale"], "VAR": curve["var"]},
                "Masked prediction: cross-entropy": {"HMAR, stage 2": curve["masked"]},
            },
            title="Training losses",
            note="HMAR's next-scale loss weights the middle scales more, VAR's weights all tokens alike: compare each "
            "with itself.",
        ),
        output / "loss_curves.png",
    )
    pyramid = tokenizer.pyramid
    size = tokenizer.image_size
    figures.save(
        figures.masks(
            {f"{size} px": pyramid, "256 px": Pyramid.for_resolution(256)},
            title="Which tokens see which: the demo's pyramid and the one for 256 px",
        ),
        output / "masks.png",
    )
    chosen = real_N3HW[first_two[0, 3:4]].to(tokenizer.quantizer.codebook.weight.device)
    with torch.no_grad():
        stages = [tokenizer.decode_f_hat(f_hat)[0] for f_hat in tokenizer.quantizer.f_hats(tokenizer.encode(chosen))]
    figures.save(
        figures.pyramid(
            torch.stack(stages),
            pyramid,
            title="A held-out digit, decoded after each scale of its codes",
            note="Lines: the token grid of the scale.",
        ),
        output / "pyramid.png",
    )


def _digits_by_class(name: str, measured: Measured, plan: Plan) -> figures.Figure:
    shown = min(10, plan.images_per_class)
    images = measured.images_N3HW.unflatten(0, (10, plan.images_per_class))[:, :shown]
    named = measured.named_N.view(10, plan.images_per_class)[:, :shown]
    wrong = named != torch.arange(10)[:, None]
    return figures.image_grid(
        images,
        title=f"{name}: {measured.accuracy:.1%} of {len(measured.named_N)} digits are named as intended",
        row_labels=[f"asked for {digit}" for digit in range(10)],
        framed_RC=wrong,
        note=f"The first {shown} of each class. Framed: the classifier names another digit ({int(wrong.sum())} shown).",
    )


def _more_passes(by_schedule: dict[str, Measured], plan: Plan) -> figures.Figure:
    first = torch.arange(10) * plan.images_per_class
    rows = list(by_schedule.values())
    wrong = torch.stack([row.named_N[first] != torch.arange(10) for row in rows])
    return figures.image_grid(
        torch.stack([row.images_N3HW[first] for row in rows]),
        title="HMAR: the same seeds with more and more masked passes",
        row_labels=[f"{row.name}\n{row.passes} passes, {row.accuracy:.1%}" for row in rows],
        column_labels=[str(digit) for digit in range(10)],
        framed_RC=wrong,
        note=f"Percentages: digits named as intended, of {len(rows[0].named_N)}."
        + (" Framed: the classifier names another." if wrong.any() else ""),
    )


def _edits(edits: Sequence[Edited]) -> figures.Figure:
    wrong = torch.stack([edited.wrong_C for edited in edits])
    return figures.image_grid(
        torch.stack([edited.shown_C3HW for edited in edits]),
        title="HMAR paints a part of held-out digits, without being trained for it",
        row_labels=[f"{edited.name}\n{edited.named_as_itself:.0%} / {edited.named_as_another:.0%}" for edited in edits],
        column_labels=["real", "hole", "painted", "without", "a class", *(f"as {digit}" for digit in range(10))],
        framed_RC=wrong,
        note="The hole is filled with the colours around it before the tokenizer sees the digit. Percentages: how many "
        f"of {edits[0].digits} digits\nthe classifier names as asked, painted as the class that they are / as another."
        + (" Framed: it names another class than the one asked for." if wrong.any() else ""),
    )


# --- files ------------------------------------------------------------------------------------------------------------


class Ledger:
    """demo.json in the run folder: the plan that the runs there follow, time spent on each part, whether finished."""

    def __init__(self, folder: Path, plan: dict[str, Any]):
        self.folder, self.path, self.plan = folder, folder / "demo.json", plan
        self.seconds_of: dict[str, float] = {}

    def open(self, resume: bool | None, console: Console) -> None:
        """Go on with the runs in the folder or delete them; ValueError for runs that are no demo's."""
        if not self.path.exists():
            found = [stage for stage in STAGES if (self.folder / stage).exists()]
            if found:
                raise ValueError(
                    f"{self.folder} holds {', '.join(found)} but no demo.json: not a demo's folder; give another"
                )
            self._write(finished=False)
            return
        saved = json.loads(self.path.read_text(encoding="utf-8"))
        same = saved["plan"] == self.plan
        if resume and not same:
            raise ValueError(f"the demo in {self.folder} was run with other settings; leave out resume to start anew")
        if resume or (resume is None and same and not saved["finished"]):
            self.seconds_of = saved["seconds_of"]
            self.seconds_of.pop("measuring and drawing", None)
            console.print(f"going on with the demo in {self.folder}")
        else:
            for stage in STAGES:
                shutil.rmtree(self.folder / stage, ignore_errors=True)
        self._write(finished=False)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a part, also of one that is interrupted and continued later."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_of[part] = self.seconds_of.get(part, 0.0) + time.perf_counter() - start
            self._write(finished=False)

    def finish(self) -> None:
        self._write(finished=True)

    @property
    def seconds(self) -> float:
        return sum(self.seconds_of.values())

    def rounded(self) -> dict[str, float]:
        return {part: round(seconds, 1) for part, seconds in self.seconds_of.items()}

    def _write(self, finished: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.path, {"plan": self.plan, "seconds_of": self.seconds_of, "finished": finished})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _write_table(output: Path, rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    texts = [{name: _cell(name, value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(text[name]) for text in texts)) for name in rows[0]}

    def line(cells: dict[str, str]) -> str:
        first, *rest = widths
        padded = [cells[first].ljust(widths[first]), *(cells[name].rjust(widths[name]) for name in rest)]
        return f"| {' | '.join(padded)} |"

    rule = [f":{'-' * (width - 1)}" if i == 0 else f"{'-' * (width - 1)}:" for i, width in enumerate(widths.values())]
    lines = [line({name: name for name in widths}), f"| {' | '.join(rule)} |", *map(line, texts)]
    (output / "table.md").write_text(
        "\n".join(lines) + "\n\n" + "\n".join(f"* {note}" for note in notes) + "\n", encoding="utf-8"
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name == "class accuracy" else f"{value:,}" if name == "parameters" else str(value)


def _share(right_N: Tensor) -> float:
    return round(right_N.float().mean().item(), 4)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or how many CPU cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def machine_record(device: torch.device) -> dict[str, Any]:
    """What a number was measured with: date, commit, device and versions, for a summary.json."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }


def _commit() -> str | None:
    """The commit of the source tree, or None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
