"""Requests in batches: what an image is does not depend on its company, and a full queue refuses."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
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


def test_requests_that_were_cancelled_take_no_place(engine):
    gate = Gate(engine)
    with Server(engine, max_waiting=2) as server:
        server.submit(Request(0))
        assert gate.entered.wait(PATIENCE)
        assert all(future.cancel() for future in server.submit(Request(1), Request(2)))
        assert server.num_waiting == 0
        kept = server.submit(Request(3), Request(4))
        gate.opened.set()
        assert len(results(kept)) == 2
    with Server(engine, max_waiting=2) as server, pytest.raises(ValueError, match="3 requests are more than ever wait"):
        server.submit(*[Request(0)] * 3)


def test_a_thousand_rounds_of_cancelled_requests(engine):
    """Each wakes the generating thread for nothing, which takes notice before the next comes."""
    with Server(engine) as server:
        take, taken = server._take_batch, threading.Semaphore(0)
        server._take_batch = lambda: (take(), taken.release())[0]
        for _ in range(1500):
            with server._changed:  # so that the thread does not begin with it
                assert server.submit(Request(1))[0].cancel()
            assert taken.acquire(timeout=PATIENCE)
        assert server.submit(Request(2))[0].result(PATIENCE)
    assert engine.batches == [[2]]


def test_a_request_that_comes_while_others_are_cancelled_is_answered_before_the_end(engine):
    """Closed after the thread has found nothing but cancelled requests, and before it waits again."""
    server = Server(engine)
    gate = Gate(engine)
    server.submit(Request(0))
    assert gate.entered.wait(PATIENCE)
    (cancelled,) = server.submit(Request(1))
    cancelled.cancel()
    take, late = server._take_batch, []

    def take_and_submit():
        batch = take()
        if not batch and not late:
            late.extend(server.submit(Request(2)))  # NOTE: the condition's lock can be taken again by its thread
            threading.Thread(target=server.close).start()
        return batch

    server._take_batch = take_and_submit
    gate.opened.set()
    server._thread.join(PATIENCE)
    assert late[0].result(PATIENCE)


def test_a_thread_that_dies_tells_everyone(engine):
    server = Server(engine)
    gate = Gate(engine)
    (running,) = server.submit(Request(0))
    assert gate.entered.wait(PATIENCE)
    (waiting,) = server.submit(Request(1))
    server._next_batch = lambda: 1 / 0
    gate.opened.set()
    assert running.result(PATIENCE)
    with pytest.raises(ZeroDivisionError):
        waiting.result(PATIENCE)
    server._thread.join(PATIENCE)
    with pytest.raises(RuntimeError, match="takes no more requests") as caught:
        server.submit(Request(0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    server.close()


def test_ramps_as_arrays_go_with_their_like(engine):
    gate = Gate(engine)
    with Server(engine) as server:
        futures = server.submit(Request(4))
        assert gate.entered.wait(PATIENCE)
        for ramp in (np.array([0.0, 1, 0, 1]), [0, 1, 0, 1]):
            futures += server.submit(Request(1, sampling=replace(SAMPLING, cfg_ramp=ramp)))
        gate.opened.set()
        results(futures)
    assert engine.batches == [[4], [1, 1]]


def test_logits_of_one_image_that_are_not_finite_fail_its_request_alone(engine, model, tokenizer):
    """The embedding of one class is NaN."""
    classes = model.embedding.classes.weight
    before = classes[3].clone()
    requests = [Request(i, seed=i, sampling=replace(SAMPLING, cfg=0.0)) for i in (1, 3, 2)]
    expected = [alone(model, tokenizer, requests[i]) for i in (0, 2)]
    with torch.no_grad():
        classes[3] = torch.nan
    try:
        with Server(engine) as server:
            first, broken, last = server.submit(*requests)
            with pytest.raises(ValueError, match="logits of class 3, seed 3, image 0 are NaN"):
                broken.result(PATIENCE)
            for (codes_L, _), future in zip(expected, (first, last), strict=True):
                assert torch.equal(future.result(PATIENCE).codes_L, codes_L)
    finally:
        with torch.no_grad():
            classes[3] = before
    assert engine.batches == [[1, 3, 2]]


def test_memory_that_ran_out_is_free_when_the_client_hears_of_it(engine):
    held = []

    def runs_out(*arguments, **options):
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no room")

    generate, engine.generate = engine.generate, runs_out
    forgotten = threading.Event()
    forget, engine.forget = engine.forget, lambda: (forget(), forgotten.set())
    with Server(engine) as server:
        (future,) = server.submit(Request(0))
        with pytest.raises(torch.OutOfMemoryError):
            future.result(PATIENCE)
        assert forgotten.wait(PATIENCE)
        gc.collect()
        assert held[0]() is None
        engine.generate = generate
        assert results(server.submit(Request(1)))


def test_an_image_keeps_no_others_in_memory(engine):
    with Server(engine) as server:
        found = results(server.submit(*(Request(i, sampling=SAMPLING) for i in range(3))))
    for image in found:
        assert image.image_CHW.untyped_storage().nbytes() == image.image_CHW.nbytes
        assert image.codes_L.untyped_storage().nbytes() == image.codes_L.nbytes


def test_the_engine_cannot_be_used_from_a_preview(engine):
    def nested(k, image):
        engine.forget()

    with Server(engine) as server:
        (future,) = server.submit(Request(0, on_preview=nested))
        with pytest.raises(RuntimeError, match="one batch at a time"):
            future.result(PATIENCE)
        assert results(server.submit(Request(1)))


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
        (Request(0, known=holes()), r"known.codes_BL is torch.int64 \[3, 39\]; expected torch.int64 \[1, 39\]\."),
        (Request(1.5), "class_index is 1.5; expected an integer"),
        (Request(0, seed=1.5), "seed is 1.5; expected an integer"),
        (
            Request(0, known=edit(0)._replace(tokens_BL=torch.ones(1, 39))),
            r"known.tokens_BL is torch.float32 \[1, 39\]",
        ),
        (Request(0, known=KnownCodes(edit(1).codes_BL + 1000, edit(1).tokens_BL)), "expected 0 to"),
        (Request(0, known=KnownCodes(edit(1).codes_BL - 1000, edit(1).tokens_BL)), "expected 0 to"),
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
