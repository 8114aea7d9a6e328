"""Read a cyclic schedule of slices ahead of their use, into a ring of buffers of fixed size.

Weights that stay on disk are walked in the same order for every token, so what comes next is
always known: reading goes on across layers and across tokens while the consumer computes. A few
threads do nothing but ``preadv``, which runs without the interpreter's lock.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thinslice.closing import Closing
from thinslice.errors import CheckpointError
from thinslice.forks import fork_safe
from thinslice.kernels.arrays import aligned_buffer
from thinslice.memory.slice_schedule import Piece, Slice, pieces_of
from thinslice.memory.uncached_file import ALIGNMENT, UncachedFile
from thinslice.model.weights import ReadStats
from thinslice.units import MIB

# GB/s of slices of 8 MiB read into three buffers from a virtual NVMe disk, by request size and
# requests in flight, medians of six runs (`python benchmarks/disk.py` measures the like).
#            2     4     8
#   1 MiB  2.17  2.44  2.44
#   2 MiB  2.17  2.30  2.23
#   4 MiB  2.17  2.21  2.13
# While a model computes beside it, more in flight are better: MiMo-7B's shape in int4, 2.5 GB for
# each token, GB/s: three buffers and 4 requests 2.30, six and 4 2.57, twelve and 4 2.76, six and 8
# 2.78, six and 4 of 4 MiB 2.71; the disk alone 2.83.
REQUEST_BYTES = MIB
NUM_THREADS = 8

# A disk that does not answer for so long is broken; waiting on would hang the whole program.
_STUCK_S = 10.0


@dataclass(frozen=True)
class ReaderOptions:
    """How a reader divides its work; ``num_threads`` is also the most requests in flight.

    ``allocate`` gives the memory of the ring, at a multiple of ALIGNMENT, all pages in place.
    """

    request_bytes: int = REQUEST_BYTES
    num_threads: int = NUM_THREADS
    allocate: Callable[[int], NDArray[np.uint8]] = aligned_buffer


@dataclass
class _Buffer:
    """One buffer of the ring and what is being read into it.

    Attributes:
        turn: how many slices came before this one, over all sweeps; -1 before the first.
        num_open: requests that have not come back.
    """

    data: NDArray[np.uint8]
    view: memoryview
    turn: int = -1
    num_open: int = 0


@dataclass(frozen=True)
class _Request:
    file: UncachedFile
    buffer: _Buffer
    turn: int
    piece: Piece
    is_first_of_file: bool

    @property
    def view(self) -> memoryview:
        """The buffer the bytes are read into."""
        return self.buffer.view[self.piece.begin : self.piece.end]


class SliceReader(Closing):
    """Reads slices in a fixed, cyclic order; a context manager.

    One thread consumes: ``with reader.next(expected) as data``. Up to ``num_buffers`` slices may
    be held at a time, and a slice's buffer is read into again once the slice is let go.

    Each file is compared once per sweep with what it was when it was opened. Whatever goes wrong
    is raised where the slice concerned is asked for, and again after it until ``restart``.

    Memory: num_buffers * buffer_bytes, in place from the start; nothing else that grows. Where a
    file has no direct reads (see ``buffered_paths``), also the pages of requests in flight.
    """

    def __init__(
        self, slices: Sequence[Slice], buffer_bytes: int, num_buffers: int, options: ReaderOptions
    ) -> None:
        assert slices, "an empty schedule"
        assert num_buffers > 0, "no buffers"
        assert buffer_bytes % ALIGNMENT == 0, f"buffers of {buffer_bytes} bytes"
        first_use = {one.path: index for index, one in reversed(list(enumerate(slices)))}
        self._slices = tuple(slices)
        self._first_uses = frozenset(first_use.values())
        self._buffer_bytes = buffer_bytes
        self._num_buffers = num_buffers
        self._options = options
        self._files: dict[Path, UncachedFile] = {}
        self._buffers: list[_Buffer] = []
        self._threads: list[threading.Thread] = []
        self._pid = os.getpid()

        # All that follows is guarded by this condition's lock.
        self._changed = fork_safe(threading.Condition())
        self._is_closed = False
        self._is_restarting = False
        self._bug: BaseException | None = None  # nobody thought of it, and it has ended a thread
        self._next_turn = 0  # of the slice whose pieces are being handed out
        self._pieces: deque[Piece] = deque()  # what is left of that slice, once it has begun
        self._num_taken = 0  # slices the consumer has asked for
        self._num_returned = 0  # slices whose buffers, and all before them, are free again
        self._returned_early: set[int] = set()
        self._num_in_flight = 0
        self._error: BaseException | None = None
        self._error_turn = 0
        self._num_bytes, self._wait_s, self._io_s, self._io_start = 0, 0.0, 0.0, 0.0

    @classmethod
    def open(
        cls,
        slices: Sequence[Slice],
        *,
        buffer_bytes: int,
        num_buffers: int,
        options: ReaderOptions | None = None,
    ) -> "SliceReader":
        """Open the files, allocate the ring and begin to read.

        Args:
            buffer_bytes: holds each slice, widened to multiples of ALIGNMENT; ``buffer_bytes_for``
                gives what is always enough.

        Errors: CheckpointError for a file that cannot be opened.
        """
        reader = cls(slices, buffer_bytes, num_buffers, options or ReaderOptions())
        try:
            reader._start()
        except BaseException:
            reader.close()
            raise
        return reader

    @property
    def buffered_paths(self) -> tuple[Path, ...]:
        """Files that the system reads through its page cache, because it can do no other."""
        return tuple(file.path for file in self._files.values() if not file.is_direct)

    @contextmanager
    def next(self, expected: Slice) -> Iterator[NDArray[np.uint8]]:
        """The next slice's bytes, uint8 [num_bytes], valid until the block ends.

        The consumer names the slice that it is about to use: two slices of one size in another
        order than the schedule's would otherwise swap weights without a word.
        The address of the bytes has the alignment of the slice's offset in its file, up to
        ALIGNMENT.

        Errors: CheckpointError naming the file if this slice or one before it could not be read,
        or if a file shrank, was replaced or was written to.
        """
        turn = self._take_slice()
        try:
            one = self._slices[turn % len(self._slices)]
            assert one == expected, f"the next slice is {one}, not {expected}"
            start = one.offset % ALIGNMENT
            yield self._buffers[turn % self._num_buffers].data[start : start + one.num_bytes]
        finally:
            self._return_slice(turn)

    def restart(self) -> None:
        """Go back to the first slice, as after a sweep that was broken off or failed.

        At the end of a sweep this changes nothing, and what was read ahead stays. Otherwise slices
        still held are taken back. Errors that are no CheckpointError stay, and are raised.
        """
        with self._changed:
            self._check_threads()
            is_at_start = self._num_taken % len(self._slices) == 0
            if is_at_start and self._num_returned == self._num_taken and self._error is None:
                return
            try:
                self._is_restarting = True
                self._changed.wait_for(lambda: self._num_in_flight == 0)
                self._check_threads()
                self._forget()
            finally:
                self._is_restarting = False
                self._changed.notify_all()

    def _check_threads(self) -> None:
        if self._bug is not None:
            raise self._bug

    def stats(self) -> ReadStats:
        """What was read so far, and how long it took."""
        with self._changed:
            running = time.perf_counter() - self._io_start if self._num_in_flight else 0.0
            return ReadStats(self._num_bytes, self._wait_s, self._io_s + running)

    def close(self) -> None:
        """End the threads and close the files; requests in flight are waited for.

        The ring goes back to the system once no tensor from ``next`` is left either.
        """
        if self._pid != os.getpid():
            self._threads.clear()  # a child of a fork has none of them
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # one may find that nobody holds it
                thread.join(_STUCK_S)
        self._threads.clear()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._buffers.clear()
        self._error = None

    def _start(self) -> None:
        for one in self._slices:
            assert 0 < one.aligned_bytes <= self._buffer_bytes, f"{one} does not fit a buffer"
            if one.path not in self._files:
                self._files[one.path] = UncachedFile.open(one.path)
        ring = self._options.allocate(self._num_buffers * self._buffer_bytes)
        # Whoever gave the memory is not held by the threads, which hold the reader.
        self._options = replace(self._options, allocate=aligned_buffer)
        for begin in range(0, len(ring), self._buffer_bytes):
            data = ring[begin : begin + self._buffer_bytes]
            self._buffers.append(_Buffer(data, data.data))
        for index in range(self._options.num_threads):
            thread = threading.Thread(
                target=self._read_ahead, name=f"thinslice-read-{index}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    # The consumer's side.

    def _take_slice(self) -> int:
        """Wait for the next slice and return its turn."""
        with self._changed:
            turn = self._num_taken
            assert turn < self._num_returned + self._num_buffers, "every buffer is held already"
            start = time.perf_counter()
            self._changed.wait_for(lambda: self._is_settled(turn))
            self._wait_s += time.perf_counter() - start
            assert not self._is_closed, "the reader is closed"
            if self._error is not None and self._error_turn <= turn:
                raise self._error
            self._num_taken = turn + 1
            return turn

    def _is_settled(self, turn: int) -> bool:
        if self._is_closed or (self._error is not None and self._error_turn <= turn):
            return True
        buffer = self._buffers[turn % self._num_buffers]
        return buffer.turn == turn and buffer.num_open == 0

    def _return_slice(self, turn: int) -> None:
        """Free the slice's buffer, and those after it that came back before it."""
        with self._changed:
            self._returned_early.add(turn)
            while self._num_returned in self._returned_early:
                self._returned_early.remove(self._num_returned)
                self._num_returned += 1
            self._changed.notify_all()

    def _forget(self) -> None:
        """Drop what was read, and go on at the next turn that is the first of a sweep.

        Turns only grow, so a slice returned late is none of those after.
        """
        num_slices = len(self._slices)
        num_begun = self._next_turn + bool(self._pieces)
        self._next_turn = -(-num_begun // num_slices) * num_slices
        self._pieces.clear()
        self._num_taken = self._num_returned = self._next_turn
        self._returned_early.clear()
        self._error = None

    # The threads' side.

    def _read_ahead(self) -> None:
        while (request := self._take_request()) is not None:
            error = None
            try:
                if request.is_first_of_file:
                    request.file.check_unchanged()
                request.file.read(request.view, request.piece.offset, request.piece.num_needed)
            except CheckpointError as caught:
                error = caught
            except BaseException as bug:
                self._finish(request, bug, is_last=True)
                raise
            self._finish(request, error)

    def _take_request(self) -> _Request | None:
        """Wait for the next request to be due; None when the reader is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_due())
            if self._is_closed:
                return None
            if self._num_in_flight == 0:
                self._io_start = time.perf_counter()
            self._num_in_flight += 1
            return self._next_request()

    def _is_due(self) -> bool:
        has_buffer = self._next_turn < self._num_returned + self._num_buffers
        return has_buffer and self._error is None and not self._is_restarting

    def _next_request(self) -> _Request:
        """Hand out the next piece of the slice whose turn it is."""
        turn = self._next_turn
        index = turn % len(self._slices)
        one, buffer = self._slices[index], self._buffers[turn % self._num_buffers]
        is_begin = not self._pieces
        if is_begin:
            self._pieces.extend(pieces_of(one, self._options.request_bytes))
            buffer.turn, buffer.num_open = turn, len(self._pieces)
        piece = self._pieces.popleft()
        if not self._pieces:
            self._next_turn = turn + 1
        is_first_of_file = is_begin and index in self._first_uses
        return _Request(self._files[one.path], buffer, turn, piece, is_first_of_file)

    def _finish(
        self, request: _Request, error: BaseException | None, *, is_last: bool = False
    ) -> None:
        """Note that a request has come back; ``is_last``: its error ends the thread."""
        with self._changed:
            self._bug = error if is_last and self._bug is None else self._bug
            self._num_bytes += request.piece.end - request.piece.begin
            request.buffer.num_open -= 1
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._io_s += time.perf_counter() - self._io_start
            if error is not None and (self._error is None or request.turn < self._error_turn):
                self._error, self._error_turn = error, request.turn
            if error is not None or request.buffer.num_open == 0 or self._num_in_flight == 0:
                self._changed.notify_all()
