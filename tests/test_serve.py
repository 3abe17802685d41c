"""Requests in batches: what an image is does not depend on its company, and a full queue refuses."""

import threading
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
import torch

from engine_cases import CONFIG, PYRAMID, build, build_tokenizer, holes, plain
from hmar.engine import Engine
from hmar.generate import KnownCodes, SamplingConfig
from hmar.serve import QueueFull, Request, Server

SAMPLING = SamplingConfig(cfg=2.0, top_k=30)
PATIENCE = 30


@pytest.fixture(scope="module")
def model():
    return build("hmar").double()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer().double()


@pytest.fixture
def engine(model, tokenizer):
    """Records the classes of every batch."""
    engine = Engine(model, tokenizer)
    engine.batches, generate = [], engine.generate

    def recorded(class_B, *arguments, **options):
        engine.batches.append(class_B.tolist())
        return generate(class_B, *arguments, **options)

    engine.generate = recorded
    return engine


class Gate:
    """Holds the engine until it is opened, so that requests pile up."""

    def __init__(self, engine):
        self.opened, self.entered, self.generate = threading.Event(), threading.Event(), engine.generate
        engine.generate = self

    def __call__(self, *arguments, **options):
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        return self.generate(*arguments, **options)


def results(futures):
    return [future.result(PATIENCE) for future in futures]


def alone(model, tokenizer, request):
    sampling = replace(request.sampling, seed=request.seed)
    output = plain(
        model, tokenizer, torch.tensor([request.class_index]), sampling, first_image=request.image, known=request.known
    )
    return output.codes_BL[0], output.images_BCHW[0]


def edit(i):
    return KnownCodes(*(tensor[i : i + 1] for tensor in holes()))


REQUESTS = [
    Request(0, seed=1, sampling=SAMPLING),
    Request(3, seed=1, sampling=replace(SAMPLING, cfg=0.5)),
    Request(1, seed=1, image=4, sampling=SAMPLING),
    Request(0, seed=2, sampling=replace(SAMPLING, schedule="even-2", cfg_ramp=[0, 1, 0, 1])),
    Request(2, seed=3, sampling=SAMPLING, known=edit(0)),
    Request(CONFIG.null_class, seed=4, sampling=replace(SAMPLING, cfg=0.0)),
    Request(4, seed=5, sampling=SAMPLING, known=edit(1)),
    Request(0, seed=6, sampling=replace(SAMPLING, schedule={3: [4, 5]})),
]


def test_every_request_gets_the_image_it_would_get_alone(engine, model, tokenizer):
    gate = Gate(engine)
    with Server(engine) as server:
        futures = server.submit(Request(0, sampling=SAMPLING))
        assert gate.entered.wait(PATIENCE)
        futures += server.submit(*REQUESTS)
        assert server.num_waiting == len(REQUESTS)
        gate.opened.set()
        found = results(futures)[1:]
    for request, image in zip(REQUESTS, found, strict=True):
        codes_L, image_CHW = alone(model, tokenizer, request)
        assert torch.equal(image.codes_L, codes_L)
        torch.testing.assert_close(image.image_CHW, image_CHW)
    assert engine.batches == [[0], [0, 3, 1], [0], [2, 4], [CONFIG.null_class], [0]], "what goes together went together"
    assert server.num_generated == len(REQUESTS) + 1


def test_batches_are_as_large_as_wanted_and_in_order(engine):
    gate = Gate(engine)
    with Server(engine, batch_sizes=(2, 4)) as server:
        server.submit(Request(4, sampling=SAMPLING))
        assert gate.entered.wait(PATIENCE)
        futures = server.submit(*(Request(i % 5, seed=i, sampling=SAMPLING) for i in range(7)))
        gate.opened.set()
        results(futures)
    assert engine.batches == [[4], [0, 1, 2, 3], [4, 0, 1]]


def test_captured_batches_are_filled_up(engine, model, tokenizer):
    """As on a GPU, where only some sizes are captured: the images are the same, the rest is thrown away."""
    engine.captures = True
    engine._capture = lambda settings: type(engine)._capture(without_graphs, settings)
    without_graphs = Engine(model, tokenizer)
    engine.max_bytes = 1 << 40
    requests = [Request(i, seed=i, sampling=SAMPLING) for i in range(3)]
    with Server(engine, batch_sizes=(1, 4)) as server:
        found = results(server.submit(*requests))
        results(server.submit(requests[0]))
    assert engine.batches == [[0, 1, 2, 2], [0]]
    for request, image in zip(requests, found, strict=True):
        assert torch.equal(image.codes_L, alone(model, tokenizer, request)[0])


def test_a_server_that_lingers_waits_for_more(engine):
    with Server(engine, batch_sizes=(3,), linger=PATIENCE) as server:
        first = server.submit(Request(0, sampling=SAMPLING))
        first += server.submit(Request(1, sampling=SAMPLING), Request(2, sampling=SAMPLING))
        results(first)
    assert engine.batches == [[0, 1, 2]]


def test_a_full_queue_refuses_all_and_says_so(engine):
    gate = Gate(engine)
    with Server(engine, max_waiting=3) as server:
        futures = server.submit(Request(0))
        assert gate.entered.wait(PATIENCE)
        futures += server.submit(Request(1), Request(2))
        with pytest.raises(QueueFull, match=r"2 requests are waiting and at most 3 may, so 2 more were refused"):
            server.submit(Request(3), Request(3))
        assert server.num_waiting == 2
        futures += server.submit(Request(3))
        gate.opened.set()
        assert len(results(futures)) == 4
    assert sorted(c for batch in engine.batches for c in batch) == [0, 1, 2, 3]


def test_previews_stream_after_every_scale(engine):
    seen, others = [], []
    requests = [
        Request(0, seed=1, sampling=SAMPLING, on_preview=lambda k, image: seen.append((k, image))),
        Request(1, seed=2, sampling=SAMPLING),
        Request(2, seed=3, sampling=SAMPLING, on_preview=lambda k, _: others.append(k)),
    ]
    with Server(engine) as server:
        found = results(server.submit(*requests))
    assert [k for k, _ in seen] == others == list(range(PYRAMID.num_scales))
    assert all(image.shape == (3, 10, 10) and image.abs().max() <= 1 for _, image in seen)
    torch.testing.assert_close(seen[-1][1], found[0].image_CHW)
    assert not torch.equal(seen[0][1], seen[-1][1])


def test_a_preview_that_raises_fails_its_own_request_alone(engine):
    def broken(k, image):
        raise KeyError(k)

    with Server(engine) as server:
        bad, good = server.submit(Request(0, sampling=SAMPLING, on_preview=broken), Request(1, sampling=SAMPLING))
        assert good.result(PATIENCE).image_CHW.isfinite().all()
        with pytest.raises(KeyError):
            bad.result(PATIENCE)
        assert results(server.submit(Request(2)))


def test_an_engine_that_fails_fails_its_batch_and_goes_on(engine):
    generate = engine.generate

    def fails(class_B, *arguments, **options):
        if 3 in class_B:
            raise ValueError("logits are NaN")
        return generate(class_B, *arguments, **options)

    engine.generate = fails
    with Server(engine) as server:
        with pytest.raises(ValueError, match="logits are NaN"):
            results(server.submit(Request(3)))
        assert results(server.submit(Request(1)))


def test_waiting_requests_can_be_cancelled(engine):
    gate = Gate(engine)
    with Server(engine) as server:
        server.submit(Request(0))
        assert gate.entered.wait(PATIENCE)
        kept, dropped = server.submit(Request(1), Request(2))
        assert dropped.cancel()
        gate.opened.set()
        assert kept.result(PATIENCE)
    assert engine.batches == [[0], [1]]


def test_closing_answers_or_cancels_what_waits(engine):
    for cancel in (False, True):
        server = Server(engine)
        gate = Gate(engine)
        running, waiting = *server.submit(Request(0)), None
        assert gate.entered.wait(PATIENCE)
        (waiting,) = server.submit(Request(1))
        threading.Timer(0.05, gate.opened.set).start()
        server.close(cancel)
        assert running.result(PATIENCE)
        if cancel:
            with pytest.raises(CancelledError):
                waiting.result(PATIENCE)
        else:
            assert waiting.result(PATIENCE)
        with pytest.raises(RuntimeError, match="closed"):
            server.submit(Request(0))


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(6), r"class_index is 6; expected 0 to 4, or 5"),
        (Request(0, seed=-1), "seed is -1"),
        (Request(0, sampling=SamplingConfig(schedule={3: [1]})), "add up to 9"),
        (Request(0, sampling=SamplingConfig(cfg_ramp=[1.0])), "1 factors"),
        (Request(0, known=holes()), r"expected one row, \(1, 39\)"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(engine, request_, message):
    with Server(engine) as server:
        with pytest.raises(ValueError, match=message):
            server.submit(Request(0), request_)
        assert server.num_waiting == 0


def test_bad_servers_are_refused(engine):
    for options in ({"batch_sizes": ()}, {"batch_sizes": (0, 1)}, {"max_waiting": 0}, {"linger": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            Server(engine, **options)
