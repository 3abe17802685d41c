"""`hmar convert` and from_pretrained: every form in and out, and every bad file refused with nothing written."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hmar import checkpoint
from hmar.checkpoint import from_pretrained, load_model, load_tokenizer, read_description, save_pretrained
from hmar.cli import main
from hmar.model import HMAR, MaskedTransformer
from hmar.published import to_published
from hmar.pyramid import SIDES_BY_RESOLUTION
from hmar.recipe import make_config
from hmar.train import train
from published_files import MODEL, make, state_dict, training_checkpoint, write_published_files

SMALL = dataclasses.replace(MODEL, sides=(1, 2, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_published_files(folder)
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    """A fresh working folder with the published files linked into it."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hmar(*arguments):
    """The command in this process: exit code, stdout, stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["hmar", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
    return ended.value.code or 0, out.getvalue(), err.getvalue()


def convert(*arguments):
    code, out, err = hmar("convert", *arguments)
    assert code == 0, err
    return out


def refuse(*arguments, folder=None):
    """Exit code 2, one line on stderr, and no file more or less or changed. Returns that line."""
    folder = folder or Path.cwd()
    before = contents(folder)
    code, out, err = hmar("convert", *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert contents(folder) == before
    return err


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_same(actual, expected):
    state = expected.state_dict()
    assert actual.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in actual.state_dict().items())


SOURCES = {
    "tokenizer": "vae_ch160v4096z32.pth",
    "var": "var_d16.pth",
    "hmar": "hmar-d16.pth",
    "next-scale": "stage1.pth",
    "masked": "stage2.pth",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_published_file_to_folder_and_back(here, kind):
    """Ours -> published -> ours, through files, bit for bit; and the file that is written is the one that was read."""
    assert f"written: weights/{kind}" in convert(SOURCES[kind], f"weights/{kind}")
    assert sorted(path.name for path in (here / "weights" / kind).iterdir()) == ["config.json", "model.safetensors"]
    description = read_description(f"weights/{kind}")
    assert (description["kind"], description["converted_from"]) == (kind, SOURCES[kind])
    loaded = (load_tokenizer if kind == "tokenizer" else load_model)(f"weights/{kind}")
    expected = make(kind)
    assert loaded.config == expected.config
    assert_same(loaded, expected)
    for path in ("back.pth", "back.safetensors"):
        convert(f"weights/{kind}", path)
        back = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
        original = torch.load(SOURCES[kind], weights_only=True)
        assert back.keys() == original.keys()
        assert all(
            torch.equal(back[name], original[name]) and back[name].dtype == original[name].dtype for name in back
        )
        assert_same(from_pretrained(path), expected)
    assert sorted(path.name for path in here.iterdir() if not path.is_symlink()) == [
        "back.pth",
        "back.safetensors",
        "weights",
    ]


def test_what_is_found_is_said(here):
    out = convert("ar-ckpt-last.pth", "weights")
    expected = "VAR, 2 blocks of width 128 with 2 heads, 4 classes, 16 codes, pyramid [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]"
    assert expected in out
    assert "from trainer.var_wo_ddp" in out
    assert "ar-ckpt-last.pth also holds tokenizer in trainer.vae_local, which was left out" in out
    out = convert("ar-ckpt-last.pth", "vae", "--kind", "tokenizer", "--part", "trainer.vae_local")
    assert "tokenizer, channels 32 x [1, 1, 2, 2, 4], 16 codes, 256 pixels" in out
    assert_same(load_tokenizer("vae"), make("tokenizer"))


def test_a_part_is_chosen_where_names_do_not_tell_what_belongs_together(here):
    small = {**state_dict("var", config=SMALL), **state_dict("tokenizer")}
    torch.save(small, "both.pth")
    message = refuse("both.pth", "weights")
    assert "choose one by its part: --part transformer or --part tokenizer" in message
    assert "tensors of a transformer" in convert("both.pth", "var", "--part", "transformer", "--tokenizer", "both.pth")
    assert_same(load_model("var"), make("var", config=SMALL))
    assert load_tokenizer("var").pyramid.sides == SMALL.sides
    assert "tensors of a tokenizer" in convert("both.pth", "vae", "--part", "tokenizer")
    assert_same(load_tokenizer("vae"), make("tokenizer"))


def test_a_model_with_its_tokenizer_samples_wherever_it_is_moved(here):
    convert("hmar-d16.pth", "weights", "--tokenizer", "vae_ch160v4096z32.pth")
    shutil.move("weights", "moved")
    assert_same(load_tokenizer("moved"), make("tokenizer"))
    assert_same(from_pretrained("moved", kind="tokenizer"), make("tokenizer"))
    assert_same(from_pretrained("moved"), make("hmar"))
    code, _, err = hmar("sample", "--model", "moved", "--output", "images", "--classes", "0", "--quiet")
    assert (code, err) == (0, "")
    assert len(list((here / "images").glob("*-class-0.png"))) == 1


def test_a_tokenizer_follows_the_pyramid_of_its_model(here):
    torch.save(state_dict("var", config=SMALL), "small.pth")
    convert("small.pth", "weights", "--tokenizer", "vae_ch160v4096z32.pth")
    assert load_tokenizer("weights").pyramid.sides == (1, 2, 3)
    convert("vae_ch160v4096z32.pth", "vae-512", f"sides={list(SIDES_BY_RESOLUTION[512])}")
    assert load_tokenizer("vae-512").image_size == 512
    assert from_pretrained("vae-512", given={"sides": (1, 2)}).image_size == 32


def test_stage_one_starts_from_var(here):
    convert("var_d16.pth", "weights", "--kind", "next-scale")
    loaded = load_model("weights")
    assert loaded.pattern == "block_diagonal"
    assert_same(loaded, make("var"))
    # And trains on: the folder is what the masked stage and --config take.
    assert read_description("weights")["kind"] == "next-scale"
    MaskedTransformer.from_next_scale(loaded)


def test_hmar_is_assembled_from_its_stages(here):
    out = convert("stage2.pth", "weights", "--next-scale", "stage1.pth")
    assert "assembled: HMAR, 2 blocks (1 of them twice)" in out
    assert_same(load_model("weights"), HMAR.from_stages(make("next-scale"), make("masked")))
    # Any form of either stage will do.
    convert("stage1.pth", "one")
    convert("stage2.pth", "two")
    convert("two", "again", "--next-scale", "one")
    assert_same(load_model("again"), load_model("weights"))


@pytest.mark.parametrize("trained", [1, 3, 4])
def test_how_deep_stage_two_was_trained_is_read_off(here, trained):
    config = dataclasses.replace(SMALL, depth=4, num_heads=4, mask_depth=trained)
    torch.save(state_dict("next-scale", config=config), "one.pth")
    torch.save(state_dict("masked", config=config), "two.pth")
    convert("two.pth", "weights", "--next-scale", "one.pth", "depth=4")
    loaded = load_model("weights")
    # Half of a small model is the default, and serves where fewer blocks were trained.
    assert loaded.config.mask_depth == max(2, trained)
    expected = HMAR.from_stages(make("next-scale", config=config), make("masked", config=config))
    ours, theirs = to_published(loaded), to_published(expected)
    assert all(torch.equal(ours[f"mask_{name}"], theirs[f"mask_{name}"]) for name in ("head.bias", "head.weight"))
    last = f"mask_blocks.{loaded.config.mask_depth - 1}.ffn.fc1.weight"
    assert torch.equal(ours[last], theirs[f"mask_blocks.{trained - 1}.ffn.fc1.weight"])
    arguments = torch.tensor([0]), torch.zeros(1, 13, 8), torch.ones(1, 13, 8), torch.arange(14) % 2 == 0
    with torch.no_grad():
        assert torch.equal(loaded.masked(*arguments), expected.eval().masked(*arguments))
        assert torch.equal(loaded.next_scale(*arguments[:2]), expected.next_scale(*arguments[:2]))


def test_stages_that_do_not_belong_together(here):
    torch.save(state_dict("next-scale", seed=5), "other.pth")
    assert "differs between the stages" in refuse("stage2.pth", "weights", "--next-scale", "other.pth")
    deeper = dataclasses.replace(MODEL, depth=3, width=192, num_heads=3)
    torch.save(state_dict("next-scale", config=deeper), "deeper.pth")
    message = refuse("stage2.pth", "weights", "--next-scale", "deeper.pth")
    assert "stage 1 has 3 blocks, but stage 2 has 2" in message
    wider = dataclasses.replace(MODEL, vocab_size=8)
    torch.save(state_dict("next-scale", config=wider), "wider.pth")
    assert "different sizes" in refuse("stage2.pth", "weights", "--next-scale", "wider.pth")
    message = refuse("stage2.pth", "weights", "--next-scale", "hmar-d16.pth")
    assert 'hmar-d16.pth: it holds no weights for kind "next-scale", but hmar' in message
    assert 'got "var" and "next-scale"' in refuse("var_d16.pth", "weights", "--next-scale", "stage1.pth")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps of a tokenizer and of both stages, with a moving average."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"preset": "tiny", "steps": 2, "batch_size": 8, "device": "cpu", "ema": 0.5, "model": {"num_classes": 10}}
    for stage, more in (
        ("tokenizer", {}),
        ("next-scale", {"tokenizer_weights": "tokenizer"}),
        ("masked", {"tokenizer_weights": "tokenizer", "next_scale_weights": "next-scale"}),
    ):
        paths = {key: str(folder / name) for key, name in more.items()}
        train(make_config({**common, "stage": stage, "output_dir": str(folder / stage), **paths}), progress=False)
    return folder


def test_checkpoints_of_own_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = "checkpoints/step-00000002.pt"
    assert_same(from_pretrained(runs / "tokenizer" / step), load_tokenizer(runs / "tokenizer"))
    stage1 = from_pretrained(runs / "next-scale" / step)
    assert_same(stage1, load_model(runs / "next-scale"))
    raw = from_pretrained(runs / "next-scale" / step, part="model")
    assert not torch.equal(raw.head.linear.weight, stage1.head.linear.weight)
    out = convert(runs / "masked" / step, "weights", "--next-scale", runs / "next-scale" / step)
    assert "from ema" in out
    assert_same(load_model("weights"), load_model(runs / "masked"))
    message = refuse(runs / "tokenizer" / step, "x", "--kind", "var")
    assert 'holds weights of kind "tokenizer", not "var"' in message
    assert 'no part "average"; it has model and ema' in refuse(runs / "next-scale" / step, "x", "--part", "average")
    state = torch.load(runs / "next-scale" / step, weights_only=True)

    def changed(bias):
        return {**state["ema"], "module.head.linear.bias": bias}

    for change, message in (
        ({"ema": 3}, 'its part "ema" is no state dict'),
        ({"ema": {**state["ema"], "module.extra": torch.zeros(1)}}, "1 unexpected (extra)"),
        ({"ema": changed(torch.full((32,), torch.nan))}, "head.linear.bias holds 32 numbers that are NaN"),
        (
            {"ema": changed(torch.zeros(32, dtype=torch.long))},
            "head.linear.bias is torch.int64, expected",
        ),
        ({"ema": changed(torch.zeros(1).expand(32))}, "head.linear.bias [32] is not a dense tensor"),
        ({"config": "{"}, "bad.pt: "),
        ({"config": "[]"}, "bad.pt: its configuration is []"),
        ({"config": torch.zeros(2)}, "holds no weights of a VAR or HMAR"),
    ):
        torch.save({**state, **change}, "bad.pt")
        assert message in refuse("bad.pt", "x")


def test_own_folders_and_runs_keep_their_notes(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(runs / "masked", "weights")
    notes, before = read_description("weights"), read_description(runs / "masked")
    assert {**notes, "converted_from": None} == {**before, "converted_from": None}
    assert notes["class_names"] == [str(digit) for digit in range(10)]
    assert_same(from_pretrained("weights/model.safetensors"), load_model(runs / "masked"))
    assert_same(from_pretrained(runs / "masked", preset="tiny", given={"num_classes": 10}), load_model("weights"))
    message = refuse(runs / "masked", "x", "--preset", "tiny", "num_classes=7")
    assert "num_classes is 10, not 7" in message
    assert 'unknown key "blocks"' in refuse(runs / "masked", "x", "blocks=7")
    assert "which the published form has no place for" in refuse(runs / "tokenizer", "tokenizer.pth")


class Touch:
    """Pickled, it runs a shell command that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Execute(Touch):
    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def malicious(path, where, evil):
    content = {
        "alone": evil,
        "beside": {**state_dict("var", config=SMALL), "evil": evil},
        "nested": {**training_checkpoint(config=SMALL), "args": {"hook": evil}},
    }[where]
    torch.save(content, path)


@pytest.mark.parametrize("payload", [Touch, Execute])
@pytest.mark.parametrize("where", ["alone", "beside", "nested"])
def test_malicious_files_are_refused_and_not_run(here, where, payload):
    ran = here / "ran"
    malicious("evil.pth", where, payload(ran))
    message = refuse("evil.pth", "weights")
    assert "evil.pth was refused and nothing in it was run" in message
    assert "which is code and not data" in message
    assert "add_safe_globals" not in message and "weights_only" not in message
    message = refuse("hmar-d16.pth", "weights", "--tokenizer", "evil.pth")
    assert "evil.pth was refused" in message
    assert "evil.pth was refused" in refuse("stage2.pth", "weights", "--next-scale", "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth was refused"):
        from_pretrained("evil.pth")
    assert not ran.exists()
    # The file is as bad as it is meant to be.
    torch.load("evil.pth", weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "evil.safetensors", "model.safetensors"])
def test_bare_pickles_are_refused_and_not_run(here, name, protocol):
    Path(name).write_bytes(pickle.dumps(Touch(here / "ran"), protocol=protocol))
    assert name in refuse(name, "weights")
    assert not (here / "ran").exists()


def test_pickles_that_are_merely_rich_are_refused_too(here):
    torch.save(types.SimpleNamespace(depth=3), "rich.pth")
    assert "it asks for types.SimpleNamespace" in refuse("rich.pth", "weights")
    torch.save(make("var", config=SMALL), "module.pth")
    assert "it asks for hmar.model.NextScaleTransformer" in refuse("module.pth", "weights")


DAMAGED = {
    "truncated": (lambda content: content[: len(content) // 2], "is damaged or cut short"),
    "nearly-whole": (lambda content: content[:-1], "is damaged or cut short"),
    "one-bit": (lambda content: content[: len(content) // 2] + flip(content[len(content) // 2 :]), "wrong checksum"),
    "empty": (lambda content: b"", "is empty"),
    "web-page": (lambda content: b"<!DOCTYPE html><html>Not found</html>", "is not a weight file"),
    "lfs-pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "zip": (lambda content: b"PK\x05\x06" + bytes(18), "is damaged or cut short"),
}


def flip(content):
    return bytes([content[0] ^ 4]) + content[1:]


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused(here, damage):
    change, message = DAMAGED[damage]
    Path("damaged.pth").write_bytes(change(Path("hmar-d16.pth").read_bytes()))
    error = refuse("damaged.pth", "weights")
    assert "damaged.pth" in error and message in error
    assert "damaged.pth" in refuse("var_d16.pth", "weights", "--tokenizer", "damaged.pth")


def test_damaged_safetensors_are_refused(here):
    convert("var_d16.pth", "published.safetensors")
    convert("var_d16.pth", "own")
    for path in ("published.safetensors", "own/model.safetensors"):
        whole = Path(path).read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:5], b"", b"\xff" * 8 + whole[8:]):
            Path(path).write_bytes(damaged)
            assert path in refuse(path, "weights")
        Path(path).write_bytes(whole)
    # One bit of a number: safetensors has no checksum, but a folder of weights does.
    Path("own/model.safetensors").write_bytes(whole[:-7] + flip(whole[-7:]))
    assert "own/model.safetensors is damaged: its checksum" in refuse("own", "weights")


def test_files_of_the_wrong_sizes_are_refused(here):
    whole = torch.load("hmar-d16.pth", weights_only=True)

    def changed(name, **changes):
        weights = {key: tensor for key, tensor in whole.items() if changes.get(key, tensor) is not None}
        torch.save({**weights, **{k: v for k, v in changes.items() if v is not None}}, name)
        return refuse(name, "weights")

    assert "missing ns_head.bias [16]" in changed("missing.pth", **{"ns_head.bias": None})
    assert "unexpected extra [3]" in changed("extra.pth", extra=torch.zeros(3))
    message = changed("shape.pth", **{"ns_head.bias": torch.zeros(17)})
    assert "ns_head.bias has shape [17], expected [16]" in message
    assert "not finite" in changed("nan.pth", **{"ns_head.bias": torch.full((16,), float("nan"))})
    base = {key: None for key in whole if key.startswith("base_blocks.0.")}
    assert "1 blocks of 2 heads" in changed("shallow.pth", **base)
    more = {key.replace("ns_blocks.0", "ns_blocks.1"): whole[key] for key in whole if key.startswith("ns_blocks.0.")}
    assert "3 blocks of 2 heads" in changed("deep.pth", **more)
    assert "depth is 2, not 3" in refuse("hmar-d16.pth", "weights", "depth=3")
    message = refuse("hmar-d16.pth", "weights", "--preset", "d16-256")
    assert "depth is 2, not 16; width is 128, not 1024" in message
    other = dataclasses.replace(MODEL, vocab_size=32)
    torch.save(state_dict("var", config=other), "other.pth")
    message = refuse("other.pth", "weights", "--tokenizer", "vae_ch160v4096z32.pth")
    assert "other.pth has vocab_size 32, but the tokenizer in vae_ch160v4096z32.pth has 16" in message
    assert "a tokenizer" in refuse("vae_ch160v4096z32.pth", "weights", "--tokenizer", "vae_ch160v4096z32.pth")


def test_bad_arguments_are_refused(here):
    assert 'unknown kind "gan"' in refuse("var_d16.pth", "weights", "--kind", "gan")
    assert 'no weights for kind "hmar", but var in the file itself' in refuse(
        "var_d16.pth", "weights", "--kind", "hmar"
    )
    assert "there is no file or folder nowhere.pth" in refuse("nowhere.pth", "weights")
    assert "takes no tokenizer" in refuse("var_d16.pth", "x.pth", "--tokenizer", "vae_ch160v4096z32.pth")
    assert "expected key=value" in refuse("var_d16.pth", "weights", "depth")
    assert "holds no weights: expected config.json" in refuse(".", "weights")
    Path("plain").mkdir()
    Path("plain/notes.txt").write_text("keep me")
    for more in ((), ("--overwrite",)):
        assert "plain is there and is no such weights" in refuse("var_d16.pth", "plain", *more)
        assert "is there and is no such weights" in refuse("var_d16.pth", "plain/notes.txt", *more)
    code, _, err = hmar("sample", "--model", "var_d16.pth", "--output", "images")
    assert code == 2
    assert "var_d16.pth is a file, expected a folder of weights: hmar convert var_d16.pth FOLDER" in err


def test_weights_are_replaced_only_when_told(here):
    convert("var_d16.pth", "weights")
    convert("var_d16.pth", "flat.pth")
    assert "weights is there already" in refuse("hmar-d16.pth", "weights")
    assert "flat.pth is there already" in refuse("hmar-d16.pth", "flat.pth")
    convert("hmar-d16.pth", "weights", "--overwrite", "--tokenizer", "vae_ch160v4096z32.pth")
    assert_same(load_model("weights"), make("hmar"))
    convert("var_d16.pth", "weights", "--overwrite")
    # The tokenizer of the folder before is gone with it.
    assert sorted(path.name for path in Path("weights").iterdir()) == ["config.json", "model.safetensors"]
    convert("hmar-d16.pth", "flat.pth", "--overwrite")
    assert_same(from_pretrained("flat.pth"), make("hmar"))
    Path("empty").mkdir()
    convert("var_d16.pth", "empty")
    assert_same(load_model("empty"), make("var"))


def foreign_description(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))


def foreign_kind(folder):
    """A description that another program could have, with a word of ours in it."""
    (folder / "config.json").write_text(json.dumps({"kind": "tokenizer", "vocab": 3}))


def broken_description(folder):
    (folder / "config.json").write_text("{")


def foreign_file(folder):
    (folder / "README.md").write_text("keep me")


def foreign_folder(folder):
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("keep me")


def foreign_file_below(folder):
    (folder / "tokenizer" / "notes.txt").write_text("keep me")


def foreign_tokenizer(folder):
    foreign_description(folder / "tokenizer")


@pytest.mark.parametrize(
    ("make_foreign", "what"),
    [
        (foreign_description, "weights/config.json was not written by hmar"),
        (foreign_kind, "weights/config.json was not written by hmar"),
        (broken_description, "weights/config.json was not written by hmar"),
        (foreign_file, "weights/README.md was not written by hmar"),
        (foreign_folder, "weights/logs was not written by hmar"),
        (foreign_file_below, "weights/tokenizer/notes.txt was not written by hmar"),
        (foreign_tokenizer, "weights/tokenizer/config.json was not written by hmar"),
    ],
)
def test_only_folders_that_this_program_wrote_are_replaced(here, make_foreign, what):
    convert("hmar-d16.pth", "weights", "--tokenizer", "vae_ch160v4096z32.pth")
    make_foreign(here / "weights")
    for more in ((), ("--overwrite",)):
        message = refuse("var_d16.pth", "weights", *more)
        assert "weights is there and is no such weights" in message and what in message
        assert "choose another destination" in message


def test_what_a_killed_save_left_behind_may_be_replaced(here):
    convert("hmar-d16.pth", "weights", "--tokenizer", "vae_ch160v4096z32.pth")
    for name in (".config.json.0123456789abcdef.tmp", ".model.safetensors.12345.tmp", checkpoint.STAGED):
        (here / "weights" / name).write_text("half")
    convert("var_d16.pth", "weights", "--overwrite")
    assert sorted(path.name for path in Path("weights").iterdir()) == ["config.json", "model.safetensors"]
    # Where the folder is known by another name, that name stays, and only what it stands for is replaced.
    Path("link").symlink_to("weights")
    convert("hmar-d16.pth", "link", "--overwrite")
    assert Path("link").is_symlink()
    assert_same(load_model("weights"), make("hmar"))
    assert not list(here.glob(".*"))


@pytest.mark.parametrize("destination", ["weights", "weights.pth", "weights.safetensors"])
def test_a_full_disk_leaves_nothing_half_written(here, destination):
    """A limit on the size of files fails a write in the middle, as a full disk does; once anew and once over old."""
    script = (
        "import resource, sys; from hmar.cli import main; resource.setrlimit(resource.RLIMIT_FSIZE, (99999, 99999)); "
        "main()"
    )
    command = [sys.executable, "-c", script, "convert", "var_d16.pth", destination, "--overwrite"]
    if destination == "weights":
        convert("hmar-d16.pth", destination, "--tokenizer", "vae_ch160v4096z32.pth")
    before = contents(here)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: could not write")
    assert "Is the disk full?" in result.stderr
    assert contents(here) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 99999


def test_any_failure_while_writing_leaves_what_was_there(here, monkeypatch):
    convert("hmar-d16.pth", "weights", "--tokenizer", "vae_ch160v4096z32.pth")
    before = contents(here)

    def fail(*arguments):
        raise KeyboardInterrupt

    # After the weights, while the description is written; then while the folders change places.
    for owner, name in ((checkpoint.json, "dumps"), (checkpoint.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            code, _, _ = hmar("convert", "var_d16.pth", "weights", "--overwrite")
        assert code == 130
        assert contents(here) == before


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub that serves repositories from a folder, and notes what it is asked for."""
    module = types.ModuleType("huggingface_hub")
    module.root = tmp_path / "hub"
    module.asked = []

    class RepositoryNotFoundError(Exception):
        pass

    def find(repository, revision):
        module.asked.append((repository, revision))
        folder = module.root / repository
        if not folder.is_dir():
            raise RepositoryNotFoundError(f"404 Client Error: {repository}\nmore lines")
        return folder

    def hf_hub_download(repository, file, *, revision=None):
        path = find(repository, revision) / file
        if not path.is_file():
            raise FileNotFoundError(f"no {file} in {repository}")
        return str(path)

    def snapshot_download(repository, *, revision=None, allow_patterns):
        assert set(allow_patterns) >= {"config.json", "model.safetensors"}
        return str(find(repository, revision))

    module.hf_hub_download, module.snapshot_download = hf_hub_download, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_hugging_face_ids(here, hub):
    published = hub.root / "Somebody" / "var"
    published.mkdir(parents=True)
    shutil.copy("var_d16.pth", published)
    assert_same(from_pretrained("Somebody/var/var_d16.pth", revision="abc123"), make("var"))
    assert hub.asked == [("Somebody/var", "abc123")]
    convert("hmar-d16.pth", hub.root / "some-body" / "hmar.d16", "--tokenizer", "vae_ch160v4096z32.pth")
    assert_same(from_pretrained("some-body/hmar.d16"), make("hmar"))
    assert_same(from_pretrained("some-body/hmar.d16", kind="tokenizer"), make("tokenizer"))
    out = convert("some-body/hmar.d16", "weights", "--tokenizer", "some-body/hmar.d16", "--revision", "v2")
    assert "written: weights" in out
    assert ("some-body/hmar.d16", "v2") in hub.asked
    assert_same(load_model("weights"), make("hmar"))

    asked = len(hub.asked)
    message = refuse("Somebody/var", "x")
    assert "has no config.json of this package; name the file in it, as in Somebody/var/model.pth" in message
    message = refuse("Nobody/nothing", "x")
    assert "no file or folder Nobody/nothing here, and Hugging Face did not give it: RepositoryNotFoundError" in message
    assert "no other.pth in Somebody/var" in refuse("Somebody/var/other.pth", "x")
    assert len(hub.asked) == asked + 3
    # What is here comes first, and what cannot be an id is not asked for.
    Path("Somebody").mkdir()
    convert("var_d16.pth", "Somebody/var")
    assert_same(from_pretrained("Somebody/var"), make("var"))
    for source in ("runs/hmar/weights", "/absolute/path", "../relative/x.pth", "single"):
        with pytest.raises(ValueError, match="there is no file or folder"):
            from_pretrained(source)
    assert len(hub.asked) == asked + 3


def test_a_file_from_hugging_face_is_trusted_no_more_than_others(here, hub):
    (hub.root / "evil" / "twin").mkdir(parents=True)
    torch.save({"model": Touch(here / "ran")}, hub.root / "evil" / "twin" / "model.pth")
    assert "was refused and nothing in it was run" in refuse("evil/twin/model.pth", "weights")
    assert not (here / "ran").exists()


def test_without_huggingface_hub_the_error_says_how_to_get_it(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refuse("FoundationVision/var/var_d16.pth", "weights")
    assert "the package huggingface_hub is needed: pip install 'hmar[hub]'" in message
    with pytest.raises(ModuleNotFoundError, match="huggingface_hub is needed"):
        from_pretrained("owner/name")


def test_the_cache_of_the_real_huggingface_hub(here, tmp_path):
    """A cache as huggingface_hub lays it out, read offline by the package itself."""
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    for repository, sources in (("models--owner--own", None), ("models--FoundationVision--var", "var_d16.pth")):
        base = tmp_path / "cache" / "hub" / repository
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text(commit)
        snapshot = base / "snapshots" / commit
        if sources is None:
            save_pretrained(snapshot, make("hmar"))
        else:
            snapshot.mkdir(parents=True)
            (snapshot / sources).symlink_to(Path(sources).resolve())
    script = """
import sys
from hmar.checkpoint import from_pretrained
print(type(from_pretrained("owner/own")).__name__, from_pretrained("FoundationVision/var/var_d16.pth").pattern)
try:
    from_pretrained("owner/another")
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "HMAR block_causal"
    assert second.startswith("there is no file or folder owner/another here, and Hugging Face did not give it: ")


def test_own_safetensors_say_what_they_are(here):
    convert("hmar-d16.pth", "weights")
    alone = shutil.copy("weights/model.safetensors", "alone.safetensors")
    assert_same(from_pretrained(alone), make("hmar"))
    assert 'holds weights of kind "hmar", not "var"' in refuse("alone.safetensors", "x", "--kind", "var")
    tensors = load_file(alone)
    del tensors["mask_embedding_C"]
    description = {"format": 1, "kind": "hmar", "model": read_description("weights")["model"]}
    for metadata, message in (
        (description, "1 missing (mask_embedding_C)"),
        ({**description, "kind": "gan"}, 'unknown kind "gan"'),
        ({"kind": "hmar"}, "lacks the entry 'model'"),
        ({"kind": "hmar", "model": 3}, "expected a section with keys, got 3"),
        ({"kind": "tokenizer", "tokenizer": {}, "sides": None}, "alone.safetensors: 'NoneType' object"),
        ([], 'unknown kind "None"'),
    ):
        save_file(tensors, "alone.safetensors", {"hmar": json.dumps(metadata)})
        assert message in refuse("alone.safetensors", "x")
