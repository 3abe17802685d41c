"""Checkpoints and folders of weights: whole or not at all, and every kind of damage named."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hmar.checkpoint import (
    DamagedCheckpointError,
    checkpoints,
    find_weights,
    fingerprint,
    load_checkpoint,
    load_model,
    load_tokenizer,
    newest_checkpoint,
    read_description,
    replacing,
    rng_state,
    save_checkpoint,
    save_pretrained,
    set_rng_state,
)
from hmar.config import PRESETS
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.tokenizer import Tokenizer

TOKENIZER, MODEL = PRESETS["tiny"]


def build(kind):
    torch.manual_seed(0)
    match kind:
        case "tokenizer":
            return Tokenizer(TOKENIZER, MODEL.pyramid)
        case "next-scale":
            return NextScaleTransformer(MODEL, pattern="block_diagonal")
        case "var":
            return NextScaleTransformer(MODEL, pattern="block_causal")
        case "masked":
            return MaskedTransformer(MODEL)
    return HMAR(MODEL)


def state(step):
    return {"weights": torch.arange(5000.0) + step, "nested": {"list": [1, 2.5, "three", None], "tuple": (True, 7)}}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path, state(3), step=3, keep=2)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], state(3)["weights"])
    assert loaded["nested"] == state(3)["nested"]
    assert (path.name, loaded["step"]) == ("step-00000003.pt", 3)


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / "step-notes.pt").write_text("not ours")
    (tmp_path / ".step-00000001.pt.999.tmp").write_text("left by a crash")
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, state(step), step=step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000100.pt", "step-00000010.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010.pt", "step-00000100.pt", "step-notes.pt"]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":
        # Inside the tensor's numbers, where torch.load sees nothing wrong.
        where = content.find(torch.tensor([1000.0, 1001.0]).numpy().tobytes()) + 2
        assert where > 2
        content[where] ^= 1
    elif how == "empty":
        content = bytearray()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, how):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(0), step=step, keep=3)
    damage(tmp_path / "step-00000003.pt", how)
    damaged = []
    path, loaded = newest_checkpoint(tmp_path, damaged.append)
    assert (path.name, loaded["step"]) == ("step-00000002.pt", 2)
    assert [str(tmp_path / "step-00000003.pt") in str(error) for error in damaged] == [True]


def test_torch_load_alone_would_accept_the_flipped_bit(tmp_path):
    path = save_checkpoint(tmp_path, state(0), step=1, keep=1)
    damage(path, "flipped")
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], state(0)["weights"])
    with pytest.raises(DamagedCheckpointError, match="wrong checksum"):
        load_checkpoint(path)


def test_other_files_are_not_checkpoints(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "step-00000001.pt")
    with pytest.raises(DamagedCheckpointError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "step-00000001.pt")
    assert newest_checkpoint(tmp_path / "nowhere", lambda error: None) is None


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "payload": Payload()}, tmp_path / "step-00000001.pt")
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match=f"could not write {path}"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("the writer failed")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_clear_error_and_keeps_earlier_checkpoints(tmp_path):
    # A limit on the size of files fails a write in the middle, as a full disk does.
    script = f"""
import resource, torch
from pathlib import Path
from hmar.checkpoint import save_checkpoint
folder = Path({str(tmp_path)!r})
save_checkpoint(folder, {{"weights": torch.zeros(10)}}, step=1, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_checkpoint(folder, {{"weights": torch.zeros(100_000)}}, step=2, keep=2)
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "step-00000002.pt" in result.stdout, result.stderr
    assert "Is the disk full?" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert load_checkpoint(tmp_path / "step-00000001.pt")["step"] == 1


def test_random_generators_go_on_where_they_were(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.normal()  # leaves half of a pair behind, which belongs to the state too
    path = save_checkpoint(tmp_path, {"rng": rng_state()}, step=1, keep=1)

    def draw():
        return random.random(), np.random.normal(), np.random.normal(), torch.rand(3).tolist()

    expected = draw()
    draw()
    set_rng_state(load_checkpoint(path)["rng"])
    assert draw() == expected


@pytest.mark.parametrize("kind", ["tokenizer", "next-scale", "var", "masked", "hmar"])
def test_weights_come_back_as_the_same_module(tmp_path, kind):
    module = build(kind)
    save_pretrained(tmp_path, module, steps=7)
    loaded = (load_tokenizer if kind == "tokenizer" else load_model)(tmp_path)
    assert type(loaded) is type(module)
    assert loaded.config == module.config
    assert getattr(loaded, "pattern", None) == getattr(module, "pattern", None)
    assert not loaded.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (read_description(tmp_path)["kind"], read_description(tmp_path)["steps"]) == (kind, 7)


def test_weights_are_found_in_the_folder_of_a_run(tmp_path):
    save_pretrained(tmp_path / "run" / "weights", build("var"))
    assert find_weights(tmp_path / "run") == find_weights(tmp_path / "run" / "weights") == tmp_path / "run" / "weights"
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "run" / "weights")


def test_folders_without_weights_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no weights: expected config\.json and model\.safetensors"):
        load_model(tmp_path)
    save_checkpoint(tmp_path / "checkpoints", state(1), step=1, keep=1)
    with pytest.raises(ValueError, match="has not finished"):
        load_model(tmp_path)


def test_the_wrong_kind_is_refused(tmp_path):
    save_pretrained(tmp_path, build("tokenizer"))
    with pytest.raises(ValueError, match='kind "tokenizer", expected next-scale or masked or hmar or var'):
        load_model(tmp_path)
    save_pretrained(tmp_path, build("var"))
    with pytest.raises(ValueError, match='kind "var", expected tokenizer'):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="cannot save a Linear"):
        save_pretrained(tmp_path, torch.nn.Linear(1, 1))


def test_damaged_or_missing_tensors_are_named(tmp_path):
    save_pretrained(tmp_path, build("var"))
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short"):
        load_model(tmp_path)
    path.write_bytes(whole[:4])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        load_model(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    save_pretrained(tmp_path, build("var"))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["stranger"] = torch.zeros(1)
    del tensors["head.linear.bias"]
    tensors["embedding.start_LC"] = torch.zeros(2, 2)
    save_file(tensors, path)
    expected = (
        r"1 missing \(head.linear.bias\); 1 unexpected \(stranger\); "
        r"1 wrong shape \(embedding.start_LC is \(2, 2\), expected \(1, 32\)\)"
    )
    with pytest.raises(ValueError, match=expected):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda description: description.update(kind="gan"), 'unknown kind "gan".*known: tokenizer, next-scale'),
        (lambda description: description.pop("model"), "lacks the entry 'model'"),
        (lambda description: description["model"].update(heads=3), 'unknown key "heads"'),
        (lambda description: description["model"].update(depth="two"), "depth: expected a whole number, got 'two'"),
    ],
)
def test_a_bad_description_is_explained(tmp_path, change, message):
    save_pretrained(tmp_path, build("var"))
    description = json.loads((tmp_path / "config.json").read_text())
    change(description)
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_description_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config.json"):
        load_model(tmp_path)
