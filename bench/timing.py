"""Clocks for pytest-benchmark, and the pause before each round that makes them fair. The method is in `__init__.py`.

pytest-benchmark measures `clock()` before the call, `clock()` after it, and stores the difference. On a GPU the clock
records a device event and the difference of two instants is the device time between them; it is asked for only after
the call is queued, so nothing waits in between.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20
L2_FACTOR = 4
# NOTE: a device queue takes about a thousand launches before the host has to wait; some rivals need 200 a call.
OVERHEAD_CALLS, OVERHEAD_LOOPS = 4, 9
MIN_ROUNDS, MAX_ROUNDS = 10, 200
WARMUP_SHARE = 0.25
MAX_HEAD_START = 0.05  # seconds; a call that the host needs longer to queue than this is timed with its gaps


@dataclass(frozen=True)
class Instant:
    """A point on the device's time line."""

    event: torch.cuda.Event

    def __sub__(self, earlier: Instant) -> float:
        """Seconds of device time since `earlier`."""
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def device_clock() -> Instant:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return Instant(event)


def clock(device: torch.device) -> Callable:
    """What to hand to pytest-benchmark as its timer."""
    return device_clock if device.type == "cuda" else time.perf_counter


class Stopwatch:
    """Times calls on one device. On a GPU it holds the buffer that `pause` writes to empty the L2 cache."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clock = clock(device)
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.empty(max(FLUSH_BYTES, L2_FACTOR * l2_bytes), dtype=torch.uint8, device=device)
            self.flush_seconds = self._flush_seconds()

    def _flush_seconds(self) -> float:
        self.buffer.zero_()
        start = self.clock()
        for _ in range(10):
            self.buffer.zero_()
        return (self.clock() - start) / 10

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pause(self, host_seconds: float) -> None:
        """Empty the L2 cache, and keep the device busy until a call that takes the host so long is queued."""
        if self.device.type == "cuda":
            lead = min(1.5 * host_seconds + 50e-6, MAX_HEAD_START)
            for _ in range(max(1, math.ceil(lead / self.flush_seconds))):
                self.buffer.zero_()

    def host_seconds(self, call: Callable, prepare: Callable[[], object] = lambda: None, repeats: int = 5) -> float:
        """Median time until the host has queued `call(prepare())`; on a CPU, until it has run."""
        samples = []
        for _ in range(repeats):
            argument = prepare()
            self.synchronize()
            start = time.perf_counter()
            result = call(argument)
            samples.append(time.perf_counter() - start)
            del result
        self.synchronize()
        return statistics.median(samples)

    def overhead_seconds(self, call: Callable, prepare: Callable[[], object] = lambda: None) -> float:
        """Median host time of a call among several that are queued one after another, with nothing waiting for the
        device: what a program that keeps the device busy pays for each. On a CPU, the time of the call."""
        samples = []
        for _ in range(OVERHEAD_LOOPS):
            arguments = [prepare() for _ in range(OVERHEAD_CALLS)]
            self.synchronize()
            start = time.perf_counter()
            for argument in arguments:
                call(argument)
            samples.append((time.perf_counter() - start) / OVERHEAD_CALLS)
        self.synchronize()
        return statistics.median(samples)

    def seconds(self, call: Callable, prepare: Callable[[], object] = lambda: None, repeats: int = 3) -> float:
        """Median time of a few rounds, by the method of the measured ones."""
        host = self.host_seconds(call, prepare, repeats=2)
        return statistics.median(self.samples(call, prepare, host, repeats))

    def samples(self, call: Callable, prepare: Callable[[], object], host_seconds: float, rounds: int) -> list[float]:
        """Times of single rounds of a call that takes the host `host_seconds`."""
        samples = []
        for _ in range(rounds):
            argument = prepare()
            self.pause(host_seconds)
            start = self.clock()
            result = call(argument)
            samples.append(self.clock() - start)
            del result
        return samples

    def rounds(self, call: Callable, prepare: Callable[[], object], seconds: float) -> int:
        """How many rounds fill about so many seconds."""
        return min(max(math.ceil(seconds / self.seconds(call, prepare)), MIN_ROUNDS), MAX_ROUNDS)

    def measure(self, call: Callable, prepare: Callable[[], object], seconds: float) -> dict[str, float | int]:
        """Median and spread of rounds that fill about so many seconds, after a warm-up, and the host's time a call."""
        host_seconds = self.host_seconds(call, prepare)
        rounds = self.rounds(call, prepare, seconds)
        self.samples(call, prepare, host_seconds, math.ceil(WARMUP_SHARE * rounds))
        samples = [1e3 * s for s in self.samples(call, prepare, host_seconds, rounds)]
        return {
            "ms": quantile(samples, 0.5),
            "p10_ms": quantile(samples, 0.1),
            "p90_ms": quantile(samples, 0.9),
            "rounds": rounds,
            "host_us": 1e6 * self.overhead_seconds(call, prepare),
        }


def quantile(samples: list[float], q: float) -> float:
    """Linear interpolation between the sorted samples."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
