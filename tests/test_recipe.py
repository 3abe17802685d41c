"""Configurations: what is known, what is refused and with which words, and the learning-rate schedule."""

from itertools import pairwise

import pytest
import yaml

from hmar.config import PRESETS
from hmar.recipe import (
    OptimizerConfig,
    TrainConfig,
    apply_overrides,
    config_mapping,
    config_yaml,
    learning_rate,
    make_config,
    read_config,
    with_steps,
)

BASE = ["stage=var", "preset=tiny", "output_dir=runs/x", "tokenizer_weights=runs/tokenizer"]


def configure(*overrides: str) -> TrainConfig:
    return make_config(apply_overrides({}, [*BASE, *overrides]))


def test_a_preset_fills_in_sizes_and_the_image_side():
    config = configure()
    assert (config.tokenizer, config.model) == PRESETS["tiny"]
    assert config.data.size == config.model.sides[-1] * config.tokenizer.stride


def test_overrides_reach_every_section_with_their_types():
    config = configure("optimizer.lr=1e-3", "optimizer.betas=[0.8, 0.9]", "model.depth=4", "compile=true")
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.model.depth, config.steps, config.compile) == (4, 1000, "model")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("accumulate=2", "accumulate=2 has no effect in stage tokenizer"),
        ("activation_checkpointing=mlp", "activation_checkpointing=mlp is for transformers' blocks"),
        ("precision=fp16", "precision=fp16 is for transformers: .* use bf16 or fp32"),
    ],
)
def test_what_a_tokenizer_cannot_do(override, message):
    with pytest.raises(ValueError, match=message):
        make_config(apply_overrides({}, ["stage=tokenizer", "preset=tiny", "output_dir=x", override]))


def test_epochs_become_steps():
    config = configure("epochs=3", "batch_size=8")
    assert config.steps is None
    assert (with_steps(config, 20).steps, with_steps(config, 20).epochs) == (8, None)
    assert with_steps(configure("steps=5"), 20).steps == 5
    with pytest.raises(ValueError, match="steps=7 and epochs=3 both say how long the run is: leave one out"):
        configure("epochs=3", "steps=7")


def test_what_the_preset_derived_is_derived_anew_and_what_it_chose_is_kept():
    config = make_config(
        apply_overrides({}, ["stage=tokenizer", "preset=d16-256", "output_dir=x", "model.depth=12"]),
    )
    assert (config.model.width, config.model.num_heads, config.model.mask_depth) == (768, 12, 6)
    tiny = configure("model.depth=6")
    assert (tiny.model.width, tiny.model.num_heads) == (32, 2)


def test_a_configuration_survives_yaml(tmp_path):
    config = configure("optimizer.lr=2.5e-4", "data.workers=2", "model.depth=3", "ema=0.99")
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert make_config(read_config(tmp_path / "config.yaml")) == config
    assert make_config(yaml.safe_load(yaml.safe_dump(config_mapping(config)))) == config


def test_a_file_and_overrides_meet_and_the_override_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("stage: tokenizer\npreset: tiny\nsteps: 5\noptimizer: {lr: 1e-4, clip: 1}\n")
    config = make_config(apply_overrides(read_config(file), ["optimizer.lr=3e-4", "output_dir=x"]))
    assert (config.steps, config.optimizer) == (5, OptimizerConfig(lr=3e-4, clip=1.0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", r'unknown key "optimiser": did you mean optimizer\? known: stage, output_dir'),
        (
            "optimizer.lrr=1",
            r'unknown key "optimizer.lrr": did you mean optimizer.lr .*known: optimizer.lr, ',
        ),
        ("model.dept=1", r'unknown key "model.dept": did you mean model.depth or'),
        ("preset=digits", r'unknown preset "digits": did you mean digits-32\? known: d16-256, .*tiny'),
        ("stage=mask", r'unknown stage "mask": did you mean masked\? known: tokenizer, next-scale, masked, var'),
        ("steps=many", "steps: expected a whole number, got 'many'"),
        ("steps=1.5", "steps: expected a whole number, got 1.5"),
        ("steps=true", "steps: expected a whole number, got True"),
        ("steps=0", "steps is 0, expected at least 1"),
        ("steps.more=1", "steps: expected a whole number"),
        ("compile=1", 'compile: unknown value "1": known: false, true, blocks, model'),
        ("compile=block", 'compile: unknown value "block": did you mean blocks'),
        ("precision=fp8", 'precision: unknown value "fp8": .*known: auto, fp32, bf16, fp16'),
        ("accumulate=5", "batch_size is 32, expected a multiple of accumulate=5"),
        ("parallel=dp", 'parallel: unknown value "dp": did you mean ddp'),
        ("shard_size=2", "shard_size=2 has no effect with parallel=ddp: set parallel=hsdp"),
        ("attention=fast", 'unknown attention "fast": .*known: auto, reference, triton'),
        ("model.sides=4", r"model.sides: expected a list such as \[1, 2\], got 4"),
        ("model.sides=[1,a]", "model.sides: expected a whole number, got 'a'"),
        ("optimizer=3", "optimizer: expected a section with keys, got 3"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected a list of 2 values"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas is .*expected two numbers in"),
        ("optimizer.warmup=0.99", "optimizer.warmup .*expected"),
        ("data.size=64", "data.size=64 does not fit the pyramid .* is 16"),
        ("data.name=folder", "data.path is missing"),
        ("data.path=/images", "data.path=/images has no effect"),
        ("model.vocab_size=5", "model.vocab_size=5 does not fit tokenizer.vocab_size=32"),
        ("tokenizer_weights=null", "stage var trains on a tokenizer's codes"),
        ("next_scale_weights=x", "next_scale_weights=x has no effect in stage var"),
        ("stage=masked", "stage masked starts from a trained stage next-scale"),
        ("preset=null", "preset is missing"),
        ("steps", '"steps" is not an override: expected key=value'),
        ("model.sides=[1", "the value of model.sides is not valid YAML"),
    ],
)
def test_errors_say_what_was_given_and_what_is_known(override, message):
    with pytest.raises(ValueError, match=message):
        configure(override)


def test_caching_codes_of_random_crops_is_refused():
    assert configure("cache_codes=true").cache_codes
    with pytest.raises(ValueError, match="would freeze the random crops"):
        configure("cache_codes=true", "data.name=photographs")


def test_files_that_are_not_configurations(tmp_path):
    with pytest.raises(ValueError, match="no configuration file"):
        read_config(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected lines of the form"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_config(tmp_path / "broken.yaml")


def test_learning_rate_warms_up_stays_flat_and_falls_linearly():
    def lr(step, steps=1000):
        return learning_rate(step, steps=steps, peak=2.0, warmup=0.02, flat=0.05, start_ratio=0.005, final_ratio=0.1)

    assert lr(0) == pytest.approx(0.01)
    assert lr(10) == pytest.approx(2.0 * (0.005 + 0.995 / 2))
    assert lr(20) == lr(45) == lr(70) == 2.0
    assert lr(999) == pytest.approx(0.2)
    falling = [lr(step) for step in range(70, 1000)]
    slopes = {round(a - b, 12) for a, b in pairwise(falling)}
    assert len(slopes) == 1
    assert min(slopes) > 0
    assert [lr(step, steps=2) for step in range(2)] == pytest.approx([0.01, 0.2])
    assert 0 < lr(0, steps=1) <= 2.0


def test_the_default_optimizer_is_the_published_recipe():
    published = OptimizerConfig()
    assert (published.lr, published.betas, published.weight_decay, published.clip) == (3e-4, (0.9, 0.95), 0.05, 2.0)
    shape = (published.warmup, published.flat, published.start_ratio, published.final_ratio)
    assert shape == (0.02, 0.05, 0.005, 0.1)
