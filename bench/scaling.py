"""Training on several GPUs beside one: `python -m bench.scaling --output FILE`.

The same run (`hmar train`, started by torchrun) with each number of processes and each way of sharing, on random codes,
with as many images a process in all: what the slowest thing between the GPUs takes shows as lost speed. Speeds are the
median of the log's rows without the first, which has compilation and warm-up in it. `speedup` is tokens a second over
those of one process. Each runs as `hmar train` does by default: alone and with ddp a step is a CUDA graph, with fsdp it
is not, and where the host is slower than the GPU that shows, too. The loss after the last step is recorded as well:
with `--global-batch` the batch of all processes together stays the same, and so does the loss but for rounding. Read
next: hmar/parallelize.py.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hmar.processes import find_device
from hmar.progress import read_metrics

from . import options
from .environment import environment
from .loss_curve import write_inputs
from .results import write

KIND, VERSION = "scaling", 1
COLUMNS = ("tokens_per_second", "images_per_second", "mfu", "peak_memory_gb")


def run(chosen: argparse.Namespace, folder: Path, images: int, processes: int, parallel: str) -> dict:
    """The numbers of one run; CalledProcessError if it fails."""
    output = folder / f"run-{images}-{parallel}-{processes}"
    batch = images if chosen.global_batch else images * processes
    every = max(1, chosen.steps // 8)
    keys = {
        "preset": chosen.preset,
        "output_dir": output,
        "tokenizer_weights": folder / "tokenizer",
        "data.name": "codes",
        "data.path": folder / "codes",
        "data.workers": chosen.workers,
        "steps": chosen.steps,
        "batch_size": batch,
        "parallel": parallel,
        "compile": chosen.compile,
        "device": chosen.device,
        "log_every": every,
        "checkpoint_every": 10 * chosen.steps,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "hmar", "train", chosen.stage, *(f"{key}={value}" for key, value in keys.items()), "--quiet"]
    subprocess.run(command, check=True)
    rows = read_metrics(output / "metrics.jsonl")
    found = {"processes": processes, "parallel": parallel, "batch": batch, "loss": rows[-1]["loss"]}
    return found | {
        name: statistics.median(row[name] for row in rows[1:]) if name in rows[-1] else None for name in COLUMNS
    }


def report(row: dict, alone: dict, results: list[dict]) -> None:
    row["speedup"] = row["tokens_per_second"] / alone["tokens_per_second"]
    results.append(row)
    speed = f"{row['tokens_per_second']:.4g} tokens/s, {row['speedup']:.3f} times one process"
    print(f"{row['parallel']} {row['processes']}, batch {row['batch']}: {speed}, loss {row['loss']:.4f}", flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    takes = parser.add_argument
    takes("--processes", type=options.integers, default=[1, 2], help="numbers of processes, 1 first (1,2)")
    takes("--parallel", type=options.names, default=["ddp", "fsdp"], help="ways of sharing (ddp,fsdp)")
    takes("--stage", choices=("next-scale", "var"), default="next-scale")
    takes("--preset", default="d16-256")
    takes("--batch", type=options.integers, default=[32, 96], help="images of a process (32,96)")
    takes("--global-batch", action="store_true", help="--batch is that of all processes together")
    takes("--steps", type=int, default=80)
    takes("--workers", type=int, default=2, help="loader processes, of each process")
    takes("--compile", choices=("false", "blocks"), default="blocks")
    takes("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_record(parser)
    chosen = parser.parse_args(arguments)
    if chosen.processes[0] != 1:
        parser.error(f"--processes begins with {chosen.processes[0]}: speed is compared with one process, as in 1,2")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, chosen.preset, 4096)
        for images in chosen.batch:
            alone = run(chosen, folder, images, 1, chosen.parallel[0])  # shares nothing, whatever the way
            report(alone, alone, results)
            for parallel in chosen.parallel:
                for processes in chosen.processes[1:]:
                    report(run(chosen, folder, images, processes, parallel), alone, results)
    settings = {name: value for name, value in vars(chosen).items() if name not in ("output", "commit")}
    facts = environment(find_device(chosen.device), chosen.commit)
    write(chosen.output, {"kind": KIND, "version": VERSION, "environment": facts, "settings": settings}, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
