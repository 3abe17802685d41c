"""Benchmark of the fused operators beside attention: `python -m bench.operators` on a CUDA GPU.

For every shape of a training step and every operator of `operator_rivals.py`: each implementation is checked against
the reference in float64 by the rule of `hmar_kernels.accuracy`, outputs and gradients, then timed by the method of the
package's docstring (device events, L2 flushed, warm-up, median and spread): the forward with gradients enabled, the
backward alone on a fresh graph, and both in one call, since an operator may do work of the backward in the forward.
Results are one JSON file of kind "operators", rewritten after every measurement. Read next: operator_rivals.py.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch

from hmar_kernels.accuracy import limits, row_group_norms
from hmar_kernels.triton_device import unavailable

from . import operator_rivals as rivals
from .check import CheckFailed, poison
from .environment import ceilings, environment
from .operator_rivals import OperatorCase, Shape, Tensors
from .options import add_device, add_record, find_device, names
from .results import write
from .subject import ERRORS, failure, release, requested_bytes
from .timing import Stopwatch

KIND, VERSION = "operators", 1
DIRECTIONS = ("forward", "backward", "forward_backward")


class Run:
    """One implementation of an operator on fixed inputs, as calls to check, time and measure the memory of."""

    def __init__(self, case: OperatorCase, function: Callable[[Tensors], Tensors], inputs: Tensors, seeds: Tensors):
        self.case, self.function, self.inputs, self.seeds = case, function, inputs, seeds

    def leaves(self) -> Tensors:
        return self.inputs | {name: self.inputs[name].detach().requires_grad_() for name in self.case.leaves}

    def forward(self, leaves: Tensors) -> Tensors:
        return self.function(leaves)

    def graph(self) -> tuple[Tensors, Tensors]:
        leaves = self.leaves()
        return self.forward(leaves), leaves

    def backward(self, graph: tuple[Tensors, Tensors]) -> tuple[torch.Tensor, ...]:
        outputs, leaves = graph
        wanted = [leaves[name] for name in self.case.leaves]
        return torch.autograd.grad(list(outputs.values()), wanted, [self.seeds[name] for name in outputs])

    def forward_backward(self, leaves: Tensors) -> tuple[torch.Tensor, ...]:
        return self.backward((self.forward(leaves), leaves))

    def timed(self, direction: str) -> tuple[Callable, Callable]:
        """(call, prepare): only call(prepare()) is timed."""
        call = getattr(self, direction)
        return call, self.graph if direction == "backward" else self.leaves

    def results(self) -> Tensors:
        """Outputs and d_NAME of every leaf."""
        graph = self.graph()
        outputs = {name: x.detach() for name, x in graph[0].items()}
        return outputs | {f"d_{n}": g for n, g in zip(self.case.leaves, self.backward(graph), strict=True)}


class Oracle:
    """Results in float64, and the error that eager low precision makes there."""

    def __init__(self, case: OperatorCase, inputs: Tensors, seeds: Tensors):
        eager = Run(case, case.implementations["eager"], inputs, seeds).results()
        self.dtypes = {name: x.dtype for name, x in eager.items()}
        with torch.autocast(next(iter(inputs.values())).device.type, enabled=False):
            doubles = [{n: x.double() if x.is_floating_point() else x for n, x in t.items()} for t in (inputs, seeds)]
            self.exact = Run(case, rivals.PLAIN[case.name], *doubles).results()
        self.limits = {name: limits(_rows(x), _rows(eager[name]), rivals.LOW) for name, x in self.exact.items()}

    def compare(self, actual: Tensors) -> dict[str, dict[str, float]]:
        """Largest error and its limit, relative to the result, by tensor. CheckFailed where one is over it."""
        found = {}
        for name, exact in self.exact.items():
            x = actual[name]
            if (x.shape, x.dtype) != (exact.shape, self.dtypes[name]):
                raise CheckFailed(
                    f"{name} is {x.dtype} {list(x.shape)}, expected {self.dtypes[name]} {list(exact.shape)}"
                )
            if not x.isfinite().all():
                raise CheckFailed(f"{name} has non-finite values")
            error, norm = row_group_norms(_rows(x).double() - _rows(exact)), row_group_norms(_rows(exact))
            worst = int((error / self.limits[name]).argmax())
            error, limit, norm = (float(t.flatten()[worst]) for t in (error, self.limits[name], norm))
            found[name] = {"error": error / max(norm, 1e-300), "limit": limit / max(norm, 1e-300)}
            if not error <= limit:
                raise CheckFailed(
                    f"{name} is off by {found[name]['error']:.3g} of its norm, at most {found[name]['limit']:.3g} is "
                    "tolerated"
                )
        return found


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, -1) if x.ndim < 2 else x


def draw_seeds(case: OperatorCase, inputs: Tensors) -> Tensors:
    """Gradients of the outputs: 1 for a scalar, else noise that leans towards them, so that sums do not cancel."""
    with torch.no_grad():
        outputs = case.implementations["eager"](inputs)
    generator = torch.Generator(next(iter(outputs.values())).device).manual_seed(1)

    def draw(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return (noise + x.sign()).to(x.dtype)

    return {name: torch.ones_like(x) if x.ndim == 0 else draw(x) for name, x in outputs.items()}


def measure(run: Run, direction: str, stopwatch: Stopwatch, seconds: float) -> dict[str, float | int]:
    """Times of one direction and, on a GPU, its memory."""
    call, prepare = run.timed(direction)
    found = stopwatch.measure(call, prepare, seconds)
    return found | {"extra_bytes": extra_bytes(run, direction, stopwatch.device)}


def extra_bytes(run: Run, direction: str, device: torch.device) -> int | None:
    """The most that one call holds beside its inputs. Backward: what the graph keeps is counted as well."""
    if device.type != "cuda":
        return None
    call, prepare = run.timed("forward" if direction == "forward" else "forward_backward")
    argument = prepare()
    gc.collect()
    torch.cuda.synchronize(device)
    held = requested_bytes(device, "current")
    torch.cuda.reset_peak_memory_stats(device)
    result = call(argument)
    torch.cuda.synchronize(device)
    del result
    return requested_bytes(device, "peak") - held


NUMBERS = ("ms", "p10_ms", "p90_ms", "rounds", "host_us", "extra_bytes", "first_call_s", "check")


def examine(
    case: OperatorCase, name: str, inputs: Tensors, seeds: Tensors, oracle: Oracle, stopwatch: Stopwatch, seconds: float
) -> list[dict]:
    """What is known of an implementation, for each direction. What it raises is recorded and does not leave here."""
    known = {"status": "ok", "reason": None, **dict.fromkeys(NUMBERS)}
    measured = {direction: {} for direction in DIRECTIONS}
    reason = unavailable(stopwatch.device, rivals.LOW) if name == "triton" else None
    if reason is not None:
        known |= {"status": "unavailable", "reason": reason}
        return [{"direction": direction, **known} for direction in DIRECTIONS]
    try:
        run, started = Run(case, case.implementations[name], inputs, seeds), time.perf_counter()
        for x in inputs.values():
            if x.is_floating_point():
                poison(x, 2)
        actual = run.results()
        stopwatch.synchronize()
        known["first_call_s"] = time.perf_counter() - started
        known["check"] = oracle.compare(actual)
        del actual
        for direction in DIRECTIONS:
            measured[direction] = measure(run, direction, stopwatch, seconds)
    except ERRORS as error:
        known["status"], known["reason"] = failure(error)
    return [{"direction": direction, **known, **measured[direction]} for direction in DIRECTIONS]


def describe(case: OperatorCase, shape: Shape, direction: str) -> dict:
    """What a row says of its operator and shape."""
    parts = ("forward", "backward") if direction == "forward_backward" else (direction,)
    return {
        "operator": case.name,
        "resolution": shape.resolution,
        "depth": shape.depth,
        "batch": shape.batch,
        "length": shape.length,
        "width": shape.width,
        "bytes": sum(case.bytes(shape)[part] for part in parts),
        "flops": sum(case.flops(shape)[part] for part in parts),
    }


def line(row: dict) -> str:
    place = f"{row['operator']:<24} d{row['depth']} {row['resolution']} x{row['batch']:<3} {row['direction']:<17}"
    if row["status"] != "ok":
        return f"{place}{row['impl']:<9} {row['status']}: {row['reason']}"
    rates = f"{row['bytes'] / row['ms'] / 1e6:6.0f} GB/s {row['flops'] / row['ms'] / 1e9:6.1f} TFLOP/s"
    memory = "" if row["extra_bytes"] is None else f" {row['extra_bytes'] / 1e6:7.0f} MB"
    return f"{place}{row['impl']:<9} {row['ms']:8.4f} ms {rates} {row['host_us']:6.0f} us host{memory}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.operators", description=__doc__.splitlines()[0])
    add_device(parser)
    parser.add_argument("--operators", type=names, help=f"default: {','.join(rivals.NAMES)}")
    parser.add_argument("--impl", type=names, help=f"default: {','.join(rivals.IMPLEMENTATIONS)}")
    parser.add_argument("--shapes", type=names, help=f"default: {','.join(map(str, rivals.SHAPES))}")
    parser.add_argument("--seconds", type=float, default=0.2, help="time to spend on one measurement (default 0.2)")
    add_record(parser)
    options = parser.parse_args(arguments)
    device = find_device(parser, options)
    shapes = {str(s): s for s in (rivals.SMOKE_SHAPES if device.type == "cpu" else rivals.SHAPES)}
    known = {"operators": rivals.NAMES, "impl": rivals.IMPLEMENTATIONS, "shapes": tuple(shapes)}
    for option, values in known.items():
        for name in getattr(options, option) or ():
            if name not in values:
                parser.error(f"--{option}: unknown {name!r}; known are {', '.join(values)}")
    stopwatch = Stopwatch(device)
    head = {
        "kind": KIND,
        "version": VERSION,
        "environment": environment(device, options.commit),
        "ceilings": ceilings(stopwatch),
        "method": {
            "clock": "device events" if device.type == "cuda" else "host clock",
            "seconds_per_measurement": options.seconds,
            "inputs": "standard normal; residual stream and parameters float32, the rest bfloat16, under autocast",
        },
    }
    rows: list[dict] = []
    for shape_name in options.shapes or shapes:
        shape = shapes[shape_name]
        for case in rivals.cases():
            if case.name not in (options.operators or rivals.NAMES):
                continue
            inputs = case.draw(shape, device)
            seeds = draw_seeds(case, inputs)
            oracle = Oracle(case, inputs, seeds)
            for impl in case.implementations:
                if impl not in (options.impl or rivals.IMPLEMENTATIONS):
                    continue
                release(device)
                for found in examine(case, impl, inputs, seeds, oracle, stopwatch, options.seconds):
                    rows.append(describe(case, shape, found["direction"]) | {"impl": impl} | found)
                    print(line(rows[-1]), flush=True)
                write(options.output, {**head, "complete": False}, rows)
            del inputs, seeds, oracle
    write(options.output, {**head, "complete": True}, rows)
    return int(any(row["status"] == "failed" and row["impl"] == "triton" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
