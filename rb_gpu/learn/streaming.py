"""Streams points from the host to a GPU: chunk i + 1 is copied while chunk i is in use.

There are two pinned buffers on the host, two on the device, and a stream for copies besides the one for computations.
Events order them: computations wait for the copy of their chunk, a copy waits for the computations that read its
buffer, and the host waits for the copy out of a pinned buffer before refilling it. Copying from memory that is not
pinned would block the host, and with it the next computations. Points may lie in a memory-mapped file: the host then
reads its pages while the GPU works.

Suffixes: N points, M requested rows, D dims, T points of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rb_gpu.learn.devices import tile_rows

# bytes of one chunk: large enough for the bus's full rate, while four such buffers are still small
CHUNK_BYTES = 64 * 2**20
BUFFERS = 2


class CudaStreams:
    """Allocates buffers and orders copies, on a stream of their own, and computations, on the caller's current stream.
    An event is what one of the methods returned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.computations: Any = torch.cuda.current_stream(device)

    def pinned(self, rows: int, dim: int) -> Tensor:
        """Pinned host memory (rows, dim) float32, which the device can read directly. Torch caches such memory, and
        does not reuse it while a copy is in progress.
        """
        return torch.empty(rows, dim, dtype=torch.float32, pin_memory=True)

    def buffer(self, rows: int, dim: int) -> Tensor:
        """Device memory (rows, dim) float32."""
        return torch.empty(rows, dim, dtype=torch.float32, device=self.device)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Begins a copy, to run after all copies begun before."""
        with torch.cuda.stream(self.copies):
            into.copy_(source, non_blocking=True)

    def copied(self) -> Any:
        """An event that fires when all copies begun so far are done."""
        return self.copies.record_event()

    def computed(self) -> Any:
        """An event that fires when all computations begun so far are done."""
        return self.computations.record_event()

    def copies_wait(self, event: Any) -> None:
        """Makes copies begun from here on wait for the event."""
        self.copies.wait_event(event)

    def computations_wait(self, event: Any) -> None:
        """Makes computations begun from here on wait for the event."""
        self.computations.wait_event(event)

    def host_waits(self, event: Any) -> None:
        """Blocks until the event has fired."""
        event.synchronize()


def chunks(
    x_ND: Tensor,
    width: int,
    device: torch.device,
    rows_M: Tensor | None = None,
    budget: int | None = None,
    streams: Callable[[torch.device], CudaStreams] = CudaStreams,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the points x (N, D) float32, or of its rows (M,), each with those points (T, D) on the device.

    A slice is short enough that (T, width) float32 numbers fit one tile of the device. Points already on the device are
    yielded as views, or gathered by rows. Points on the host pass through two buffers of at most `budget` bytes
    together; a chunk is overwritten once the next but one is requested, so use it in the current stream and do not keep
    it.
    """
    count, dim = len(x_ND) if rows_M is None else len(rows_M), x_ND.shape[1]
    rows = tile_rows(width, device)
    if x_ND.device.type == device.type:
        for tile in _spans(count, rows):
            yield tile, x_ND[tile] if rows_M is None else x_ND[rows_M[tile]]
        return
    room = CHUNK_BYTES if budget is None else min(CHUNK_BYTES, budget // BUFFERS)
    spans = _spans(count, max(1, min(rows, room // (4 * dim))))
    yield from _streamed(x_ND, None if rows_M is None else rows_M.to(x_ND.device), spans, streams(device))


def _spans(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _streamed(
    x_ND: Tensor, rows_M: Tensor | None, spans: list[slice], streams: CudaStreams
) -> Iterator[tuple[slice, Tensor]]:
    if not spans:
        return
    shape, used = (spans[0].stop, x_ND.shape[1]), min(BUFFERS, len(spans))
    pinned = [streams.pinned(*shape) for _ in range(used)]
    buffers = [streams.buffer(*shape) for _ in range(used)]
    # a buffer may reuse the memory of a freed tensor that computations in progress still read
    streams.copies_wait(streams.computed())
    copied: list[Any] = []

    def send(i: int) -> None:
        if i >= BUFFERS:
            streams.host_waits(copied[i - BUFFERS])
        count = spans[i].stop - spans[i].start
        filled_TD = pinned[i % BUFFERS][:count]
        if rows_M is None:
            filled_TD.copy_(x_ND[spans[i]])
        else:
            torch.index_select(x_ND, 0, rows_M[spans[i]], out=filled_TD)
        streams.copy(buffers[i % BUFFERS][:count], filled_TD)
        copied.append(streams.copied())

    try:
        send(0)
        computed = None
        for i, span in enumerate(spans):
            if i + 1 < len(spans):
                if i > 0:
                    # the previous chunk's computations read the buffer that the next chunk goes to
                    streams.copies_wait(computed)
                send(i + 1)
            streams.computations_wait(copied[i])
            yield span, buffers[i % BUFFERS][: span.stop - span.start]
            computed = streams.computed()
    finally:
        # after an early end, a copy may be in progress into a buffer that is handed back to computations
        streams.computations_wait(streams.copied())
