"""What the attention kernels are busy with: `python -m bench.profile_attention --output FILE` on a Hopper GPU.

Nsight Compute (`ncu`, of the CUDA toolkit) runs this module once more, with --steps. That calls the Hopper kernels once
a cell, after a warm-up that is not profiled: the forward for any logits, the forward with a bound, the backward. ncu
repeats each kernel as often as its counters take, with memory as it was before and caches flushed. Clocks are left to
the card, as when kernels are timed; each row tells its own. Rows are one a launch: time, busy shares of the units,
bytes, why warps waited (cycles an instruction, by reason), instructions by opcode and category, and the pairs that
attend in what the launch computes, with the FLOPs of their products. Percentages are of a unit's peak: of tensor cores,
exponential units, FMA, ALU, L1 and issue slots while their SM is active, of L2 and memory over the whole time.

Results are one JSON file of kind "attention_profile", written at the end. Read next: reports/attention_profile.py.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hmar_kernels import attention
from hmar_kernels.attention import hopper

from .environment import environment
from .options import add_record, names
from .results import write
from .shapes import Cell, cells

KIND, VERSION = "attention_profile", 1
ROOT = Path(__file__).resolve().parents[1]
LOGIT_BOUND = 60.0  # far above any |logit| of normal noise
LEAST_STALL = 0.01  # share of a warp's time below which a reason is left out

# Field of a row -> metric, in per cent.
PERCENTAGES = {
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_min_pct": "sm__pipe_tensor_cycles_active.min.pct_of_peak_sustained_active",  # of the least busy SM
    "tensor_max_pct": "sm__pipe_tensor_cycles_active.max.pct_of_peak_sustained_active",
    "exponential_pct": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "fma_pct": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "alu_pct": "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_pct": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l1_pct": "l1tex__throughput.avg.pct_of_peak_sustained_active",  # with shared memory
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_pct": "lts__t_sector_hit_rate.pct",
    "dram_pct": "dram__cycles_active.avg.pct_of_peak_sustained_elapsed",
}
# Field of a row -> metric, a whole number.
COUNTS = {
    "num_sms": "launch__sm_count",
    "blocks": "launch__grid_size",
    "registers": "launch__registers_per_thread",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
}
TIME, CYCLES, ACTIVE_CYCLES = "gpu__time_duration.sum", "sm__cycles_elapsed.max", "sm__cycles_active.avg"
PER_CYCLE = "sm__inst_executed.avg.per_cycle_active"
OPCODES, CATEGORIES = "sass__inst_executed_per_opcode", "sass__inst_executed_per_opcode_category"
REASONS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected"),
    *("short_scoreboard", "sleeping", "tex_throttle", "wait"),
)
STALLS = {reason: f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in REASONS}

METRICS = (*PERCENTAGES.values(), *COUNTS.values(), TIME, CYCLES, ACTIVE_CYCLES, PER_CYCLE, OPCODES, CATEGORIES)
METRICS += tuple(STALLS.values())
"""All that ncu is asked for."""
UNITS = {TIME: "ns", "dram__bytes_read.sum": "byte", "dram__bytes_write.sum": "byte"}  # where others are possible


def default_cells() -> list[Cell]:
    """The anchors at head dim 64, and 1024 px at head dim 128."""
    return cells(head_dims=[64]) + cells(resolutions=[1024], head_dims=[128])


CELL = re.compile(r"(?P<pattern>\w+)-(?P<px>\d+)(-b(?P<b>\d+)h(?P<h>\d+)d(?P<d>\d+)-(?P<dtype>bfloat16|float16))?")


def cell_of(name: str) -> Cell:
    """The cell whose `str` this is; without sizes an anchor at head dim 64 in bfloat16."""
    found = CELL.fullmatch(name)
    if not found:
        example = f"block_causal-256 or {default_cells()[-1]}"
        raise argparse.ArgumentTypeError(f"expected a cell such as {example}, got {name!r}")
    sizes = {"head_dims": [64]}
    if found["b"]:
        sizes = {"batches": [int(found["b"])], "heads": int(found["h"]), "head_dims": [int(found["d"])]}
    try:
        (cell,) = cells(
            patterns=[found["pattern"]], resolutions=[int(found["px"])], dtype=found["dtype"] or "bfloat16", **sizes
        )
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return cell


def cells_of(text: str) -> list[Cell]:
    return [cell_of(name) for name in names(text)]


def call_each(chosen: list[Cell], device: torch.device) -> None:
    """What ncu watches."""
    for number, cell in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {cell}", flush=True)
        torch.manual_seed(0)
        shape = (cell.batch, cell.length, cell.heads, cell.head_dim)
        *leaves, do = (torch.randn(shape, device=device, dtype=cell.torch_dtype).transpose(1, 2) for _ in range(4))
        leaves = [x.requires_grad_() for x in leaves]
        options = {"mask": cell.mask(), "scale": cell.head_dim**-0.5, "impl": "hopper"}
        _call(leaves, do, options)
        with torch.cuda.profiler.profile():
            _call(leaves, do, options)
        del leaves, do
        torch.cuda.empty_cache()


def _call(leaves: list[torch.Tensor], do: torch.Tensor, options: dict) -> None:
    out = attention(*leaves, **options)
    with torch.no_grad():
        attention(*leaves, **options, logit_bound=LOGIT_BOUND)
    torch.autograd.grad(out, leaves, do)
    torch.cuda.synchronize()


def find_ncu() -> str:
    """Path of ncu. ValueError where there is none."""
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    places = [str(Path(home) / "bin" / "ncu") for home in (*homes, "/usr/local/cuda")]
    for place in ("ncu", *places):
        if found := shutil.which(place):
            return found
    where = " nor at ".join(places)
    raise ValueError(f"Nsight Compute's ncu is neither on PATH nor at {where}; the CUDA toolkit has it")


def version_of(ncu: str) -> str | None:
    said = subprocess.run([ncu, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Version (\S+)", said)
    return found[1] if found else None


def profile(ncu: str, chosen: list[Cell]) -> str:
    """What ncu wrote: messages and CSV. ValueError with its words where it failed."""
    steps = [sys.executable, "-m", "bench.profile_attention", "--steps", "--cells", ",".join(map(str, chosen))]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        options = {
            "--profile-from-start": "off",
            "--clock-control": "none",
            "--kernel-name": "regex:hopper_.*_kernel",
            "--metrics": ",".join(METRICS),
            "--print-metric-instances": "details",
            "--page": "raw",
            "--print-units": "base",
            "--log-file": str(log),
        }
        words = [word for option in options.items() for word in option]
        status, said = run([ncu, "--csv", *words, *steps])
        written = log.read_text() if log.exists() else ""
    if status != 0:
        raise ValueError(f"ncu failed with exit status {status}. {words_of_ncu(written, said)}")
    if len(table_of(written)) < 3:
        raise ValueError(f"ncu profiled no kernel. {words_of_ncu(written, said)}")
    return written


def run(command: list[str]) -> tuple[int, list[str]]:
    """Exit status, and what was printed, which is passed on. An exception here ends all processes of the command."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
    said = []
    try:
        for line in process.stdout:
            said.append(line.rstrip())
            print(said[-1], flush=True)
        return process.wait(), said
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(5)
        raise


def words_of_ncu(written: str, said: list[str]) -> str:
    lines = [line for line in (*written.splitlines(), *said) if line.startswith(("==ERROR==", "==WARNING=="))]
    lines = list(dict.fromkeys(lines)) or said[-3:]
    told = "It said:\n" + "\n".join(lines) if lines else "It said nothing."
    if "ERR_NVGPUCTRPERM" in told:
        told += (
            "\nThe driver lets only root read performance counters here: run this as root, or load the driver's module "
            "with NVreg_RestrictProfilingToAdminUsers=0"
        )
    return told


def table_of(written: str) -> list[list[str]]:
    """Header, units and a line a launch, without ncu's messages."""
    csv.field_size_limit(1 << 30)  # a metric's instances are one field
    return list(csv.reader(line for line in written.splitlines() if line.startswith('"')))


def read_launches(written: str) -> list[dict]:
    """Numbers of each launch in order, from what ncu wrote. ValueError where a number is missing."""
    head, units, *lines = table_of(written)
    missing = [metric for metric in METRICS if metric not in head]
    if missing:
        raise ValueError(f"ncu did not give these metrics: {', '.join(missing)}")
    for metric, unit in UNITS.items():
        if (got := units[head.index(metric)]) != unit:
            raise ValueError(f"ncu gave {metric} in {got!r}, expected {unit!r}")
    return [_launch(dict(zip(head, line, strict=True))) for line in lines]


def _launch(given: dict[str, str]) -> dict:
    kernel = given["Kernel Name"].removeprefix("void ").rpartition("(")[0] or given["Kernel Name"]
    value = {}
    for metric in METRICS:
        try:
            value[metric] = _number(given[metric])
        except ValueError:
            raise ValueError(f"ncu gave {given[metric]!r} for {metric} of {kernel}, expected a number") from None
    waits = {reason: value[metric] for reason, metric in STALLS.items()}
    least = LEAST_STALL * sum(waits.values())
    return {
        "kernel": kernel,
        "ms": value[TIME] / 1e6,
        "clock_ghz": value[CYCLES] / value[TIME],
        "instructions_per_cycle": value[PER_CYCLE],
        **{field: value[metric] for field, metric in PERCENTAGES.items()},
        "sm_active_pct": 100 * value[ACTIVE_CYCLES] / value[CYCLES],
        **{field: int(value[metric]) for field, metric in COUNTS.items()},
        "instructions": int(value[OPCODES]),
        "stalls": {name: wait for name, wait in sorted(waits.items(), key=lambda item: -item[1]) if wait >= least},
        "opcodes": _instances(given[OPCODES], OPCODES, kernel),
        "categories": _instances(given[CATEGORIES], CATEGORIES, kernel),
    }


def _number(text: str) -> float:
    """1024.5 of "1,024.5"; 96 of "96 (0: 96)"."""
    number = float(text.partition(" (")[0].replace(",", ""))
    if not math.isfinite(number):
        raise ValueError
    return number


def _instances(text: str, metric: str, kernel: str) -> dict[str, int]:
    """Those of "1,030 (FADD: 1,000; FMUL: 30)"."""
    total, _, listed = text.partition(" (")
    pairs = [part.rpartition(": ") for part in listed.removesuffix(")").split("; ") if part]
    found = {name: int(count.replace(",", "")) for name, _, count in pairs}
    if not found or sum(found.values()) != _number(total):
        raise ValueError(f"ncu gave {len(found)} parts of {total} for {metric} of {kernel}, which do not add up")
    return found


PASS = re.compile(r"hopper_(forward|dq|dkdv|backward)_kernel\b")


def pass_of(kernel: str) -> str:
    found = PASS.search(kernel)
    if not found:
        raise ValueError(f"ncu profiled {kernel}, which is none of the attention kernels")
    return found[1]


def expected_launches(cell: Cell, num_sms: int) -> list[dict]:
    """What `call_each` launches for a cell: pass, bounded (None in a backward), pairs that attend and FLOPs.

    A backward in one pass leaves out dq of the last heads, for which a dq pass follows (attention/hopper.py).
    """
    mask, heads = cell.mask(), cell.batch * cell.heads
    tiles, last = hopper.select_tiles(cell.head_dim, mask), 0
    if tiles.backward is not None:
        jobs = hopper.make_plans(mask, tiles, "cpu")["backward"].jobs
        shape = cell.batch, cell.heads, cell.length, cell.head_dim
        _, last = hopper.one_pass_heads(shape, cell.length, len(jobs), num_sms)

    def launch(name: str, heads: int, products: int, bounded: bool | None = None) -> dict:
        flops = 2 * cell.head_dim * cell.pairs * products
        return {"pass": name, "bounded": bounded, "pairs": cell.pairs * heads, "flops": flops}

    forwards = [launch("forward", heads, 2 * heads, bounded) for bounded in (False, True)]
    if last == 0:
        return [*forwards, launch("dq", heads, 3 * heads), launch("dkdv", heads, 4 * heads)]
    return [*forwards, launch("backward", heads, 5 * heads - last), launch("dq", last, 3 * last)]


def rows_of(chosen: list[Cell], launches: list[dict]) -> list[dict]:
    """The launches with their cells. ValueError unless they are those that the cells make."""
    rows, left = [], list(launches)
    for cell in chosen:
        expected = expected_launches(cell, launches[0]["num_sms"])
        taken, left = left[: len(expected)], left[len(expected) :]
        wanted, got = [x["pass"] for x in expected], [pass_of(x["kernel"]) for x in taken]
        if got != wanted:
            raise ValueError(f"{cell}: expected launches of {', '.join(wanted)}, ncu has {', '.join(got) or 'none'}")
        place = {"pattern": cell.pattern, "resolution": cell.resolution, "batch": cell.batch, "heads": cell.heads}
        place |= {"head_dim": cell.head_dim, "dtype": cell.dtype}
        rows += [place | about | numbers for about, numbers in zip(expected, taken, strict=True)]
    if left:
        raise ValueError(f"ncu has {len(left)} launches more than the cells make, the first of {left[0]['kernel']}")
    return rows


def line(row: dict) -> str:
    launch = row["pass"] + (", bounded" if row["bounded"] else "")
    cell = f"{row['pattern']}-{row['resolution']}-b{row['batch']}h{row['heads']}d{row['head_dim']}"
    units = {"tensor": "tensor", "exp": "exponential", "issue": "issue", "L2": "l2", "DRAM": "dram"}
    busy = ", ".join(f"{name} {row[f'{unit}_pct']:.0f} %" for name, unit in units.items())
    return f"{cell:34} {launch:16} {row['ms']:8.4f} ms at {row['clock_ghz']:.2f} GHz: {busy}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_attention", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells",
        type=cells_of,
        metavar="A,B",
        default=default_cells(),
        help=f"such as block_causal-256 or {default_cells()[-1]}; default: {','.join(map(str, default_cells()))}",
    )
    parser.add_argument("--steps", action="store_true", help="only call the kernels, as ncu has it done")
    add_record(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: counters are those of a GPU")
    if options.steps:
        call_each(options.cells, torch.device("cuda"))
        return 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ncu ends too
    try:
        ncu = find_ncu()
        facts = environment(torch.device("cuda"), options.commit)
        method = {"tool": f"ncu {version_of(ncu)}", "clock_control": "none", "cache_control": "all"}
        rows = rows_of(options.cells, read_launches(profile(ncu, options.cells)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    for row in rows:
        print(line(row))
    write(options.output, {"kind": KIND, "version": VERSION, "environment": facts, "method": method}, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
