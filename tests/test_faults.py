"""Whatever happens to a run, it loses no more than the steps since its last checkpoint: killed, stopped, disk full."""

import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch

from hmar import checkpoint
from hmar.progress import read_metrics
from hmar.recipe import apply_overrides, make_config
from hmar.train import Trainer, train
from run_files import weights

PATIENCE = 60
STEPS = 12


def configure(folder, *overrides):
    """Stage 1 with averages and everything random, a checkpoint every second step."""
    runs = folder.parent
    sizes = ("preset=tiny", "model.num_classes=10", "device=cpu", "batch_size=8", "optimizer.lr=1e-2")
    drawn = ("model.drop_path=0.3", "model.class_drop=0.5", "ema=0.5")
    length = (f"steps={STEPS}", "log_every=1", "checkpoint_every=2")
    base = ("stage=next-scale", f"output_dir={folder}", f"tokenizer_weights={runs / 'tokenizer'}")
    return make_config(apply_overrides({}, [*base, *sizes, *drawn, *length, *overrides]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tokenizer, and the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = ("preset=tiny", "model.num_classes=10", "device=cpu", "batch_size=8", "steps=10")
    train(
        make_config(apply_overrides({}, ["stage=tokenizer", f"output_dir={folder / 'tokenizer'}", *sizes])),
        progress=False,
    )
    train(configure(folder / "whole"), progress=False)
    return folder


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


# What happens to a process, by name: it cannot be handed functions of a test.


def _killed_within_a_step():
    advance = Trainer._advance

    def advance_or_die(self, *arguments):
        if self.step == 7:
            self.averaged.update = lambda found_inf: _die()  # the weights are new, their averages are not
        advance(self, *arguments)

    Trainer._advance = advance_or_die


def _killed_while_writing_a_checkpoint():
    save = torch.save

    def save_half(state, path):
        save(state, path)
        if state["step"] == 8:
            os.truncate(path, os.path.getsize(path) // 2)
            _die()

    torch.save = save_half


def _killed_before_a_checkpoint_has_its_name():
    _at_call("_rename", lambda temporary, path: path.name == "step-00000008.pt", after=False)


def _killed_when_a_checkpoint_has_its_name():
    _at_call("_rename", lambda temporary, path: path.name == "step-00000008.pt", after=True)


def _killed_while_old_checkpoints_are_deleted():
    _at_call("delete_checkpoint", lambda path: path.name == "step-00000004.pt", after=True)


def _killed_while_weights_are_written():
    _at_call("_rename", lambda temporary, path: path.name == "config.json", after=False)


def _at_call(name, when, after):
    function = getattr(checkpoint, name)

    def call_or_die(*arguments):
        if when(*arguments) and not after:
            _die()
        result = function(*arguments)
        if when(*arguments) and after:
            _die()
        return result

    setattr(checkpoint, name, call_or_die)


def _disk_full_at_a_checkpoint():
    """The disk takes no more than 20 kB a file from step 7 on, enough for the log."""
    _after_step_7(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))


def _disk_full_at_the_log():
    _after_step_7(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16)))


def _after_step_7(action):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    advance = Trainer._advance

    def advance_and_act(self, *arguments):
        advance(self, *arguments)
        if self.step == 7:
            action()

    Trainer._advance = advance_and_act


def _work(config, fault, answers):
    torch.set_num_threads(1)
    if fault:
        globals()[fault]()
    try:
        answers.put(("finished", train(config, progress=False, resume=True).step))
    except Exception as error:
        answers.put((type(error).__name__, str(error)))


@pytest.fixture(scope="module")
def start():
    """Train in a process of its own; returns the process and where it says what became of the run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hmar.train", "torch.utils.tensorboard", "torch._dynamo", "sklearn.datasets", "pytest"]
    )

    def launch(config, fault=None):
        answers = context.Queue()
        process = context.Process(target=_work, args=(config, fault, answers))
        process.start()
        return process, answers

    return launch


def wait_for_steps(folder, number):
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(folder / "metrics.jsonl")) < number and time.monotonic() < deadline:
        time.sleep(0.005)


def assert_same_run(folder, runs):
    actual, expected = weights(folder), weights(runs / "whole")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    rows = [read_metrics(run / "metrics.jsonl") for run in (folder, runs / "whole")]
    losses = [[(row["step"], row["loss"]) for row in of_run] for of_run in rows]
    assert losses[0] == losses[1]
    assert not [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".old"))]
    names = [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]
    assert names == [f"step-{STEPS:08d}.pt", f"step-{STEPS - 2:08d}.pt"]


@pytest.mark.parametrize(
    ("fault", "newest"),
    [
        ("_killed_within_a_step", 6),
        ("_killed_while_writing_a_checkpoint", 6),
        ("_killed_before_a_checkpoint_has_its_name", 6),
        ("_killed_when_a_checkpoint_has_its_name", 8),
        ("_killed_while_old_checkpoints_are_deleted", 8),
        ("_killed_while_weights_are_written", 12),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(fault, newest, runs, start):
    config = configure(runs / fault)
    process, _ = start(config, fault)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    found, state = checkpoint.newest_checkpoint(runs / fault / "checkpoints", pytest.fail)
    assert (found.name, state["step"]) == (f"step-{newest:08d}.pt", newest)
    assert train(config, progress=False, resume=True).step == STEPS
    assert_same_run(runs / fault, runs)


def test_a_run_killed_at_random_moments_goes_on_to_the_same_bits(runs, start):
    config = configure(runs / "random")
    draw = random.Random(0)
    for steps in (2, 5, 8):
        process, _ = start(config)
        wait_for_steps(runs / "random", steps)
        time.sleep(draw.uniform(0, 0.04))
        process.kill()
        process.join()
    train(config, progress=False, resume=True)
    assert_same_run(runs / "random", runs)


@pytest.mark.parametrize("fault", ["_disk_full_at_a_checkpoint", "_disk_full_at_the_log"])
def test_a_full_disk_is_an_error_that_leaves_the_last_good_checkpoint(fault, runs, start):
    config = configure(runs / fault)
    process, answers = start(config, fault)
    kind, message = answers.get(timeout=PATIENCE)
    process.join(PATIENCE)
    what = "step-00000008.pt" if fault == "_disk_full_at_a_checkpoint" else "metrics.jsonl"
    assert kind == "OSError" and "could not write" in message and what in message and "are intact" in message
    found, state = checkpoint.newest_checkpoint(runs / fault / "checkpoints", pytest.fail)
    assert state["step"] == 6
    assert sorted(path.name for path in found.parent.iterdir()) == ["step-00000004.pt", "step-00000006.pt"]
    train(config, progress=False, resume=True)
    assert_same_run(runs / fault, runs)


def test_sigterm_saves_and_ends_with_the_way_to_go_on(runs, start):
    config = configure(runs / "term", "checkpoint_every=1000", "steps=100000", "log_every=1")
    process, answers = start(config)
    wait_for_steps(runs / "term", 3)
    process.terminate()
    kind, message = answers.get(timeout=PATIENCE)
    assert kind == "Interrupted" and "stopped by SIGTERM after step" in message
    _, state = checkpoint.newest_checkpoint(runs / "term" / "checkpoints", pytest.fail)
    assert f"after step {state['step']}," in message and state["step"] >= 3
