"""Attention forward and backward, one benchmark per cell, implementation and direction."""

import math

import pytest

from .subject import ERRORS
from .timing import WARMUP_SHARE


def test_attention(benchmark, run, inputs, subject, direction):
    if subject.status == "ok":
        try:
            measure(benchmark, run, subject, direction)
        except ERRORS as error:
            subject.give_up(error)
    if subject.status == "ok":
        return

    run.add_failure(subject, direction)
    message = f"{subject.implementation.name} is {subject.status}: {subject.reason}"
    if subject.status == "failed" and subject.implementation.ours:
        pytest.fail(message)
    pytest.skip(message)


def measure(benchmark, run, subject, direction):
    """Time one direction of a subject that has passed its check, and add it to the results."""
    stopwatch, cell = run.stopwatch, subject.inputs.cell
    call, prepare = subject.timed(direction)
    host_seconds = stopwatch.host_seconds(call, prepare)
    overhead_seconds = stopwatch.overhead_seconds(call, prepare)
    rounds = stopwatch.rounds(call, prepare, run.seconds)

    def setup():
        argument = prepare()
        stopwatch.pause(host_seconds)
        return (argument,), {}

    benchmark.name = subject.implementation.name
    benchmark.group = f"{cell} {direction}"
    benchmark.extra_info.update(host_us=1e6 * overhead_seconds)
    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=math.ceil(WARMUP_SHARE * rounds))
    if benchmark.stats is not None:  # None under --benchmark-disable
        run.add(subject, direction, benchmark.stats.stats.data, overhead_seconds)
