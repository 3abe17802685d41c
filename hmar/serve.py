"""Requests for single images, answered in batches.

    submit -> bounded queue -> as many as wait under the same settings, in order -> Engine -> futures

One thread generates; whoever submits gets a `concurrent.futures.Future` for each image and may cancel it while it
waits. What an image looks like follows from its request alone, whatever shares its batch (up to rounding, see
`hmar.sample`). A full queue refuses at once, so that the one who asks can wait, ask elsewhere or shed load. Read
`hmar.engine` for how a batch is generated.

Shapes: B images, L tokens of the pyramid, C channels, H W pixels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hmar.engine import Engine
from hmar.generate import KnownCodes, SamplingConfig, image_seed, resolve_ramp, resolve_schedule

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
        what it raises fails this request alone.
    """

    class_index: int
    seed: int = 0
    image: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    known: KnownCodes | None = None
    on_preview: Callable[[int, Tensor], None] | None = None

    def goes_with(self, other: Request) -> bool:
        """Whether both can be in one batch."""

        def settings(request: Request) -> SamplingConfig:
            return replace(request.sampling, seed=0, cfg=float(request.sampling.cfg > 0))

        return (self.known is None) == (other.known is None) and settings(self) == settings(other)


class GeneratedImage(NamedTuple):
    image_CHW: Tensor  # in [-1, 1]
    codes_L: Tensor  # int64


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
        self._waiting: deque[tuple[Request, Future[GeneratedImage]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="hmar-server", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, *requests: Request) -> list[Future[GeneratedImage]]:
        """Queue requests, all or none; those submitted together stay next to each other.

        Raises:
            QueueFull: there is no room for all of them now.
            ValueError: a request that could not be answered. RuntimeError: the server is closed.
        """
        for request in requests:
            self._check(request)
        futures: list[Future[GeneratedImage]] = [Future() for _ in requests]
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is closed and takes no more requests")
            if len(self._waiting) + len(requests) > self.max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting and at most {self.max_waiting} may, so {len(requests)} "
                    "more were refused; ask again when some are done, or give the server a larger max_waiting"
                )
            self._waiting.extend(zip(requests, futures, strict=True))
            self._changed.notify_all()
        return futures

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, answer or cancel those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            if cancel:
                for _, future in self._waiting:
                    future.cancel()
                self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _check(self, request: Request) -> None:
        config = self.engine.config
        if not 0 <= request.class_index <= config.null_class:
            raise ValueError(
                f"class_index is {request.class_index}; expected 0 to {config.num_classes - 1}, or {config.null_class} "
                "for no class."
            )
        if request.seed < 0 or request.image < 0:
            raise ValueError(f"seed is {request.seed} and image {request.image}; both must be at least 0.")
        resolve_ramp(self.engine.pyramid, request.sampling.cfg_ramp)
        if self.engine.is_hmar:
            resolve_schedule(self.engine.pyramid, request.sampling.schedule)
        if request.known is not None:
            shapes = [tuple(tensor.shape) for tensor in request.known]
            if shapes != 2 * [(1, self.engine.pyramid.length)]:
                raise ValueError(
                    f"known has shapes {shapes}; expected one row, (1, {self.engine.pyramid.length}), of both."
                )

    # --- the generating thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while batch := self._next_batch():
            try:
                self._generate(batch)
            except BaseException as error:
                if isinstance(error, torch.OutOfMemoryError):
                    self.engine.forget()
                # NOTE: whoever waits must hear of it, whatever it is; the thread lives on for other requests.
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    def _next_batch(self) -> list[tuple[Request, Future[GeneratedImage]]]:
        """Waits for requests; the first one and those that go with it. Empty when the server is closed and done."""
        largest = self.batch_sizes[-1]
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            deadline = time.monotonic() + self.linger
            while self._waiting and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 or self._matching() >= largest:
                    break
                self._changed.wait(left)
            batch, others = [], deque()
            while self._waiting:
                request, future = self._waiting.popleft()
                if future.cancelled():
                    continue
                if len(batch) < largest and (not batch or batch[0][0].goes_with(request)):
                    if future.set_running_or_notify_cancel():
                        batch.append((request, future))
                else:
                    others.append((request, future))
            self._waiting = others
        return batch if batch or self._closed else self._next_batch()

    def _matching(self) -> int:
        first = self._waiting[0][0]
        return sum(first.goes_with(request) for request, _ in self._waiting)

    def _generate(self, batch: list[tuple[Request, Future[GeneratedImage]]]) -> None:
        requests = [request for request, _ in batch]
        if self.engine.captures:
            size = next(size for size in self.batch_sizes if size >= len(requests))
            requests += requests[-1:] * (size - len(requests))
        known = None
        if requests[0].known is not None:
            known = KnownCodes(*(torch.cat(rows) for rows in zip(*(r.known for r in requests), strict=True)))
        previewed = [i for i, (request, _) in enumerate(batch) if request.on_preview is not None]

        def preview(k: int, f_hat_BEhw: Tensor) -> None:
            rows = [i for i in previewed if not batch[i][1].done()]
            if not rows:
                return
            images_BCHW = self.engine.decode(f_hat_BEhw[rows])
            for i, image_CHW in zip(rows, images_BCHW, strict=True):
                try:
                    batch[i][0].on_preview(k, image_CHW)
                except Exception as error:
                    batch[i][1].set_exception(error)

        output = self.engine.generate(
            torch.tensor([request.class_index for request in requests]),
            requests[0].sampling,
            cfg_B=[request.sampling.cfg for request in requests],
            keys_B=torch.tensor([image_seed(request.seed, request.image) for request in requests]),
            known=known,
            on_scale=preview if previewed else None,
        )
        for i, (_, future) in enumerate(batch):
            if not future.done():
                future.set_result(GeneratedImage(output.images_BCHW[i], output.codes_BL[i]))
                self.num_generated += 1
