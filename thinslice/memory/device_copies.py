"""Copy a cyclic schedule of slices to a device ahead of their use, into a ring of its buffers.

One thread does it: it takes the next slice, from page-locked memory or from the slice reader, which
may have to wait for the disk, and asks the device for the copy. The device waits by itself: a copy
for the computing that used its buffer before, computing for the copy it needs. So copying goes on
across layers and tokens while the device computes, and the thread that computes waits for nothing
but a slice that the disk has not given yet.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinslice.errors import CheckpointError
from thinslice.kernels.arrays import Array
from thinslice.memory.device import Device, Event
from thinslice.memory.slice_reader import SliceReader
from thinslice.memory.slice_schedule import Slice
from thinslice.plan.weight_layout import WeightSlice

# A device that does not answer for so long is broken; waiting on would hang the whole program.
_STUCK_S = 10.0


@dataclass(frozen=True)
class Source:
    """A slice and where its bytes lie: page-locked, uint8, or on disk."""

    one: WeightSlice
    place: NDArray[np.uint8] | Slice

    @property
    def num_bytes(self) -> int:
        """Bytes that are copied."""
        return self.place.num_bytes if isinstance(self.place, Slice) else self.place.size


class DeviceCopies:
    """A ring of buffers on a device; one thread consumes: ``with copies.next(expected) as data``.

    Args:
        sources: what is copied, in order; the reader's schedule holds those on disk.
        ring: uint8 buffers on the device, each as large as the largest slice.
        reader: has a buffer more than the one in use, so that it reads while one is copied.

    Memory: none of its own.
    """

    def __init__(
        self,
        device: Device,
        sources: Sequence[Source],
        ring: Sequence[Array],
        reader: SliceReader | None,
    ) -> None:
        assert sources, "nothing to copy"
        assert ring, "no buffers"
        self._device = device
        self._sources = tuple(sources)
        self._ring = tuple(ring)
        self._reader = reader
        self._thread = threading.Thread(target=self._copy_ahead, name="thinslice-copy", daemon=True)

        # All that follows is guarded by this condition's lock. Slices are counted over all sweeps.
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_restarting = False
        self._is_broken = False  # the thread has ended by an error nobody thought of
        self._is_copying = False
        self._num_begun = 0  # copies asked for
        self._num_taken = 0  # slices the consumer has asked for
        self._num_returned = 0
        self._copied: list[Event | None] = [None] * len(ring)
        self._computed: list[Event | None] = [None] * len(ring)
        self._error: BaseException | None = None
        self._wait_s = 0.0

    def start(self) -> None:
        """Begin to copy."""
        # The ring's memory may have had another use that is not over yet.
        self._computed = [self._device.mark()] * len(self._ring)
        self._thread.start()

    @property
    def wait_s(self) -> float:
        """Seconds the consumer waited until a copy was at least asked for."""
        return self._wait_s

    @contextmanager
    def next(self, expected: WeightSlice) -> Iterator[Array]:
        """The next slice's bytes on the device, for what is asked to be computed in the block.

        As in ``SliceReader.next``, the consumer names the slice that it is about to use.

        Errors: CheckpointError where it, or one before it, could not be read.
        """
        with self._changed:
            turn = self._num_taken
            assert turn == self._num_returned, "a slice is held already"
            start = time.perf_counter()
            self._changed.wait_for(
                lambda: self._is_closed or self._num_begun > turn or self._error is not None
            )
            self._wait_s += time.perf_counter() - start
            assert not self._is_closed, "the copies are closed"
            if self._num_begun <= turn:
                assert self._error is not None, "neither a copy nor an error"
                raise self._error
            self._num_taken = turn + 1
            place = turn % len(self._ring)
            copied = self._copied[place]
        try:
            source = self._sources[turn % len(self._sources)]
            assert source.one == expected, f"the next slice is {source.one}, not {expected}"
            assert copied is not None, "a copy without an event"
            self._device.wait(copied)
            yield self._ring[place][: source.num_bytes]
        finally:
            computed = self._device.mark()
            with self._changed:
                self._computed[place] = computed
                self._num_returned = turn + 1
                self._changed.notify_all()

    def restart(self) -> None:
        """Go back to the first slice, as after a sweep that was broken off or failed.

        At the end of a sweep this changes nothing, and what was copied ahead stays. Errors that are
        no CheckpointError stay, and are raised.
        """
        num_slices = len(self._sources)
        with self._changed:
            self._check_thread()
            is_whole = self._num_taken == self._num_returned and self._num_taken % num_slices == 0
            if is_whole and self._error is None:
                return
            try:
                self._is_restarting = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._is_copying)
                self._check_thread()
                if self._reader is not None:
                    self._reader.restart()
                first = -(-self._num_begun // num_slices) * num_slices
                # What is in the ring is given up: the computing that may still read it is over.
                self._computed = [self._device.mark()] * len(self._ring)
                self._num_begun = self._num_taken = self._num_returned = first
                self._error = None
            finally:
                self._is_restarting = False
                self._changed.notify_all()

    def close(self) -> None:
        """End the thread, wait for copies that were asked for, and let the memory go.

        A device that does not answer is not waited for.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_STUCK_S)
        if self._thread.is_alive():
            return
        try:
            for copied in self._copied:
                if copied is not None:
                    self._device.finish(copied)
        finally:
            self._sources, self._ring = (), ()
            self._copied.clear()

    def _check_thread(self) -> None:
        """Raise the error nobody thought of that has ended the thread."""
        if self._is_broken:
            assert self._error is not None, "no error has ended the thread"
            raise self._error

    def _copy_ahead(self) -> None:
        while (turn := self._take_turn()) is not None:
            try:
                self._copy(turn)
            except CheckpointError as error:
                self._settle(error)
            except BaseException as bug:
                self._settle(bug, is_last=True)
                raise
            else:
                self._settle(None)

    def _settle(self, error: BaseException | None, *, is_last: bool = False) -> None:
        with self._changed:
            self._is_broken |= is_last
            self._is_copying = False
            self._error = error
            self._num_begun += error is None
            self._changed.notify_all()

    def _take_turn(self) -> int | None:
        """Wait until a buffer is free; the slice that is due, or None when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_due())
            if self._is_closed:
                return None
            self._is_copying = True
            return self._num_begun

    def _is_due(self) -> bool:
        has_buffer = self._num_begun < self._num_returned + len(self._ring)
        return has_buffer and self._error is None and not self._is_restarting

    def _copy(self, turn: int) -> None:
        place, source = turn % len(self._ring), self._sources[turn % len(self._sources)].place
        is_read = isinstance(source, Slice)
        given: AbstractContextManager[NDArray[np.uint8]]
        if isinstance(source, np.ndarray):
            given = nullcontext(source)
        else:
            assert self._reader is not None, "a slice on disk without a reader"
            given = self._reader.next(source)
        with given as data:
            target = self._ring[place][: data.size]
            copied = self._device.copy(target, data, self._computed[place])
            if is_read:  # the reader reads into this buffer next
                self._device.finish(copied)
        self._copied[place] = copied
