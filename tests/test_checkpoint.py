"""Checkpoints and folders of weights: whole or not at all, and every kind of damage named."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hmar import checkpoint
from hmar.checkpoint import (
    DamagedCheckpointError,
    checkpoints,
    find_weights,
    fingerprint,
    from_pretrained,
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


def assert_same(actual, expected):
    assert type(actual) is type(expected) and getattr(actual, "pattern", None) == getattr(expected, "pattern", None)
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


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


def rewritten(folder, **changes):
    """Put tensors into a folder of weights in place of others, as its own format has them: with a new checksum."""
    description = json.loads((folder / "config.json").read_text())
    path = folder / "model.safetensors"
    tensors = {name: changes.get(name.replace(".", "_"), tensor) for name, tensor in load_file(path).items()}
    own = {name: value for name, value in description.items() if name != "weights_sha256"}
    save_file(tensors, path, {"hmar": json.dumps(own)})
    (folder / "config.json").write_text(json.dumps({**own, "weights_sha256": checkpoint.sha256_of(path)}))


@pytest.mark.parametrize("kind", ["var", "tokenizer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path, kind, bad):
    save_pretrained(tmp_path, build(kind))
    name = {"var": "head.linear.bias", "tokenizer": "decoder.conv_out.bias"}[kind]
    tensor = load_file(tmp_path / "model.safetensors")[name]
    tensor[1] = bad
    rewritten(tmp_path, **{name.replace(".", "_"): tensor})
    message = rf"model\.safetensors.*1 not finite \({name} holds 1 .* of {len(tensor)}\).*weights from before"
    with pytest.raises(ValueError, match=message):
        (load_tokenizer if kind == "tokenizer" else load_model)(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "model.safetensors")


def test_numbers_that_float32_cannot_hold_are_not_finite(tmp_path):
    save_pretrained(tmp_path, build("var"))
    rewritten(tmp_path, head_linear_bias=torch.full((32,), 1e300, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"head\.linear\.bias holds 32 .* of 32"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_another_dtype_are_named(tmp_path, dtype):
    save_pretrained(tmp_path, build("var"))
    rewritten(tmp_path, head_linear_bias=torch.zeros(32).to(dtype))
    message = rf"head\.linear\.bias is {dtype}, expected torch\.float32, or torch\.float16, .* which are converted"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "model.safetensors")


def test_counters_keep_their_dtype(tmp_path):
    save_pretrained(tmp_path, build("tokenizer"))
    rewritten(tmp_path, quantizer_idle_steps_V=torch.full((32,), 10.0))
    with pytest.raises(ValueError, match=r"quantizer\.idle_steps_V is torch\.float32, expected torch\.int64\b"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_become_float32(tmp_path, dtype):
    module = build("hmar").to(dtype)
    save_pretrained(tmp_path, module)
    loaded = load_model(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.mask_head.linear.weight, module.mask_head.linear.weight.float())


HOSTILE_MODELS = {
    "depth": ({"depth": 10**6}, "depth 1000000"),
    "deeper": ({"depth": 10**30}, "depth 1"),
    "width": ({"width": 10**7}, "wrong shape"),
    "wider": ({"width": 10**30, "num_heads": 2}, "sizes that no tensor can have"),
    "no-width": ({"width": 0}, "width is 0"),
    "classes": ({"num_classes": 10**12}, "wrong shape"),
    "vocabulary": ({"vocab_size": 10**15}, "wrong shape"),
    "mlp": ({"mlp_ratio": 1e300}, "sizes that no tensor can have"),
    "infinite-mlp": ({"mlp_ratio": float("inf")}, "sizes that no tensor can have"),
    "side": ({"sides": [1, 2, 10**6]}, r"embedding\.position_LC is \(21, 32\), expected \(1000000000005, 32\)"),
    "scales": ({"sides": [1] * 10**5}, "scales 100000"),
}
HOSTILE_TOKENIZERS = {
    "blocks": ({"num_res_blocks": 10**9}, "blocks"),
    "levels": ({"multipliers": [1] * 10**5}, "blocks"),
    "phis": ({"num_phis": 10**9}, "num_phis 1000000000"),
    "channels": ({"channels": 8 * 10**6}, "wrong shape"),
    "more-channels": ({"channels": 8 * 10**8}, "sizes that no tensor can have"),
    "codes": ({"vocab_size": 10**12}, "wrong shape"),
    "overflow": ({"code_dim": 10**20}, "sizes that no tensor can have"),
}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [("hmar", *case) for case in HOSTILE_MODELS.values()]
    + [("tokenizer", *case) for case in HOSTILE_TOKENIZERS.values()],
    ids=[*HOSTILE_MODELS, *HOSTILE_TOKENIZERS],
)
def test_a_description_cannot_ask_for_more_than_the_file_holds(tmp_path, kind, changes, message):
    """In a process with 2 GB more than it needs and a few seconds: both loading a folder and a file by itself."""
    save_pretrained(tmp_path, build(kind))
    description = json.loads((tmp_path / "config.json").read_text())
    description["tokenizer" if kind == "tokenizer" else "model"].update(changes)
    own = {name: value for name, value in description.items() if name != "weights_sha256"}
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors", {"hmar": json.dumps(own)})
    (tmp_path / "config.json").write_text(json.dumps(description))
    limit = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * 2**30, limit[1]))
    try:
        own_loader = load_tokenizer if kind == "tokenizer" else load_model
        for load, source in ((own_loader, tmp_path), (from_pretrained, tmp_path / "alone.safetensors")):
            started = time.monotonic()
            with pytest.raises(ValueError, match=message):
                load(source)
            assert time.monotonic() - started < 5
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_a_description_nested_beyond_reason(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"cannot read .*config.json"):
        load_model(tmp_path)


# --- saving over weights that are there -------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends here."""


STEPS = ("fsync", "replace")


def kill_at(monkeypatch, number):
    """Let the `number`-th system call that matters to files be the last one; returns the calls so far."""
    calls = []

    def stop(name):
        original = getattr(os, name)

        def call(*arguments):
            calls.append(name)
            if len(calls) > number:
                raise Killed
            return original(*arguments)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, stop(name))
    # A killed process tidies nothing up.
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    return calls


def test_a_save_that_is_killed_at_any_step_leaves_the_old_pair_or_the_new_one(tmp_path):
    """After every single step: what is loaded is old or new in all its tensors and notes, and can be saved over."""
    old, new, third = build("var"), build("hmar"), build("next-scale")
    save_pretrained(tmp_path / "whole", old, note="old")
    seen = []
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = kill_at(patch, number)
            finished = False
            try:
                save_pretrained(folder, new, note="new")
                finished = True
            except Killed:
                pass
        loaded, note = load_model(folder), read_description(folder)["note"]
        expected = {"old": old, "new": new}[note]
        assert_same(loaded, expected)
        assert fingerprint(folder) == read_description(folder)["weights_sha256"]
        seen.append(note)
        # Whatever was left behind is taken up or swept by the next one, which is killed, too, at its beginning ...
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, 1)
            with pytest.raises(Killed):
                save_pretrained(folder, third, note="third")
        assert_same(load_model(folder), expected)
        # ... or goes through.
        save_pretrained(folder, third, note="third")
        assert_same(load_model(folder), third)
        assert not (folder / checkpoint.STAGED).exists()
        if finished:
            break
    assert finished and len(calls) > 4
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)


def test_a_failed_save_leaves_the_weights_before_and_nothing_else(tmp_path):
    old = build("var")
    save_pretrained(tmp_path, old)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        save_pretrained(tmp_path, build("hmar"), note=object())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for number in range(8):
        with pytest.MonkeyPatch.context() as patch:
            calls = []
            original = os.replace

            def fail(*arguments, number=number, original=original, calls=calls):
                calls.append(arguments)
                if len(calls) == number + 1:
                    raise KeyboardInterrupt
                return original(*arguments)

            patch.setattr(os, "replace", fail)
            try:
                save_pretrained(tmp_path, old)
            except KeyboardInterrupt:
                pass
            else:
                break
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert number >= 3


def test_a_mixed_pair_is_refused(tmp_path):
    """What two programs that save into one folder at a time, or somebody's hands, could make of it."""
    save_pretrained(tmp_path / "a", build("var"))
    other = build("var")
    other.head.linear.bias.data.add_(1)
    save_pretrained(tmp_path / "b", other)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match="its checksum is not the one in"):
        load_model(tmp_path / "a")


def test_who_reads_while_weights_are_replaced_sees_one_pair(tmp_path):
    modules = [build("var"), build("hmar")]
    save_pretrained(tmp_path, modules[0], note=0)
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number = 1 - number
            save_pretrained(tmp_path, modules[number], note=number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        kinds = set()
        for _ in range(40):
            loaded = load_model(tmp_path)
            expected = modules[isinstance(loaded, HMAR)]
            assert_same(loaded, expected)
            kinds.add(type(loaded))
    finally:
        stop.set()
        writer.join()
    assert len(kinds) == 2


def test_temporary_names_differ_between_threads_and_machines(tmp_path, monkeypatch):
    """Machines that share a file system can have processes of one number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as other:
        assert one != other and one.parent == other.parent == tmp_path
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
