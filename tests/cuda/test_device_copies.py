"""Copies ahead: in order, into buffers that are free, from sources that stay; errors come out."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.arrays import tensor_of
from tests.cuda.twin_device import Memory, TwinDevice, TwinEvent
from thinslice.errors import CheckpointError
from thinslice.memory.device_copies import DeviceCopies, Source
from thinslice.memory.measure_device import measure_device
from thinslice.memory.slice_reader import SliceReader
from thinslice.memory.slice_schedule import Slice
from thinslice.plan.tensors import Origin, Role, Room, Tensor
from thinslice.plan.weight_layout import Matrix, WeightSlice

SIZE, NUM_SLICES = 4096, 7


def content(index: int) -> NDArray[np.uint8]:
    return np.full(SIZE, index, np.uint8)


def slice_at(index: int) -> WeightSlice:
    origin = Origin("a", (0, NUM_SLICES), (0, SIZE))
    tensor = Tensor("a", (NUM_SLICES, SIZE), Role.UP, Room.LAYERS, 0, origin)
    return WeightSlice(Matrix(tensor, "I8", SIZE, "I8"), index, index + 1)


@contextmanager
def copies_of(device: TwinDevice, path: Path, num_buffers: int = 3) -> Iterator[DeviceCopies]:
    """Every third slice lies on disk."""
    path.write_bytes(b"".join(bytes([index]) * SIZE for index in range(NUM_SLICES)))
    on_disk = [Slice(path, index * SIZE, SIZE) for index in range(0, NUM_SLICES, 3)]
    places = [
        Slice(path, index * SIZE, SIZE) if index % 3 == 0 else content(index)
        for index in range(NUM_SLICES)
    ]
    sources = [Source(slice_at(index), place) for index, place in enumerate(places)]
    ring = [*device.empty((num_buffers, SIZE), "uint8")]
    with SliceReader.open(on_disk, buffer_bytes=2 * SIZE, num_buffers=2) as reader:
        copies = DeviceCopies(device, sources, ring, reader)
        copies.start()
        try:
            yield copies
        finally:
            copies.close()


def sweep(copies: DeviceCopies, count: int = NUM_SLICES) -> None:
    for index in range(count):
        with copies.next(slice_at(index)) as data:
            assert torch.equal(data, tensor_of(content(index)))


def sweep_often(copies: DeviceCopies) -> None:
    for _ in range(3):
        copies.restart()
        sweep(copies)


@pytest.mark.parametrize("num_buffers", [1, 3, 9])
def test_sweeps_come_in_order_and_go_on_after_one_broken_off(
    num_buffers: int, tmp_path: Path
) -> None:
    with copies_of(TwinDevice(), tmp_path / "weights", num_buffers) as copies:
        for count in (NUM_SLICES, NUM_SLICES, 4, NUM_SLICES, 1, NUM_SLICES):
            copies.restart()
            sweep(copies, count)


def test_another_slice_than_the_expected_one_is_refused(tmp_path: Path) -> None:
    with copies_of(TwinDevice(), tmp_path / "weights") as copies:
        sweep(copies, 1)
        with pytest.raises(AssertionError, match=r"start=1.*start=2"):
            copies.next(slice_at(2)).__enter__()


def test_copies_go_ahead_across_the_end_of_a_sweep(tmp_path: Path) -> None:
    device = TwinDevice()
    with copies_of(device, tmp_path / "weights") as copies:
        sweep(copies)
        with copies._changed:
            assert copies._changed.wait_for(lambda: copies._num_begun == NUM_SLICES + 3, 10)
        assert device.num_copied_bytes == (NUM_SLICES + 3) * SIZE


def test_a_file_that_shrinks_is_named_each_time_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with copies_of(TwinDevice(), path) as copies:
        sweep(copies)
        path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="weights"):
            sweep_often(copies)
        with pytest.raises(CheckpointError, match="weights"):
            sweep(copies)


class Hasty(TwinDevice):
    """Computes without waiting for copies."""

    def wait(self, event: TwinEvent) -> None:
        pass


class Rash(TwinDevice):
    """Copies without waiting for computing."""

    def copy(self, target: Memory, source: Memory, after: TwinEvent | None):
        return super().copy(target, source, None)


class Careless(TwinDevice):
    """Lets the reader go on before a copy is done."""

    def finish(self, event: TwinEvent) -> None:
        pass


def test_computing_that_does_not_wait_is_seen(tmp_path: Path) -> None:
    with copies_of(Hasty(), tmp_path / "weights") as copies, pytest.raises(AssertionError):
        sweep_often(copies)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("kind", "text"), [(Rash, "still computed with"), (Careless, "changed|equal")]
)
def test_copies_that_do_not_wait_are_seen(
    kind: type[TwinDevice], text: str, tmp_path: Path
) -> None:
    """A source that changes is seen before it is copied or, a moment later, in what was copied."""
    path = tmp_path / "weights"
    with copies_of(kind(), path) as copies, pytest.raises(AssertionError, match=text):
        sweep_often(copies)


class Faulty(TwinDevice):
    """Fails at a copy."""

    def copy(self, target: Memory, source: Memory, after: TwinEvent | None):
        if self.num_copied_bytes == 2 * SIZE:
            raise RuntimeError("the card is busy")
        return super().copy(target, source, after)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_nobody_thought_of_is_raised_each_time_and_nobody_waits(tmp_path: Path) -> None:
    with copies_of(Faulty(), tmp_path / "weights") as copies:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="the card is busy"):
                sweep_often(copies)


class Late(Faulty):
    """The same, but not before it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.may_fail = threading.Event()

    def copy(self, target: Memory, source: Memory, after: TwinEvent | None):
        if self.num_copied_bytes == 2 * SIZE:
            self.may_fail.wait(10)
        return super().copy(target, source, after)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_such_an_error_during_a_restart_is_not_forgotten(tmp_path: Path) -> None:
    device = Late()
    with copies_of(device, tmp_path / "weights") as copies:
        sweep(copies, 1)
        threading.Timer(0.2, device.may_fail.set).start()
        with pytest.raises(RuntimeError, match="the card is busy"):
            copies.restart()


def test_memory_that_is_unlocked_under_a_copy_is_seen() -> None:
    device = TwinDevice()
    source = device.page_locked(SIZE)
    copied = device.copy(device.empty((SIZE,), "uint8"), source, None)
    with pytest.raises(AssertionError, match="under a copy"):
        device.unlock(source)
    device.finish(copied)
    device.unlock(source)


def test_copies_that_were_asked_for_are_done_when_they_are_closed(tmp_path: Path) -> None:
    device = TwinDevice()
    with copies_of(device, tmp_path / "weights") as copies, copies._changed:
        assert copies._changed.wait_for(lambda: copies._num_begun == 3, 10)
    assert device._num_done == len(device._copies) == 3


def test_a_device_is_measured() -> None:
    device = TwinDevice()
    profile = measure_device(device, SIZE)
    assert min(profile.host_to_device_bytes_per_s, profile.memory_read_bytes_per_s) > 0
    assert profile.flops_per_s > 0
    assert device.num_locked == 0
