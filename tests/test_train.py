"""The engine: each stage learns, an interrupted run ends with the same bits, and what goes wrong is said."""

import json
import math
import signal
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import hmar.train
from hmar import checkpoint
from hmar.checkpoint import load_model, load_tokenizer, read_description
from hmar.config import PRESETS
from hmar.flops import training_flops
from hmar.model import HMAR, NextScaleTransformer
from hmar.optimizer import LossScale
from hmar.processes import find_device
from hmar.progress import read_metrics
from hmar.recipe import apply_overrides, make_config, read_config
from hmar.stages import MaskedStage, NextScaleStage, parameter_groups
from hmar.tokenizer import Tokenizer
from hmar.train import (
    Interrupted,
    NonFiniteError,
    Trainer,
    find_precision,
    open_images,
    step_generator,
    train,
)
from run_files import assert_same_bits, weights

CODE_STAGES = ("next-scale", "masked", "var")
STAGES = ("tokenizer", *CODE_STAGES)


def configure(stage, folder, *overrides, runs=None):
    """A tiny run of a stage on digits of 16 pixels, on the weights in `runs`."""
    built_on = []
    if stage in CODE_STAGES:
        built_on.append(f"tokenizer_weights={runs / 'tokenizer'}")
    if stage == "masked":
        built_on.append(f"next_scale_weights={runs / 'next-scale'}")
    base = [f"stage={stage}", f"output_dir={folder}", "preset=tiny", "model.num_classes=10", "device=cpu"]
    size = ["steps=6", "batch_size=8", "log_every=2", "checkpoint_every=100"]
    return make_config(apply_overrides({}, [*base, *size, *built_on, *overrides]))


def run(config, **options):
    return train(config, progress=False, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tokenizer and a stage 1, trained for a moment."""
    folder = tmp_path_factory.mktemp("runs")
    run(configure("tokenizer", folder / "tokenizer", "steps=40", "optimizer.lr=3e-3"))
    run(configure("next-scale", folder / "next-scale", runs=folder))
    return folder


@pytest.fixture
def stop_after(monkeypatch):
    """Makes the process signal itself after a step, as a scheduler or Ctrl-C would."""

    def arm(step, number=signal.SIGTERM):
        advance = Trainer._advance

        def advance_and_signal(self, *arguments):
            advance(self, *arguments)
            if self.step == step:
                signal.raise_signal(number)

        monkeypatch.setattr(Trainer, "_advance", advance_and_signal)

    yield arm
    monkeypatch.undo()


# What each stage draws at random is switched on, so that a generator that is not restored shows.
RESUMED = {
    "tokenizer": (
        "tokenizer.dropout=0.1",
        "reconstruction.adversarial=0.5",
        "reconstruction.adversarial_start=2",
        "ema=0.9",
    ),
    "next-scale": ("model.drop_path=0.2", "cache_codes=true"),
    "masked": ("model.drop_path=0.2", "ema=0.5", "data.workers=1"),
    "var": ("model.drop_path=0.2", "precision=bf16"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_ends_with_the_same_weights(stage, tmp_path, runs, stop_after, monkeypatch):
    options = (*RESUMED[stage], "steps=7")
    run(configure(stage, tmp_path / "whole", *options, runs=runs))
    config = configure(stage, tmp_path / "parts", *options, runs=runs)
    stop_after(3)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3") as interruption:
        run(config)
    assert interruption.value.signal_number == signal.SIGTERM
    assert not (tmp_path / "parts" / "weights").exists()
    monkeypatch.undo()
    torch.manual_seed(12345)  # another process has other generators
    torch.rand(7)
    result = run(config, resume=True)
    assert result.step == 7
    assert_same_bits(weights(tmp_path / "parts"), weights(tmp_path / "whole"))

    def curve(folder):
        timings = ("images_per_second", "tokens_per_second", "model_tflops_per_second")
        return [{k: v for k, v in row.items() if k not in timings} for row in read_metrics(folder / "metrics.jsonl")]

    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    last = checkpoint.checkpoints(tmp_path / "parts" / "checkpoints")[0]
    whole = checkpoint.checkpoints(tmp_path / "whole" / "checkpoints")[0]
    for entry in ("model", "optimizer", "stage", "ema", "rng", "samples"):
        same = torch.utils._pytree.tree_map(
            lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b,
            checkpoint.load_checkpoint(last)[entry],
            checkpoint.load_checkpoint(whole)[entry],
        )
        assert all(torch.utils._pytree.tree_leaves(same)), entry


@pytest.mark.parametrize("moment", ["last step", "writing"])
def test_a_signal_at_the_end_is_passed_on_after_the_weights_are_written(moment, tmp_path, stop_after, monkeypatch):
    if moment == "last step":
        stop_after(6, signal.SIGINT)
    else:
        save = checkpoint.save_pretrained
        monkeypatch.setattr(
            checkpoint, "save_pretrained", lambda *a, **k: signal.raise_signal(signal.SIGINT) or save(*a, **k)
        )
    with pytest.raises(Interrupted, match=r"stopped by SIGINT after step 6, saved .*weights") as interruption:
        run(configure("tokenizer", tmp_path))
    assert interruption.value.finished and interruption.value.path == tmp_path / "weights"
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
    monkeypatch.undo()
    assert run(configure("tokenizer", tmp_path), resume=True).step == 6


def test_a_crash_after_a_checkpoint_loses_only_what_came_after_it(tmp_path, runs, monkeypatch):
    config = configure("var", tmp_path / "parts", "log_every=1", "checkpoint_every=2", runs=runs)
    run(configure("var", tmp_path / "whole", "log_every=1", runs=runs))
    advance = Trainer._advance

    def crash(self, *arguments):
        if self.step == 5:
            raise MemoryError
        advance(self, *arguments)

    monkeypatch.setattr(Trainer, "_advance", crash)
    with pytest.raises(MemoryError):
        run(config)
    monkeypatch.undo()
    assert [row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    newest = tmp_path / "parts" / "checkpoints" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])  # and the newest checkpoint is damaged
    run(config, resume=True)
    assert_same_bits(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    rows = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")]


def test_a_run_is_resumed_only_as_itself(tmp_path, runs, stop_after, monkeypatch):
    stop_after(2)
    with pytest.raises(Interrupted):
        run(configure("var", tmp_path / "run", runs=runs))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another configuration: seed was 0, now 1"):
        run(configure("var", tmp_path / "run", "seed=1", runs=runs), resume=True)
    with pytest.raises(ValueError, match="another configuration: stage was var, now next-scale"):
        run(configure("next-scale", tmp_path / "run", runs=runs), resume=True)
    with pytest.raises(ValueError, match=r"model.depth was 2, now 3"):
        run(configure("var", tmp_path / "run", "model.depth=3", runs=runs), resume=True)
    run(configure("tokenizer", tmp_path / "tokenizer", "seed=5"))
    with pytest.raises(ValueError, match="not those that the run began with"):
        run(configure("var", tmp_path / "run", runs=tmp_path), resume=True)
    damaged = list((tmp_path / "run" / "checkpoints").iterdir())
    for path in damaged:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        run(configure("var", tmp_path / "run", runs=runs), resume=True)


def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path, runs):
    config = configure("var", tmp_path, "steps=2", runs=runs)
    (tmp_path / "notes.txt").write_text("mine")
    run(config, resume=True)  # nothing to resume: starts from the beginning
    before = weights(tmp_path)
    with pytest.raises(ValueError, match=r"already holds a run .*--resume.*--overwrite"):
        run(config)
    with pytest.raises(ValueError, match="exclude each other"):
        run(config, resume=True, overwrite=True)
    run(config, resume=True)  # complete: nothing changes
    assert_same_bits(weights(tmp_path), before)
    run(configure("var", tmp_path, "steps=2", "seed=1", runs=runs), overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not torch.equal(weights(tmp_path)["head.linear.weight"], before["head.linear.weight"])


def test_a_run_that_failed_before_its_first_checkpoint_is_not_in_the_way(tmp_path, runs, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(NextScaleTransformer, "forward", lambda *inputs, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(configure("var", tmp_path / "run", "seed=3", runs=runs))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.jsonl", "tensorboard"}
    run(configure("var", tmp_path / "run", "steps=2", runs=runs))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert make_config(read_config(tmp_path / "run" / "config.yaml")).seed == 0
    with pytest.raises(ValueError, match="already holds a run"):
        run(configure("var", tmp_path / "run", "steps=2", runs=runs))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a run \(config.yaml\)"):
        run(configure("var", tmp_path / "mine", runs=runs))
    assert (tmp_path / "mine" / "config.yaml").read_text() == "mine"


def test_a_run_that_cannot_begin_writes_nothing(tmp_path, runs):
    with pytest.raises(ValueError, match=r"the data has 10 classes, but model.num_classes=4"):
        run(configure("var", tmp_path / "run", "model.num_classes=4", runs=runs))
    assert not (tmp_path / "run").exists()


def test_the_order_of_images_does_not_depend_on_workers(tmp_path, runs):
    photographs = ("data.name=photographs", "model.num_classes=16", "steps=3", "batch_size=4")
    run(configure("tokenizer", tmp_path / "none", *photographs))
    run(configure("tokenizer", tmp_path / "two", *photographs, "data.workers=2"))
    assert_same_bits(weights(tmp_path / "two"), weights(tmp_path / "none"))


@pytest.mark.parametrize(("stage", "metric"), [(stage, "loss") for stage in STAGES])
def test_each_stage_learns(stage, metric, tmp_path, runs):
    options = ("steps=60", "batch_size=16", "optimizer.lr=3e-3", "log_every=10")
    run(configure(stage, tmp_path, *options, runs=runs))
    losses = [row[metric] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]


def test_what_a_run_leaves_behind(tmp_path, runs):
    result = run(configure("next-scale", tmp_path, runs=runs))
    assert isinstance(load_model(tmp_path), NextScaleTransformer)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "weights"}
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {**rows[-1]} == {"step": 6, **result.metrics}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {"loss", "lr", "grad_norm", "images_per_second", "tokens_per_second", "accuracy"}
    assert logged <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    notes = read_description(tmp_path)
    assert notes["tokenizer_sha256"] == checkpoint.fingerprint(runs / "tokenizer")
    assert notes["class_names"] == [str(digit) for digit in range(10)]


def test_tokenizer_logs_its_parts(tmp_path):
    row = run(configure("tokenizer", tmp_path, "reconstruction.l1=0.5", "reconstruction.l2=2")).metrics
    assert row["loss"] == pytest.approx(0.5 * row["l1"] + 2 * row["l2"] + row["quantizer"], rel=1e-5)
    assert 0 < row["codebook_use"] <= 1


class FeatureDistance(nn.Module):
    """A small stand-in for LPIPS: distance of what a random network sees; dropout would show in training mode."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Dropout(0.5))

    def forward(self, reconstruction, images):
        return (self.features(reconstruction) - self.features(images)).square().mean((1, 2, 3))


def test_a_perceptual_module_is_part_of_the_tokenizers_loss(tmp_path):
    distance = FeatureDistance()
    before = [p.clone() for p in distance.parameters()]
    options = ("reconstruction.perceptual=30", "reconstruction.adversarial=0.5", "optimizer.lr=3e-3", "steps=60")
    result = run(configure("tokenizer", tmp_path / "with", *options, "log_every=10"), perceptual=distance)
    rows = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert rows[-1]["perceptual"] < 0.8 * rows[0]["perceptual"]
    assert all(map(torch.equal, before, distance.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())
    assert "perceptual" not in "".join(weights(tmp_path / "with"))
    assert result.metrics["perceptual"] == rows[-1]["perceptual"]

    row = run(configure("tokenizer", tmp_path / "one", "reconstruction.perceptual=3", "steps=1"), perceptual=distance)
    row = row.metrics
    expected = 0.2 * row["l1"] + row["l2"] + row["quantizer"] + 3 * row["perceptual"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5) and row["perceptual"] > 0
    assert "perceptual" not in run(configure("tokenizer", tmp_path / "without", "steps=1")).metrics


def test_a_run_with_a_perceptual_module_is_resumed_with_it(tmp_path, stop_after, monkeypatch, runs):
    run(configure("tokenizer", tmp_path / "whole"), perceptual=FeatureDistance())
    config = configure("tokenizer", tmp_path / "parts")
    stop_after(3)
    with pytest.raises(Interrupted):
        run(config, perceptual=FeatureDistance())
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"began with a perceptual module and cannot go on without .*perceptual=\.\.\."
    ):
        run(config, resume=True)
    run(config, resume=True, perceptual=FeatureDistance())
    assert_same_bits(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    plain = run(configure("tokenizer", tmp_path / "plain"))
    with pytest.raises(ValueError, match="began without a perceptual module and cannot go on with one"):
        run(configure("tokenizer", tmp_path / "plain"), resume=True, perceptual=FeatureDistance())
    assert "perceptual" not in plain.metrics
    with pytest.raises(ValueError, match="no effect in stage var"):
        run(configure("var", tmp_path / "var", runs=runs), perceptual=FeatureDistance())


def test_the_masked_stage_leaves_the_trunk_alone_and_assembles_hmar(tmp_path, runs):
    run(configure("masked", tmp_path, "ema=0.5", runs=runs))
    hmar, stage_one = load_model(tmp_path), load_model(runs / "next-scale")
    assert isinstance(hmar, HMAR)
    split = PRESETS["tiny"][1].depth - PRESETS["tiny"][1].mask_depth
    expected, actual = stage_one.state_dict(), hmar.state_dict()
    for name, tensor in expected.items():
        if name.startswith("embedding."):
            assert torch.equal(actual[name], tensor), name
    for name, tensor in stage_one.blocks[:split].state_dict().items():
        assert torch.equal(actual[f"trunk.{name}"], tensor), name
    assert torch.equal(actual["next_scale_head.linear.weight"], expected["head.linear.weight"])
    assert not torch.equal(actual["mask_head.linear.weight"], expected["head.linear.weight"])


def test_averaged_weights_are_the_average(tmp_path, runs, monkeypatch):
    seen = []
    advance = Trainer._advance

    def record(self, *arguments):
        advance(self, *arguments)
        seen.append(self.stage.module.head.linear.weight.detach().clone())

    monkeypatch.setattr(Trainer, "_advance", record)
    run(configure("var", tmp_path, "ema=0.75", "optimizer.lr=1e-2", runs=runs))
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(weights(tmp_path)["head.linear.weight"], expected)
    assert not torch.equal(expected, seen[-1])


def test_weight_decay_spares_biases_tables_scales_and_the_codebook():
    _, config = PRESETS["tiny"]
    model = NextScaleTransformer(config)
    tokenizer = Tokenizer(PRESETS["tiny"][0], config.pyramid)
    for module in (model, tokenizer):
        decayed, others = parameter_groups(module, 0.05)
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
        everything = [p for p in module.parameters() if p.requires_grad]
        assert len(decayed["params"]) + len(others["params"]) == len(everything)
        assert {id(p) for p in decayed["params"] + others["params"]} == {id(p) for p in everything}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in parameter_groups(model, 0.05)[0]["params"]}
    assert {"embedding.codes.weight", "blocks.0.attention.qkv.weight", "blocks.1.mlp.fc2.weight"} <= decayed
    assert {"head.linear.weight", "head.modulation.weight", "blocks.0.modulation.linear.weight"} <= decayed
    for spared in ("bias", "embedding.classes", "embedding.scales", "position_LC", "start_LC", "log_scale_H", "table"):
        assert not [name for name in decayed if spared in name], spared
    spared = {id(parameter) for parameter in parameter_groups(tokenizer, 0.05)[1]["params"]}
    assert id(tokenizer.quantizer.codebook.weight) in spared
    assert id(tokenizer.decoder.norm_out.weight) in spared


@pytest.fixture
def norms(monkeypatch):
    """The norms of the gradients with which optimizers took their steps."""
    norms = []
    step = torch.optim.AdamW.step

    def record(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients).item() / float(getattr(self, "grad_scale", 1)))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return norms


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(tmp_path, runs, norms):
    row = run(configure("var", tmp_path / "clipped", "optimizer.clip=0.01", "steps=2", runs=runs)).metrics
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert row["grad_norm"] > 0.1
    norms.clear()
    run(configure("var", tmp_path / "free", "optimizer.clip=0", "steps=2", runs=runs))
    assert min(norms) > 0.1


def poison(monkeypatch, steps):
    """Make the loss of these steps NaN."""
    loss = NextScaleStage.loss

    def poisoned(self, batch, classes_B, generator, step):
        value, parts = loss(self, batch, classes_B, generator, step)
        return (value * math.nan if step in steps else value), parts

    monkeypatch.setattr(NextScaleStage, "loss", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path, runs, monkeypatch):
    poison(monkeypatch, {3})
    config = configure("var", tmp_path, "checkpoint_every=2", runs=runs)
    with pytest.raises(NonFiniteError, match="the loss is nan at step 3"):
        run(config)
    saved = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002.pt"]
    assert not (tmp_path / "weights").exists()


def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(tmp_path, runs, monkeypatch):
    poison(monkeypatch, {1, 3})
    result = run(configure("var", tmp_path, "on_nonfinite=skip", runs=runs))
    assert (result.step, result.metrics["skipped_steps"]) == (6, 2)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl"))
    poison(monkeypatch, set(range(1000)))
    with pytest.raises(NonFiniteError, match="20th in a row"):
        run(configure("var", tmp_path / "all", "on_nonfinite=skip", "steps=50", runs=runs))


ADVERSARIAL = ("reconstruction.adversarial=0.5", "reconstruction.adversarial_start=1")


def test_the_discriminator_is_clipped_and_logged(tmp_path, norms):
    options = (*ADVERSARIAL, "optimizer.clip=0.001", "steps=3")
    row = run(configure("tokenizer", tmp_path, *options)).metrics
    assert norms == pytest.approx([0.001] * 5, rel=1e-3)  # tokenizer, then twice tokenizer and discriminator
    assert row["discriminator_grad_norm"] > 0.01 and 0 < row["discriminator_loss"] < 10


def test_a_discriminator_that_is_not_finite_stops_the_run_or_skips_its_step(tmp_path, monkeypatch):
    from hmar.loss import TokenizerLoss

    loss, seen = TokenizerLoss.discriminator_loss, []

    def poisoned(self, reconstruction, images, step):
        seen.append([p.detach().clone() for p in self.discriminator.parameters()])
        return loss(self, reconstruction, images, step) * (math.inf if step == 3 else 1)

    monkeypatch.setattr(TokenizerLoss, "discriminator_loss", poisoned)
    with pytest.raises(NonFiniteError, match="the discriminator loss is inf at step 3"):
        run(configure("tokenizer", tmp_path / "strict", *ADVERSARIAL))
    seen.clear()
    result = run(configure("tokenizer", tmp_path / "lenient", *ADVERSARIAL, "on_nonfinite=skip"))
    assert (result.step, result.metrics["skipped_steps"]) == (6, 1)
    rows = read_metrics(tmp_path / "lenient" / "metrics.jsonl")
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["discriminator_loss"]) for row in rows)
    same = [all(map(torch.equal, a, b)) for a, b in pairwise(seen)]
    assert same == [False, False, True, False]  # at steps 1 to 5; step 3 left it as it was


def test_cached_codes_are_the_codes(tmp_path, runs):
    run(configure("var", tmp_path / "cached", "cache_codes=true", runs=runs))
    run(configure("var", tmp_path / "fresh", runs=runs))
    assert_same_bits(weights(tmp_path / "cached"), weights(tmp_path / "fresh"))


@pytest.fixture
def image_folder(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_with_its_name_or_is_counted(workers, tmp_path, image_folder):
    (image_folder / "dogs" / "2.png").write_bytes(b"not an image")
    data = (f"data={{name: folder, path: {image_folder}, workers: {workers}}}", "steps=3")
    with pytest.raises(ValueError) as error:
        run(configure("tokenizer", tmp_path / "strict", *data))
    message = str(error.value)
    assert str(image_folder / "dogs" / "2.png") in message
    assert "\n" not in message
    result = run(configure("tokenizer", tmp_path / "lenient", *data, "data.on_error=skip"))
    assert result.metrics["skipped_images"] == 1


def test_stages_that_do_not_fit_together_say_why(tmp_path, runs):
    with pytest.raises(
        ValueError, match=r"expects \(1, 2, 3, 4\): use the preset and overrides that the tokenizer had"
    ):
        run(configure("var", tmp_path, "model.sides=[1,2,3,4]", runs=runs))
    with pytest.raises(ValueError, match=r"model.depth was 2, now 3"):
        run(configure("masked", tmp_path, "model.depth=3", runs=runs))
    with pytest.raises(ValueError, match=r'kind "tokenizer", expected next-scale'):
        run(configure("masked", tmp_path, f"next_scale_weights={runs / 'tokenizer'}", runs=runs))
    with pytest.raises(ValueError, match=r"leave the override out"):
        run(configure("var", tmp_path, "tokenizer.dropout=0.5", runs=runs))
    with pytest.raises(ValueError, match=r"the data has 10 classes, but model.num_classes=4"):
        run(configure("var", tmp_path / "classes", "model.num_classes=4", runs=runs))
    assert not list(tmp_path.glob("*/weights"))


def test_mask_depth_may_differ_from_stage_one(tmp_path, runs):
    run(configure("masked", tmp_path, "model.mask_depth=2", runs=runs))
    hmar = load_model(tmp_path)
    assert (len(hmar.trunk), len(hmar.mask_blocks)) == (0, 2)


def test_devices_and_precisions():
    cpu = torch.device("cpu")
    assert find_device("cpu") == cpu
    for name, message in (("gpu", "is not a device"), ("meta", "is not supported"), ("cuda:99", "is not there")):
        with pytest.raises(ValueError, match=message):
            find_device(name)
    assert (find_precision("auto", cpu), find_precision("fp32", cpu)) == (None, None)
    assert find_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(ValueError, match=r'unknown precision "fp16": did you mean .*known: auto, fp32, bf16'):
        find_precision("fp16", cpu)


def test_precision_reaches_the_model(tmp_path, runs):
    run(configure("var", tmp_path / "bf16", "precision=bf16", "steps=2", runs=runs))
    run(configure("var", tmp_path / "fp32", "precision=fp32", "steps=2", runs=runs))
    bf16, fp32 = weights(tmp_path / "bf16"), weights(tmp_path / "fp32")
    assert {tensor.dtype for tensor in bf16.values() if tensor.is_floating_point()} == {torch.float32}
    assert not torch.equal(bf16["head.linear.weight"], fp32["head.linear.weight"])


@pytest.mark.parametrize(
    ("precision", "residual", "expected"),
    [
        ("bf16", "auto", torch.bfloat16),
        ("bf16", "fp32", None),
        ("fp16", "auto", None),
        ("auto", "auto", None),
    ],
)
def test_precision_of_the_residual_stream(precision, residual, expected, tmp_path, runs):
    config = configure("masked", tmp_path, f"precision={precision}", f"residual_precision={residual}", runs=runs)
    trainer = Trainer(config, resume=False, overwrite=False, console=Console(quiet=True))
    assert trainer.stage.module.embedding.stream_dtype == expected
    with pytest.raises(ValueError, match="bf16 is for transformers that compute in bf16, got stage=var precision=auto"):
        run(configure("var", tmp_path, "residual_precision=bf16", runs=runs))


@pytest.mark.parametrize("stage", CODE_STAGES)
def test_a_narrow_residual_stream_rounds_and_no_more(stage, tmp_path, runs):
    """The first loss, before any weight has changed, is that of a float32 stream but for the rounding of bfloat16."""
    losses = []
    for residual in ("bf16", "fp32"):
        folder = tmp_path / residual
        run(configure(stage, folder, "precision=bf16", f"residual_precision={residual}", "log_every=1", runs=runs))
        losses.append([row["loss"] for row in read_metrics(folder / "metrics.jsonl")])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_labels_and_paths_are_dropped_with_their_probability(tmp_path, runs):
    config = configure("masked", tmp_path, "model.class_drop=0.1", "model.drop_path=0.3", runs=runs)
    stage = MaskedStage(config, torch.device("cpu"))
    draws = stage.draw(step_generator(0, 0), 20000)
    assert draws.dropped_B.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert draws.drop_path_DB.shape == (1, 20000)  # the trunk, in evaluation mode, drops none
    torch.testing.assert_close(draws.drop_path_DB.unique(), torch.tensor([0, 1 / 0.7]))
    assert draws.drop_path_DB.mean().item() == pytest.approx(1, abs=0.02)
    part = draws.of(slice(5, 9), torch.device("cpu"))
    assert torch.equal(part.dropped_B, draws.dropped_B[5:9])
    assert torch.equal(part.drop_path_DB, draws.drop_path_DB[:, 5:9])
    assert torch.equal(part.masked_L, draws.masked_L)
    codes_BL = torch.zeros(4, config.model.pyramid.length, dtype=torch.long)
    _, classes_B, _ = stage.inputs(codes_BL, torch.arange(4), part)
    assert torch.equal(classes_B == config.model.null_class, part.dropped_B)
    certain = MaskedStage(configure("masked", tmp_path, "model.class_drop=0", runs=runs), torch.device("cpu"))
    assert not certain.draw(step_generator(0, 0), 100).dropped_B.any()


def test_the_draws_of_a_step_depend_on_seed_and_step_alone():
    draws = {(seed, step): torch.rand(4, generator=step_generator(seed, step)) for seed in (0, 1) for step in (0, 1)}
    assert torch.equal(draws[0, 1], torch.rand(4, generator=step_generator(0, 1)))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 4


def test_metrics_survive_a_line_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_restarted_codes_begin_without_momentum(tmp_path, monkeypatch):
    from hmar.quantizer import MultiScaleQuantizer

    moved, momenta = [], []
    restart = MultiScaleQuantizer.restart_unused_codes

    def record(self, *arguments):
        mask_V = restart(self, *arguments)
        moved.append(mask_V)
        return mask_V

    advance = Trainer._advance

    def look(self, *arguments):
        advance(self, *arguments)
        momenta.append(self.optimizer.adamw.state[self.stage.module.quantizer.codebook.weight]["exp_avg_sq"].clone())

    monkeypatch.setattr(MultiScaleQuantizer, "restart_unused_codes", record)
    monkeypatch.setattr(Trainer, "_advance", look)
    run(configure("tokenizer", tmp_path, "tokenizer.restart_after=2"))
    assert any(mask_V.any() for mask_V in moved)
    for mask_V, momentum_VE in zip(moved, momenta, strict=True):
        assert (momentum_VE[mask_V] == 0).all()
    assert (momenta[-1] != 0).any()
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)


def grown(tmp_path, stage, name, *overrides, runs):
    """Weights after a few steps with everything random switched on."""
    options = ("model.drop_path=0.3", "model.depth=4", "model.mask_depth=2", "model.class_drop=0.5", "steps=4")
    run(configure(stage, tmp_path / name, *options, "optimizer.lr=1e-2", *overrides, runs=runs))
    return weights(tmp_path / name)


@pytest.fixture(scope="module")
def deep_runs(tmp_path_factory, runs):
    """The same with a stage 1 of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "tokenizer").symlink_to(runs / "tokenizer")
    run(configure("next-scale", folder / "next-scale", "model.depth=4", "steps=2", runs=folder))
    return folder


@pytest.mark.parametrize("stage", CODE_STAGES)
def test_micro_batches_do_not_change_the_result(stage, tmp_path, deep_runs):
    whole = grown(tmp_path, stage, "whole", runs=deep_runs)
    divided = grown(tmp_path, stage, "divided", "accumulate=4", runs=deep_runs)
    other = grown(tmp_path, stage, "other", "seed=1", runs=deep_runs)
    for name, tensor in whole.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-3, atol=1e-4)
    head = "mask_head.linear.weight" if stage == "masked" else "head.linear.weight"
    assert not torch.allclose(other[head], whole[head], atol=1e-3)


@pytest.mark.parametrize("mode", ["mlp", "blocks"])
@pytest.mark.parametrize("stage", CODE_STAGES)
def test_activation_checkpointing_keeps_less_and_changes_nothing(stage, mode, tmp_path, deep_runs, monkeypatch):
    kept = []
    saved = {"bytes": 0}

    def pack(tensor):
        saved["bytes"] += tensor.nbytes
        return tensor

    kind = MaskedStage if stage == "masked" else NextScaleStage
    loss = kind.loss

    def measured(self, *arguments):
        saved["bytes"] = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = loss(self, *arguments)
        kept.append(saved["bytes"])
        return result

    monkeypatch.setattr(kind, "loss", measured)
    plain = grown(tmp_path, stage, "plain", runs=deep_runs)
    without = kept[0]
    kept.clear()
    recomputed = grown(tmp_path, stage, "recomputed", f"activation_checkpointing={mode}", runs=deep_runs)
    assert_same_bits(recomputed, plain)
    assert kept[0] < (0.85 if mode == "mlp" else 0.5) * without


@pytest.mark.parametrize(
    ("stage", "recompute", "mode"),
    [
        ("next-scale", "none", "model"),
        ("next-scale", "mlp", "blocks"),
        ("masked", "blocks", "model"),
        ("masked", "none", "blocks"),
        ("var", "mlp", "model"),
        ("var", "blocks", "blocks"),
    ],
)
def test_stages_compile_in_whole_graphs(stage, recompute, mode, tmp_path, deep_runs, monkeypatch):
    options = (f"activation_checkpointing={recompute}", "steps=2")
    eager = grown(tmp_path, stage, "eager", *options, runs=deep_runs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_objective = hmar.train.compile_objective
    monkeypatch.setattr(
        hmar.train, "compile_objective", lambda objective, mode: compile_objective(objective, mode, "aot_eager")
    )
    compiled = grown(tmp_path, stage, "compiled", *options, f"compile={mode}", runs=deep_runs)
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)
    # The first block adds nothing to the residual stream, the second what no path was dropped from; in stage 2 those of
    # the trunk have no gradients. All others share one.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (1 if mode == "model" else 4)


def test_a_step_never_waits_for_the_device(tmp_path, runs, monkeypatch):
    """No value is read from a tensor between two rows of the log; on a GPU that would wait."""
    read = []
    advance = Trainer._advance

    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            if operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                read.append(operator)
            return operator(*arguments, **(options or {}))

    def watched(self, *arguments):
        with Reads():
            advance(self, *arguments)

    monkeypatch.setattr(Trainer, "_advance", watched)
    # Only on the CPU does it look at the targets.
    monkeypatch.setattr(sys.modules["hmar_kernels.linear_cross_entropy.api"], "check_inputs", lambda *inputs: None)
    options = ("model.drop_path=0.2", "ema=0.9", "optimizer.clip=0.1", "cache_codes=true", "precision=bf16")
    run(configure("next-scale", tmp_path / "run", *options, runs=runs))
    assert read == []
    with Reads():
        torch.ones(2).sum().item()
    assert len(read) == 1


def test_fp16_scales_the_loss_and_finds_the_largest_scale_that_fits(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 2.0**24)
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 8)
    options = ("precision=fp16", "steps=60", "batch_size=16", "optimizer.lr=3e-3", "log_every=10")
    run(configure("var", tmp_path / "whole", *options, runs=runs))
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert 1 < rows[-1]["loss_scale"] < 2.0**24
    assert 0 < rows[-1]["skipped_steps"] < 40
    assert all(math.isfinite(row["grad_norm"]) for row in rows)


def test_a_resumed_fp16_run_goes_on_with_its_loss_scale(tmp_path, runs, stop_after, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 2.0**30)
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    options = ("precision=fp16", "steps=30", "ema=0.9")
    run(configure("var", tmp_path / "whole", *options, runs=runs))
    stop_after(17)
    with pytest.raises(Interrupted):
        run(configure("var", tmp_path / "parts", *options, runs=runs))
    monkeypatch.undo()
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    run(configure("var", tmp_path / "parts", *options, runs=runs), resume=True)
    assert_same_bits(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_skipped_steps_leave_weights_moments_and_averages_alone(tmp_path, runs, monkeypatch):
    states = []
    advance = Trainer._advance

    def record(self, *arguments):
        advance(self, *arguments)
        moments = [value.clone() for state in self.optimizer.adamw.state.values() for value in state.values()]
        module = [p.detach().clone() for p in self.stage.module.parameters()]
        states.append((module, moments, [a.clone() for a in self.averaged.averages.values()]))

    monkeypatch.setattr(Trainer, "_advance", record)
    poison(monkeypatch, {0, 3})
    run(configure("var", tmp_path, "on_nonfinite=skip", "ema=0.5", "optimizer.lr=1e-2", runs=runs))
    for parts in zip(states[2], states[3], strict=True):
        assert all(map(torch.equal, *parts))
    for before, after in zip(states[3], states[4], strict=True):
        assert not all(map(torch.equal, before, after))
    # The first average is that of the first step that counts.
    assert all(map(torch.equal, states[1][2], states[1][0]))


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, runs, monkeypatch):
    advance = Trainer._advance

    def spoil(self, *arguments):
        advance(self, *arguments)
        if self.step == 4:
            self.stage.module.head.linear.bias.data[3] = math.inf

    monkeypatch.setattr(Trainer, "_advance", spoil)
    with pytest.raises(NonFiniteError, match="a weight is not finite after step 4"):
        run(configure("var", tmp_path, "checkpoint_every=2", "log_every=4", runs=runs))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step-00000002.pt"]


def test_a_loss_that_is_not_finite_is_read_before_a_checkpoint(tmp_path, runs, monkeypatch):
    poison(monkeypatch, {3})
    with pytest.raises(NonFiniteError, match="the loss is nan at step 3"):
        run(configure("var", tmp_path, "checkpoint_every=2", "log_every=1000", runs=runs))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step-00000002.pt"]


def test_a_log_of_work_done(tmp_path, runs):
    config = configure("next-scale", tmp_path, runs=runs)
    row = run(config).metrics
    flops = training_flops(NextScaleTransformer(config.model))
    assert row["model_tflops_per_second"] == pytest.approx(row["images_per_second"] * flops / 1e12)
    assert row["tokens_per_second"] == pytest.approx(21 * row["images_per_second"])
    assert "mfu" not in row  # of a CPU nobody knows the peak


def test_epochs_are_passes_over_the_data(tmp_path, runs):
    result = run(configure("var", tmp_path, "steps=null", "epochs=2", "batch_size=1000", runs=runs))
    config = read_config(tmp_path / "config.yaml")
    images = len(open_images(configure("var", tmp_path, runs=runs)))
    assert result.step == config["steps"] == math.ceil(2 * images / 1000)
    assert config["epochs"] is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("compiled", "graphs"),
    [("false", "false"), ("false", "true"), ("blocks", "false"), ("blocks", "true"), ("model", "true")],
)
@pytest.mark.parametrize("stage", CODE_STAGES)
def test_steps_on_a_gpu_without_a_synchronisation(stage, compiled, graphs, tmp_path, runs, monkeypatch):
    advance = Trainer._advance

    def strict(self, *arguments):
        if self.step >= 2:  # compiled, with its buffers
            torch.cuda.set_sync_debug_mode("error")
        try:
            advance(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_advance", strict)
    options = ("device=cuda", "model.drop_path=0.2", "ema=0.9", "cache_codes=true")
    options += (f"compile={compiled}", f"cuda_graphs={graphs}")
    row = run(configure(stage, tmp_path, *options, runs=runs)).metrics
    assert math.isfinite(row["loss"]) and row["peak_memory_gb"] > 0


# NOTE: compiling takes a minute a stage; masked and var run the same blocks as next-scale
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("stage", "compiled"), [("tokenizer", True), ("next-scale", True), ("masked", False), ("var", False)]
)
def test_stages_learn_on_a_gpu_and_resume(stage, compiled, tmp_path, runs, stop_after, monkeypatch):
    options = (
        "device=cuda",
        f"compile={str(compiled).lower()}",
        "steps=60",
        "batch_size=16",
        "optimizer.lr=3e-3",
        "log_every=10",
    )
    config = configure(stage, tmp_path, *options, runs=runs)
    stop_after(30)
    with pytest.raises(Interrupted):
        run(config)
    monkeypatch.undo()
    run(config, resume=True)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
