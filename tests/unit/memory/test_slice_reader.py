"""The slice reader against the files' own bytes, and what it does when files or disks misbehave."""

import ctypes
import errno
import mmap
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from thinslice.errors import CheckpointError
from thinslice.kernels.arrays import aligned_buffer
from thinslice.memory import slice_reader, uncached_file
from thinslice.memory.slice_reader import ReaderOptions, SliceReader
from thinslice.memory.slice_schedule import Slice, buffer_bytes_for
from thinslice.memory.uncached_file import ALIGNMENT, UncachedFile
from thinslice.units import MIB

SMALL_REQUESTS = ReaderOptions(request_bytes=ALIGNMENT, num_threads=3)
FILE_BYTES = 50_001


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    assert not [one.name for one in threading.enumerate() if one.name.startswith("thinslice-read")]


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test both ways; for the second, the file system refuses O_DIRECT."""
    if request.param == "buffered":
        refuse_direct_reads(monkeypatch)
    return str(request.param)


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)


def write_files(folder: Path, num_files: int = 2) -> dict[Path, bytes]:
    contents = {}
    for index in range(num_files):
        path = folder / f"model-{index}.safetensors"
        contents[path] = random.Random(index).randbytes(FILE_BYTES + index)
        path.write_bytes(contents[path])
    return contents


def even_slices(paths: Sequence[Path], num_bytes: int = 10_000) -> list[Slice]:
    return [
        Slice(path, offset, num_bytes)
        for path in paths
        for offset in range(1, FILE_BYTES - num_bytes, num_bytes)
    ]


def open_reader(
    slices: Sequence[Slice], num_buffers: int = 2, options: ReaderOptions = SMALL_REQUESTS
) -> SliceReader:
    buffer_bytes = buffer_bytes_for(max(one.num_bytes for one in slices))
    return SliceReader.open(
        slices, buffer_bytes=buffer_bytes, num_buffers=num_buffers, options=options
    )


def next_of(reader: SliceReader) -> AbstractContextManager[NDArray[np.uint8]]:
    """Whatever slice comes next; the tests hold its bytes against the files'."""
    return reader.next(reader._slices[reader._num_taken % len(reader._slices)])


def take(reader: SliceReader) -> bytes:
    with next_of(reader) as data:
        return bytes(data)


def expected(contents: dict[Path, bytes], one: Slice) -> bytes:
    return contents[one.path][one.offset : one.offset + one.num_bytes]


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Up to seven (file, offset, length), the file's last byte among them now and then."""
    ranges = []
    for _ in range(draw(st.integers(1, 7))):
        offset = draw(st.integers(0, FILE_BYTES - 1))
        num_bytes = draw(st.integers(1, 20_000) | st.just(FILE_BYTES))
        ranges.append((draw(st.integers(0, 1)), offset, min(num_bytes, FILE_BYTES - offset)))
    return ranges


@given(
    ranges=schedules(),
    num_buffers=st.integers(1, 5),
    num_threads=st.integers(1, 4),
    request_pages=st.integers(1, 5),
    num_steps=st.integers(0, 25),
    choices=st.randoms(use_true_random=False),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_schedule_reads_the_files_bytes_over_and_over(
    tmp_path_factory: pytest.TempPathFactory,
    way: str,
    ranges: list[tuple[int, int, int]],
    num_buffers: int,
    num_threads: int,
    request_pages: int,
    num_steps: int,
    choices: random.Random,
) -> None:
    contents = write_files(tmp_path_factory.mktemp("schedule"))
    paths = list(contents)
    slices = [Slice(paths[file], offset, num_bytes) for file, offset, num_bytes in ranges]
    options = ReaderOptions(request_pages * ALIGNMENT, num_threads)
    with open_reader(slices, num_buffers, options) as reader:
        step = 0
        while step < num_steps:
            with ExitStack() as held:
                for _ in range(choices.randint(1, num_buffers)):
                    data = held.enter_context(next_of(reader))
                    assert bytes(data) == expected(contents, slices[step % len(slices)])
                    step += 1
            if choices.random() < 0.1:
                reader.restart()
                step = 0 if step % len(slices) else step
                num_steps -= 1


def test_the_ring_is_all_it_allocates_and_no_slice_beyond_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = even_slices(list(write_files(tmp_path)))
    allocated: list[int] = []
    num_begun, too_early, num_let_go = 0, [], 0
    lock = threading.Lock()

    def counted_buffer(num_bytes: int) -> NDArray[np.uint8]:
        allocated.append(num_bytes)
        return aligned_buffer(num_bytes)

    def counted_read(file: UncachedFile, view: memoryview, offset: int, num_needed: int) -> None:
        nonlocal num_begun
        with lock:
            num_begun += 1
            too_early.extend([num_begun] if num_begun > num_let_go + num_buffers else [])
        read(file, view, offset, num_needed)

    read = UncachedFile.read
    monkeypatch.setattr(UncachedFile, "read", counted_read)
    num_buffers = 3
    options = ReaderOptions(allocate=counted_buffer)  # one request for each slice
    with open_reader(slices, num_buffers, options) as reader:
        for _ in range(50):
            with next_of(reader):
                num_let_go += 1
    assert allocated == [num_buffers * buffer_bytes_for(10_000)]
    assert num_begun >= 50
    assert not too_early


def test_another_slice_than_the_expected_one_is_refused_and_both_are_named(tmp_path: Path) -> None:
    first, second, *_ = slices = even_slices(list(write_files(tmp_path)))
    assert first.num_bytes == second.num_bytes
    with open_reader(slices) as reader:
        with pytest.raises(AssertionError, match=f"offset={first.offset}.*offset={second.offset}"):
            reader.next(second).__enter__()
        reader.restart()
        with reader.next(first), reader.next(second):
            pass


def test_holding_more_slices_than_the_ring_has_is_a_bug(tmp_path: Path) -> None:
    slices = even_slices(list(write_files(tmp_path)))
    with open_reader(slices) as reader, next_of(reader), next_of(reader):
        held = pytest.raises(AssertionError, match="held already")
        with held:
            take(reader)


def test_the_ring_is_aligned_and_counted_from_the_start() -> None:
    before = resident_bytes()
    num_bytes = 64 * MIB + ALIGNMENT
    buffer = aligned_buffer(num_bytes)
    grown = resident_bytes() - before
    assert buffer.shape == (num_bytes,)
    assert buffer.ctypes.data % (2 * MIB) == 0
    assert num_bytes - MIB < grown < num_bytes + MIB
    assert not buffer.any()


def resident_bytes() -> int:
    """Counted page by page: the quick counters are off by a little for each core."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def test_what_is_read_does_not_stay_in_the_page_cache(tmp_path: Path, way: str) -> None:
    path, content = next(iter(write_files(tmp_path, 1).items()))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(file.fileno()):
            pytest.skip("this file system keeps its files in memory")
        slices = [Slice(path, 0, 16_384), Slice(path, 16_384, len(content) - 16_384)]
        with open_reader(slices) as reader:
            assert take(reader) + take(reader) == content
            assert reader.buffered_paths == (() if way == "direct" else (path,))
        assert not is_cached(file.fileno())


def is_cached(descriptor: int) -> bool:
    """Whether any page of the file is in the page cache; asking brings none in."""
    with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
        address, length = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapping))
        assert ctypes.CDLL(None).mincore(address, length, pages) == 0
        del first
    return any(page & 1 for page in pages)


def test_a_file_in_memory_is_told_as_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(iter(write_files(tmp_path, 1)))
    monkeypatch.setattr(uncached_file, "_file_system", lambda device: "tmpfs")
    with open_reader(even_slices([path])) as reader:
        assert reader.buffered_paths == (path,)


def test_a_missing_file_is_named_and_leaves_nothing_open(tmp_path: Path) -> None:
    path = next(iter(write_files(tmp_path, 1)))
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist"):
        open_reader([Slice(path, 0, 10), Slice(tmp_path / "gone.safetensors", 0, 10)])
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_slice_past_the_end_of_the_file_is_an_error(tmp_path: Path, way: str) -> None:
    contents = write_files(tmp_path, 1)
    path = next(iter(contents))
    last = Slice(path, FILE_BYTES - 10, 11)
    with open_reader([Slice(path, 0, 10), last]) as reader:
        assert take(reader) == contents[path][:10]
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"{path} ends at byte {FILE_BYTES}"):
                take(reader)


@pytest.mark.parametrize("most", [ALIGNMENT, ALIGNMENT + 1000])
def test_reads_that_give_less_than_asked_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, most: int
) -> None:
    contents = write_files(tmp_path, 1)
    slices = even_slices(list(contents))
    preadv = os.preadv

    def short_preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert offset % ALIGNMENT == 0
        return min(preadv(descriptor, buffers, offset), most)

    monkeypatch.setattr(os, "preadv", short_preadv)
    with open_reader(slices, options=ReaderOptions()) as reader:
        assert [take(reader) for _ in slices] == [expected(contents, one) for one in slices]


def shrink(path: Path) -> None:
    os.truncate(path, 100)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


def write_into(path: Path) -> None:
    with path.open("rb+") as file:
        file.write(b"x")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [shrink, replace, write_into, os.unlink])
def test_a_file_that_changes_is_found_at_its_first_slice_of_the_next_sweep(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    contents = write_files(tmp_path)
    stays, changes = contents
    slices = [Slice(stays, 0, 10_000), Slice(changes, 0, 10_000), Slice(changes, 7, 5)]
    with open_reader(slices, num_buffers=1) as reader:  # so that nothing is read ahead
        assert [take(reader) for _ in range(2)] == [expected(contents, one) for one in slices[:2]]
        with next_of(reader) as data:
            assert bytes(data) == expected(contents, slices[2])
            change(changes)
        assert take(reader) == expected(contents, slices[0])
        for _ in range(2):
            with pytest.raises(CheckpointError, match=str(changes)):
                take(reader)
        reader.restart()
        assert take(reader) == expected(contents, slices[0])
        with pytest.raises(CheckpointError, match=str(changes)):
            take(reader)


def test_a_disk_error_is_raised_at_its_slice_and_restart_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = write_files(tmp_path, 1)
    slices = even_slices(list(contents))
    failing = slices[2].aligned_start + ALIGNMENT
    is_broken = threading.Event()
    is_broken.set()
    preadv = os.preadv

    def broken_preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == failing and is_broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken_preadv)
    with open_reader(slices, num_buffers=4) as reader:
        assert [take(reader) for _ in range(2)] == [expected(contents, one) for one in slices[:2]]
        for _ in range(2):
            with pytest.raises(CheckpointError, match=f"{slices[0].path} cannot be read: Input"):
                take(reader)
        is_broken.clear()
        reader.restart()
        assert [take(reader) for _ in slices] == [expected(contents, one) for one in slices]


def test_of_two_errors_the_one_that_comes_first_in_the_schedule_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = even_slices(list(write_files(tmp_path)))
    second_failed = threading.Event()
    is_first_settled = []
    finish = SliceReader._finish

    def faulty(file: UncachedFile, view: memoryview, offset: int, num_needed: int) -> None:
        if offset == slices[0].aligned_start:
            second_failed.wait()
            raise CheckpointError("first")
        raise CheckpointError("second")

    def noted(reader: SliceReader, request: Any, error: BaseException | None) -> None:
        finish(reader, request, error)
        is_first_settled.append(reader._is_settled(0))
        second_failed.set()

    monkeypatch.setattr(UncachedFile, "read", faulty)
    monkeypatch.setattr(SliceReader, "_finish", noted)
    options = ReaderOptions(num_threads=2)
    with open_reader(slices, options=options) as reader:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="first"):
                take(reader)
    assert is_first_settled == [False, True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_a_thread_reaches_the_consumer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(file: UncachedFile, view: memoryview, offset: int, num_needed: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(UncachedFile, "read", faulty)
    slices = even_slices(list(write_files(tmp_path)))

    def sweep(reader: SliceReader) -> None:
        reader.restart()
        take(reader)

    with open_reader(slices) as reader:
        for _ in range(10):  # more often than there are threads to end by it
            with pytest.raises(ZeroDivisionError):
                sweep(reader)


def test_leaving_in_the_middle_of_a_sweep_ends_threads_and_files(tmp_path: Path) -> None:
    descriptors = os.listdir("/proc/self/fd")
    slices = even_slices(list(write_files(tmp_path)))

    def abandon() -> None:
        with open_reader(slices) as reader, next_of(reader), next_of(reader):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        abandon()
    assert os.listdir("/proc/self/fd") == descriptors


def test_closing_does_not_wait_for_a_dead_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = even_slices(list(write_files(tmp_path)))
    may_read = threading.Event()
    read = UncachedFile.read

    def stuck(file: UncachedFile, view: memoryview, offset: int, num_needed: int) -> None:
        may_read.wait()
        read(file, view, offset, num_needed)

    monkeypatch.setattr(UncachedFile, "read", stuck)
    monkeypatch.setattr(slice_reader, "_STUCK_S", 0.01)
    before = threading.enumerate()
    try:
        with open_reader(slices):
            stuck_threads = [one for one in threading.enumerate() if one not in before]
        assert all(one.is_alive() and one.daemon for one in stuck_threads)
        assert len(stuck_threads) == SMALL_REQUESTS.num_threads
    finally:
        may_read.set()
    for one in stuck_threads:
        one.join()


def test_a_slice_that_is_kept_too_long_outlives_the_reader(tmp_path: Path) -> None:
    contents = write_files(tmp_path)
    slices = even_slices(list(contents))
    with open_reader(slices) as reader, next_of(reader) as data:
        pass
    assert bytes(data[:1])  # its memory is still there, whatever it holds now


def test_restart_begins_anew_but_keeps_what_was_read_ahead_at_the_end_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = write_files(tmp_path, 1)
    slices = even_slices(list(contents))
    read, offsets = UncachedFile.read, []

    def noted_read(file: UncachedFile, view: memoryview, offset: int, num_needed: int) -> None:
        offsets.append(offset)
        read(file, view, offset, num_needed)

    monkeypatch.setattr(UncachedFile, "read", noted_read)
    sweep = [expected(contents, one) for one in slices]
    in_order = ReaderOptions(num_threads=1)
    with open_reader(slices, options=in_order) as reader:
        assert [take(reader) for _ in slices] == sweep
        reader.restart()
        assert [take(reader) for _ in slices] == sweep
    starts = [one.aligned_start for one in slices]
    assert offsets[: 2 * len(slices)] == starts * 2
    with open_reader(slices, options=in_order) as reader:
        assert take(reader) == sweep[0]
        with next_of(reader):
            reader.restart()  # takes the slice back, as after an exception
        assert [take(reader) for _ in slices] == sweep


def test_an_interrupt_while_waiting_leaves_the_reader_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = write_files(tmp_path, 1)
    slices = even_slices(list(contents))
    read = UncachedFile.read
    is_waiting, may_read = threading.Event(), threading.Event()

    def slow_read(file: UncachedFile, view: memoryview, offset: int, num_needed: int) -> None:
        if not may_read.is_set():
            is_waiting.wait()
            # Python may miss a signal that comes just before it waits, until the wait ends.
            while not may_read.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                may_read.wait(0.5)
        read(file, view, offset, num_needed)

    monkeypatch.setattr(UncachedFile, "read", slow_read)

    def wait() -> None:
        is_waiting.set()
        take(reader)

    with open_reader(slices, options=ReaderOptions(num_threads=1)) as reader:
        with pytest.raises(KeyboardInterrupt):
            wait()
        may_read.set()
        assert take(reader) == expected(contents, slices[0])


def test_stats_count_bytes_and_time(tmp_path: Path) -> None:
    slices = even_slices(list(write_files(tmp_path)))
    with open_reader(slices) as reader:
        for _ in range(3 * len(slices)):
            take(reader)
        stats = reader.stats()
    assert stats.num_bytes >= 3 * sum(one.aligned_bytes for one in slices)
    assert stats.io_s > 0
    assert stats.wait_s > 0
