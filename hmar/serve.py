"""Requests for single images, answered in batches.

    submit -> bounded queue -> as many as wait under the same settings, in order -> Engine -> futures

One thread generates; whoever submits gets a `concurrent.futures.Future` for each image and may cancel it while it
waits. What an image looks like follows from its request alone, whatever shares its batch (up to rounding, see
`hmar.sample`). A full queue refuses at once, so that the one who asks can wait, ask elsewhere or shed load. Read
`hmar.engine` for how a batch is generated.

Shapes: B images, L tokens of the pyramid, C channels, H W pixels.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hmar.cuda_graphs import lack_of_memory
from hmar.engine import Engine
from hmar.generate import (
    WHY_NONFINITE,
    GenerationOutput,
    KnownCodes,
    NonFiniteLogits,
    SamplingConfig,
    check_known,
    image_seed,
    resolve_ramp,
    resolve_schedule,
)

BATCH_SIZES = (1, 2, 4, 8, 16)


class QueueFull(RuntimeError):
    """The queue has no room for the requests; none of them was taken."""


@dataclass(frozen=True)
class Request:
    """One image.

    class_index: 0 to num_classes - 1, or `config.null_class` for none in particular.
    seed, image: the image of this number that `hmar.generate` gives for this seed.
    sampling: how codes are drawn; guidance (cfg) may differ within a batch, everything else tells batches apart. Its
        own seed says nothing here.
    known: codes to put back, one row, for editing; see `hmar.edit.KnownImage.codes`.
    on_preview: called with (scale from 0, image [C, H, W] in [-1, 1]) after each scale, from the generating thread;
        what it raises fails this request alone. It may submit requests, but not wait for them, nor use the engine.
    """

    class_index: int
    seed: int = 0
    image: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    known: KnownCodes | None = None
    on_preview: Callable[[int, Tensor], None] | None = None


class GeneratedImage(NamedTuple):
    image_CHW: Tensor  # in [-1, 1]
    codes_L: Tensor  # int64


class Waiting(NamedTuple):
    """A request in the queue. Those of equal settings can be in one batch."""

    request: Request
    settings: Hashable
    future: Future[GeneratedImage]


class Server:
    """Generates requested images in batches, in a thread of its own. A context manager; see `close`.

    Args:
        batch_sizes: sizes of batches. With captured graphs a batch is filled up to the next of them; without, any size
            up to the largest is taken as it is.
        max_waiting: how many requests may wait.
        linger: seconds to wait for a batch to fill before a smaller one is generated.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        max_waiting: int = 64,
        linger: float = 0.0,
    ):
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch_sizes are {list(batch_sizes)}; expected positive numbers, such as {BATCH_SIZES}.")
        if max_waiting < 1 or linger < 0:
            raise ValueError(f"max_waiting is {max_waiting} and linger {linger}; expected at least 1 and at least 0.")
        self.engine = engine
        self.batch_sizes = sorted(set(batch_sizes))
        self.max_waiting, self.linger = max_waiting, linger
        self.num_generated = 0
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed, self._failure = False, None
        self._thread = threading.Thread(target=self._serve, name="hmar-server", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those that were cancelled left out."""
        with self._changed:
            return sum(not waiting.future.cancelled() for waiting in self._waiting)

    def submit(self, *requests: Request) -> list[Future[GeneratedImage]]:
        """Queue requests, all or none; those submitted together stay next to each other.

        Raises:
            QueueFull: there is no room for all of them now.
            ValueError: a request that could not be answered, or more of them than may ever wait.
            RuntimeError: the server is closed, or its thread has ended by an error, which is the cause.
        """
        added = [Waiting(request, self._settings(request), Future()) for request in requests]
        if len(added) > self.max_waiting:
            raise ValueError(
                f"{len(added)} requests are more than ever wait together (max_waiting is {self.max_waiting}); submit "
                "them in parts, or give the server a larger max_waiting."
            )
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is closed and takes no more requests") from self._failure
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.future.cancelled())
            if len(self._waiting) + len(added) > self.max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting and at most {self.max_waiting} may, so {len(added)} "
                    "more were refused; ask again when some are done, or give the server a larger max_waiting"
                )
            self._waiting.extend(added)
            self._changed.notify_all()
        return [waiting.future for waiting in added]

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, answer or cancel those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            if cancel:
                for waiting in self._waiting:
                    waiting.future.cancel()
                self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _settings(self, request: Request) -> Hashable:
        """What all requests of a batch have in common. Raises ValueError for a request that could not be answered."""
        config, pyramid, sampling = self.engine.config, self.engine.pyramid, request.sampling
        for name in ("class_index", "seed", "image"):
            value = getattr(request, name)
            try:
                operator.index(value)
            except TypeError:
                raise ValueError(f"{name} is {value!r}; expected an integer.") from None
        if not 0 <= request.class_index <= config.null_class:
            raise ValueError(
                f"class_index is {request.class_index}; expected 0 to {config.num_classes - 1}, or {config.null_class} "
                "for no class."
            )
        if request.seed < 0 or request.image < 0:
            raise ValueError(f"seed is {request.seed} and image {request.image}; both must be at least 0.")
        if request.known is not None:
            check_known(request.known, 1, pyramid.length, config.vocab_size)
        return (
            request.known is None,
            sampling.cfg > 0,
            resolve_ramp(pyramid, sampling.cfg_ramp),
            resolve_schedule(pyramid, sampling.schedule) if self.engine.is_hmar else None,
            *(sampling.masked_cfg_factor, sampling.temperature, sampling.top_k, sampling.top_p, sampling.greedy),
        )

    # --- the generating thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._answer_next():
                pass
        except BaseException as error:
            # NOTE: whoever waits must hear of it, and whoever submits from now on.
            with self._changed:
                self._closed, self._failure = True, error
                for waiting in self._waiting:
                    if waiting.future.set_running_or_notify_cancel():
                        waiting.future.set_exception(error)
                self._waiting.clear()

    def _answer_next(self) -> bool:
        """Wait for a batch and answer it. False when the server is closed and nothing is left to do."""
        batch = self._next_batch()
        lack = None
        try:
            if batch:
                self._generate(batch)
        except BaseException as error:
            # NOTE: whoever waits must hear of it, whatever it is; the thread lives on for other requests.
            lack = lack_of_memory(error)
            if lack is not None:
                lack.__traceback__ = lack.__context__ = None  # their frames hold what has taken the memory
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(lack or error)
        if lack is not None:
            self.engine.forget()
        return bool(batch)

    def _next_batch(self) -> list[Waiting]:
        """Waits for requests; the first one and those that go with it. Empty when the server is closed and done."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                deadline = time.monotonic() + self.linger
                while self._waiting and not self._closed:
                    left = deadline - time.monotonic()
                    if left <= 0 or self._matching() >= self.batch_sizes[-1]:
                        break
                    self._changed.wait(left)
                batch = self._take_batch()
                if batch or (self._closed and not self._waiting):
                    return batch

    def _take_batch(self) -> list[Waiting]:
        batch, others = [], deque()
        for waiting in self._waiting:
            if waiting.future.cancelled():
                continue
            fits = len(batch) < self.batch_sizes[-1] and (not batch or batch[0].settings == waiting.settings)
            if not fits:
                others.append(waiting)
            elif waiting.future.set_running_or_notify_cancel():
                batch.append(waiting)
        self._waiting = others
        return batch

    def _matching(self) -> int:
        return sum(self._waiting[0].settings == waiting.settings for waiting in self._waiting)

    def _generate(self, batch: list[Waiting]) -> None:
        requests = [waiting.request for waiting in batch]
        if self.engine.captures:
            size = next(size for size in self.batch_sizes if size >= len(requests))
            requests += requests[-1:] * (size - len(requests))
        known = None
        if requests[0].known is not None:
            known = KnownCodes(
                *(torch.cat([row.cpu() for row in rows]) for rows in zip(*(r.known for r in requests), strict=True))
            )
        previewed = [i for i, waiting in enumerate(batch) if waiting.request.on_preview is not None]

        def preview(k: int, f_hat_BEhw: Tensor) -> None:
            rows = [i for i in previewed if not batch[i].future.done()]
            if not rows:
                return
            images_BCHW = self.engine.decode(f_hat_BEhw[rows])
            for i, image_CHW in zip(rows, images_BCHW, strict=True):
                try:
                    batch[i].request.on_preview(k, image_CHW.clone())
                except Exception as error:
                    batch[i].future.set_exception(error)

        try:
            output, broken = self._images(requests, known, preview if previewed else None), []
        except NonFiniteLogits as error:
            output, broken = error.output, error.images
        for i, (request, _, future) in enumerate(batch):
            if future.done():
                continue
            if i in broken:
                future.set_exception(
                    ValueError(
                        f"The logits of class {request.class_index}, seed {request.seed}, image {request.image} are "
                        f"NaN or infinite: {WHY_NONFINITE}."
                    )
                )
            else:
                # NOTE: copies, for a row would keep the whole batch in memory.
                future.set_result(GeneratedImage(output.images_BCHW[i].clone(), output.codes_BL[i].clone()))
                self.num_generated += 1

    def _images(
        self, requests: list[Request], known: KnownCodes | None, on_scale: Callable[[int, Tensor], None] | None
    ) -> GenerationOutput:
        return self.engine.generate(
            torch.tensor([request.class_index for request in requests]),
            requests[0].sampling,
            cfg_B=[request.sampling.cfg for request in requests],
            keys_B=torch.tensor([image_seed(request.seed, request.image) for request in requests]),
            known=known,
            on_scale=on_scale,
        )
