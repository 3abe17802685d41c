"""Runs that several processes share, over gloo on the CPU: the same curve, any number of processes, one end for all."""

import faulthandler
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import hmar.parallelize
import hmar.sharded
import hmar.train
from hmar import checkpoint
from hmar.parallelize import compile_objective
from hmar.processes import Processes
from hmar.progress import read_metrics
from hmar.recipe import apply_overrides, make_config
from hmar.train import Interrupted, Trainer, train
from run_files import weights

PATIENCE = 60


def configure(stage, folder, *overrides, runs):
    """A tiny run with everything random switched on."""
    built_on = [f"tokenizer_weights={runs / 'tokenizer'}"]
    if stage == "masked":
        built_on.append(f"next_scale_weights={runs / 'next-scale'}")
    sizes = ("preset=tiny", "model.num_classes=10", "model.depth=4", "model.mask_depth=2", "device=cpu")
    length = ("steps=6", "batch_size=8", "log_every=1", "checkpoint_every=100", "optimizer.lr=1e-2")
    drawn = ("model.drop_path=0.3", "model.class_drop=0.5", "ema=0.5")
    base = (f"stage={stage}", f"output_dir={folder}", *sizes, *length, *drawn)
    return make_config(apply_overrides({}, [*base, *built_on, *overrides]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    sizes = ("preset=tiny", "model.num_classes=10", "device=cpu", "batch_size=8")
    tokenizer = apply_overrides({}, ["stage=tokenizer", f"output_dir={folder / 'tokenizer'}", *sizes, "steps=10"])
    train(make_config(tokenizer), progress=False)
    train(configure("next-scale", folder / "next-scale", "steps=2", runs=folder), progress=False)
    return folder


# What a process of a run does beside training, by name: processes cannot be handed functions of a test.


def _stop_second_after_3(trainer):
    if trainer.step == 3 and trainer.processes.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def _stop_first_after_3(trainer):
    if trainer.step == 3 and trainer.processes.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)


def _fail_in_second_after_3(trainer):
    if trainer.step == 3 and trainer.processes.rank == 1:
        raise FloatingPointError("the second process has enough")


def _fail_in_second_while_first_sleeps(trainer):
    if trainer.step == 3:
        if trainer.processes.rank == 1:
            raise FloatingPointError("the second process has enough")
        time.sleep(PATIENCE)


class _SlowStore:
    def __init__(self, store):
        self.store = store

    def check(self, keys):
        time.sleep(3)
        return self.store.check(keys)


def _slow_store_in_second_after_3(trainer):
    if trainer.step == 3 and trainer.processes.rank == 1:
        trainer.processes._store = _SlowStore(trainer.processes._store)
        time.sleep(1.5)


def _full_disk_in_second(trainer):
    if trainer.step == 5 and trainer.processes.rank == 1:
        hmar.sharded.dcp.FileSystemWriter.write_data = _no_space


def _no_space(*arguments):
    raise OSError(28, "No space left on device")


def _captured():
    """Steps as they are on GPUs, with recorders that record nothing, and sums as of larger models."""
    hmar.parallelize.BYTES_SUMMED = 100_000
    hmar.train.captures_steps = lambda config, device, processes: True
    hmar.train.Recorder = lambda device: None


def _work(rank, size, port, config, options, after_step, backend, captured, answers):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stderr = open(f"{config.output_dir}-{rank}.stderr", "w")  # noqa: SIM115 - for as long as the process lives
    faulthandler.register(signal.SIGUSR1, sys.stderr)
    if after_step:
        advance = Trainer._advance

        def advance_and_act(self, *arguments):
            advance(self, *arguments)
            globals()[after_step](self)

        Trainer._advance = advance_and_act
    if backend:
        hmar.train.compile_objective = lambda objective, mode: compile_objective(objective, mode, backend)
    if captured:
        _captured()
    try:
        result = train(config, progress=False, **options)
        answer = ("finished", result.step)
    except Interrupted as interruption:
        answer = ("interrupted", interruption.step)
    except Exception as error:
        answer = (type(error).__name__, str(error))
    if any(thread.name == "hmar-watcher" for thread in threading.enumerate()):
        answer = ("not alone", None)
    answers.put((rank, answer))


@pytest.fixture(scope="module")
def start():
    """Train in several processes, which leave what became of them; None of one that did not live to tell."""
    context = multiprocessing.get_context("forkserver")
    imported_by_a_run = ["hmar.train", "torch.utils.tensorboard", "torch._dynamo", "torch.distributed.fsdp", "sympy"]
    context.set_forkserver_preload([*imported_by_a_run, "sklearn.datasets", "pytest"])

    def launch(config, size=2, after_step=None, backend=None, captured=False, **options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        answers = context.Queue()
        workers = [
            context.Process(
                target=_work, args=(rank, size, port, config, options, after_step, backend, captured, answers)
            )
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + PATIENCE
        for worker in workers:
            worker.join(max(0, deadline - time.monotonic()))
        hanging = [worker for worker in workers if worker.is_alive()]
        for worker in hanging:
            os.kill(worker.pid, signal.SIGUSR1)
            time.sleep(1)
            worker.kill()
        assert not hanging, "".join(Path(f"{config.output_dir}-{rank}.stderr").read_text() for rank in range(size))
        found = dict.fromkeys(range(size))
        while not answers.empty():
            rank, answer = answers.get()
            found[rank] = answer
        return list(found.values())

    return launch


def assert_same_run(actual: Path, expected: Path, tolerance=2e-3):
    """Losses, norms and weights equal but for rounding, which Adam's first steps enlarge."""
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (actual, expected)]
    assert len(rows[0]) == len(rows[1]) > 0
    for a, b in zip(*rows, strict=True):
        for name in ("step", "loss", "grad_norm", "accuracy", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    expected_weights = weights(expected)
    for name, tensor in weights(actual).items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, runs):
    """Folders of runs in this process, one a stage."""
    folders = {}

    def of(stage):
        if stage not in folders:
            folders[stage] = tmp_path_factory.mktemp(stage)
            train(configure(stage, folders[stage], runs=runs), progress=False)
        return folders[stage]

    return of


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("next-scale", ("parallel=ddp", "accumulate=2")),
        ("masked", ("parallel=ddp",)),
        ("next-scale", ("parallel=fsdp", "activation_checkpointing=blocks")),
        ("masked", ("parallel=fsdp", "accumulate=2")),
        ("var", ("parallel=hsdp", "shard_size=1")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_two_processes_give_the_curve_of_one(stage, options, tmp_path, runs, alone, start):
    config = configure(stage, tmp_path / "run", *options, runs=runs)
    assert start(config) == [("finished", 6)] * 2
    assert_same_run(tmp_path / "run", alone(stage))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone(stage).iterdir()}


@pytest.mark.parametrize(("parallel", "mode"), [("fsdp", "blocks"), ("ddp", "model")])
def test_compiled_graphs_are_shared_as_well(parallel, mode, tmp_path, runs, alone, start):
    options = (f"parallel={parallel}", f"compile={mode}", "activation_checkpointing=mlp")
    config = configure("next-scale", tmp_path / "run", *options, runs=runs)
    assert start(config, backend="aot_eager") == [("finished", 6)] * 2
    assert_same_run(tmp_path / "run", alone("next-scale"))


@pytest.mark.parametrize(
    ("stage", "options"),
    [("next-scale", ("accumulate=2", "compile=blocks")), ("masked", ("accumulate=4",)), ("var", ())],
    ids=["next-scale", "masked", "var"],
)
def test_gradients_of_captured_steps_are_averaged(stage, options, tmp_path, runs, alone, start):
    config = configure(stage, tmp_path / "run", *options, runs=runs)
    assert start(config, backend="aot_eager", captured=True) == [("finished", 6)] * 2
    assert_same_run(tmp_path / "run", alone(stage))


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp")), ((2, "ddp"), (2, "fsdp")), ((2, "fsdp"), (2, "ddp"))],
    ids=lambda value: f"{value[0]}-{value[1]}",
)
def test_a_run_goes_on_in_another_number_of_processes(before, after, tmp_path, runs, alone, start):
    size, parallel = before
    config = configure("next-scale", tmp_path / "run", f"parallel={parallel}", runs=runs)
    stopped = start(config, size, after_step="_stop_first_after_3")
    # The second process hears of it one step later.
    assert stopped == [("interrupted", 3)] if size == 1 else [("interrupted", 4)] * 2
    (saved,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.is_dir() == (parallel == "fsdp")
    size, parallel = after
    config = configure("next-scale", tmp_path / "run", f"parallel={parallel}", runs=runs)
    assert start(config, size, resume=True) == [("finished", 6)] * size
    assert_same_run(tmp_path / "run", alone("next-scale"))


def test_an_interrupted_sharded_run_ends_with_the_same_bits(tmp_path, runs, start):
    whole = configure("masked", tmp_path / "whole", "parallel=fsdp", runs=runs)
    assert start(whole) == [("finished", 6)] * 2
    parts = configure("masked", tmp_path / "parts", "parallel=fsdp", runs=runs)
    assert start(parts, after_step="_stop_second_after_3") == [("interrupted", 4)] * 2
    assert start(parts, resume=True) == [("finished", 6)] * 2
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())


def test_a_damaged_folder_is_named_and_passed_over(tmp_path, runs, alone, start, capfd):
    config = configure("next-scale", tmp_path / "run", "parallel=fsdp", "checkpoint_every=2", "steps=4", runs=runs)
    start(config)
    newest, older = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert (newest.name, older.name) == ("step-00000004", "step-00000002")
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(checkpoint.DamagedCheckpointError, match=f"{newest} is damaged: {name} is not as it was"):
            checkpoint.load_checkpoint(newest)
        (newest / name).write_bytes(whole)
        checkpoint.load_checkpoint(newest)
    (newest / "__1_0.distcp").unlink()
    train(configure("next-scale", tmp_path / "run", runs=runs), resume=True, progress=True)
    said = capfd.readouterr().err
    assert f"{newest} is damaged: " in said and "passed over" in said
    assert f"going on: {older} holds the state after step 2" in said
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_ends_all_and_leaves_the_last_good_checkpoint(tmp_path, runs, start):
    config = configure("next-scale", tmp_path / "run", "parallel=fsdp", "checkpoint_every=2", runs=runs)
    answers = start(config, after_step="_full_disk_in_second")
    for kind, message in answers:
        assert kind in ("OSError", "ProcessFailedError")
        assert "could not write" in message and "Is the disk full? Files written before are intact" in message
    folder = tmp_path / "run" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step-00000004", "step-00000002"}
    assert start(config, resume=True) == [("finished", 6)] * 2


@pytest.mark.parametrize("action", ["_fail_in_second_after_3", "_fail_in_second_while_first_sleeps"])
def test_a_failure_of_one_ends_all_with_its_reason(action, tmp_path, runs, start):
    started = time.monotonic()
    first, second = start(configure("next-scale", tmp_path / "run", runs=runs), after_step=action)
    assert time.monotonic() - started < PATIENCE / 2
    assert second == ("FloatingPointError", "the second process has enough")
    reason = "process 1 failed: FloatingPointError: the second process has enough"
    if action == "_fail_in_second_after_3":
        assert first == ("ProcessFailedError", reason)
    else:
        assert first is None
        assert f"error: {reason}; process 0 ends with it" in (tmp_path / "run-0.stderr").read_text()


def test_no_thread_of_a_run_outlives_it(tmp_path, runs, start):
    """One that gives up gloo's works while the interpreter ends aborts the process."""
    config = configure("next-scale", tmp_path / "run", runs=runs)
    assert start(config, after_step="_slow_store_in_second_after_3") == [("finished", 6)] * 2


def test_errors_of_the_first_are_raised_in_all(tmp_path, runs, start):
    config = configure("next-scale", tmp_path / "run", "steps=1", runs=runs)
    assert start(config) == [("finished", 1)] * 2
    for kind, message in start(config):
        assert kind in ("ValueError", "ProcessFailedError") and "already holds a run" in message


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (
            "next-scale",
            ("batch_size=6", "accumulate=2"),
            "expected a multiple of 4 .processes x accumulate., such as 4",
        ),
        ("next-scale", ("parallel=hsdp", "shard_size=3"), "shard_size=3 does not divide the 2 processes"),
        ("masked", ("parallel=fsdp", "compile=model"), "compile=model and parallel=fsdp exclude .* use compile=blocks"),
        ("next-scale", ("device=cuda:0",), "is one GPU for 2 processes: use device=cuda"),
    ],
)
def test_what_processes_cannot_share_is_refused(stage, overrides, message, tmp_path, runs, monkeypatch):
    processes = Processes()
    processes.size = processes.per_host = 2
    with pytest.raises(ValueError, match=message):
        config = configure(stage, tmp_path, *overrides, runs=runs)
        hmar.train.find_device(config.device, processes)
        hmar.train.check_division(config, processes)


def test_a_tokenizer_is_trained_in_one_process(tmp_path):
    processes = Processes()
    processes.size = 2
    config = make_config({"stage": "tokenizer", "preset": "tiny", "output_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="stage tokenizer trains in one process, not in 2"):
        hmar.train.check_division(config, processes)


def test_shares_are_disjoint_and_whole():
    taken = []
    for rank in range(4):
        processes = Processes()
        processes.rank, processes.size = rank, 4
        taken += range(12)[processes.share(12)]
    assert taken == list(range(12))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "ddp cuda_graphs=false", "fsdp", "hsdp"])
def test_two_gpus_give_the_curve_of_one(parallel, tmp_path, runs, start):
    options = ("device=cuda", "precision=fp32", "accumulate=2", "compile=blocks")
    train(configure("next-scale", tmp_path / "one", *options, runs=runs), progress=False)
    config = configure("next-scale", tmp_path / "two", *options, *f"parallel={parallel}".split(), runs=runs)
    assert start(config) == [("finished", 6)] * 2
    assert_same_run(tmp_path / "two", tmp_path / "one", tolerance=1e-2)
    assert math.isfinite(read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]["peak_memory_gb"])
