"""Fetch a model from the Hugging Face Hub.

Which server and which token is huggingface_hub's business: HF_ENDPOINT, HF_TOKEN or the token of
`hf auth login`, HF_HUB_OFFLINE. The token goes to that server and to no other: a redirect to
another host drops it.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url, metadata_load
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from yaml import YAMLError  # type: ignore[import-untyped]

from thinslice.checkpoint.file_names import CONFIG, GENERATION_CONFIG
from thinslice.checkpoint.files import read_json_object
from thinslice.errors import CheckpointError, StoreError
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.store.download import download
from thinslice.store.files import (
    check_free_space,
    disk_errors,
    publish,
    remove_all_but,
    sha256_of,
    sync_file,
)
from thinslice.store.hub_files import (
    INDEX,
    RemoteFile,
    check_is_safetensors,
    documents,
    gguf_files,
    remote_files,
    safetensors_files,
    small_files,
)
from thinslice.store.manifest import Fetched, StoredFile
from thinslice.store.names import HubModel
from thinslice.store.progress import Progress
from thinslice.units import MIB

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_JSON_BYTES = 16 * MIB


def fetch(name: HubModel, folder: Path, progress: Progress) -> Fetched:
    """Put the model's files into a folder; what is there whole is kept, what is begun is ended.

    A model of an unsupported kind is refused before its weights are fetched.

    Peak extra memory: one copy buffer, and settings files while they are parsed.
    Errors: StoreError for the network, the Hub and the disk; ConfigError for a GGUF that is not
    there; CheckpointError for a model thinslice cannot run.
    """
    with _hub_errors(name):
        info = _model_info(name)
    files = remote_files(info.siblings or ())
    transfer = _Transfer(name, str(info.sha), folder, progress)
    if name.quant is None:
        wanted, entry = _safetensors(transfer, files), "."
    else:
        parts = gguf_files(name.repo_id, files, name.quant)
        wanted, entry = [*documents(files), *parts], parts[0].name
    transfer.keep_only(wanted)
    return Fetched(
        source=f"{constants.ENDPOINT}/{name.repo_id}",
        revision=transfer.commit,
        entry=entry,
        files=transfer.fetch_all(wanted),
        licence=_licence(info.card_data),
    )


def _safetensors(transfer: "_Transfer", files: dict[str, RemoteFile]) -> list[RemoteFile]:
    """The files to fetch. The settings are fetched here: they tell whether the rest is worth it."""
    repo_id = transfer.name.repo_id
    check_is_safetensors(repo_id, files)
    small = small_files(files)
    transfer.fetch_all(small)
    try:
        _read_shape(transfer.folder, files)
        index = None
        if INDEX in files:
            index = read_json_object(transfer.folder / INDEX, _MAX_JSON_BYTES)
        weights = safetensors_files(repo_id, files, index)
    except CheckpointError:
        shutil.rmtree(transfer.folder, ignore_errors=True)
        raise
    return [*small, *weights]


def fetch_shape(name: HubModel, progress: Progress) -> ModelShape:
    """The shape of a model by its settings alone, which are fetched and not kept.

    Errors: as ``fetch``.
    """
    with _hub_errors(name, is_kept=False):
        info = _model_info(name)
    files = remote_files(info.siblings or ())
    check_is_safetensors(name.repo_id, files)
    wanted = [file for file in small_files(files) if file.name in (CONFIG, GENERATION_CONFIG)]
    with TemporaryDirectory(prefix="thinslice-") as folder:
        transfer = _Transfer(name, str(info.sha), Path(folder), progress, is_kept=False)
        transfer.fetch_all(wanted)
        return _read_shape(Path(folder), files)


def _read_shape(folder: Path, files: dict[str, RemoteFile]) -> ModelShape:
    config = read_json_object(folder / CONFIG, _MAX_JSON_BYTES)
    generation = None
    if GENERATION_CONFIG in files:
        generation = read_json_object(folder / GENERATION_CONFIG, _MAX_JSON_BYTES)
    return shape_from_config(config, generation)


@dataclass(frozen=True)
class _Transfer:
    """Files of one commit on their way into one folder.

    Attributes:
        is_kept: what has come stays there when the transfer is broken off.
    """

    name: HubModel
    commit: str
    folder: Path
    progress: Progress
    is_kept: bool = True

    def fetch_all(self, files: Sequence[RemoteFile]) -> tuple[StoredFile, ...]:
        """Fetch what is missing of these files."""
        missing_bytes = sum(file.num_bytes - self._bytes_here(file) for file in files)
        check_free_space(self.folder, self.name.text, missing_bytes)
        with disk_errors(self.folder, self.name.text, missing_bytes):
            self.folder.mkdir(parents=True, exist_ok=True)
            return tuple(self._fetch(file) for file in files)

    def keep_only(self, files: Sequence[RemoteFile]) -> None:
        """Remove what earlier pulls, perhaps of another commit, have left."""
        if not self.folder.is_dir():
            return
        names = {file.name for file in files}
        with disk_errors(self.folder, self.name.text):
            remove_all_but(self.folder, names | {_part_name(file) for file in files})

    def _bytes_here(self, file: RemoteFile) -> int:
        for name in (file.name, _part_name(file)):
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else 0
            if 0 < size <= file.num_bytes:
                return size
        return 0

    def _fetch(self, file: RemoteFile) -> StoredFile:
        final = self.folder / file.name
        sha256 = self._sha256_if_right(final, file)
        if sha256 is None:
            part = self.folder / _part_name(file)
            sha256 = self._download(file, part)
            sync_file(part)
            publish(part, final)
        return StoredFile(file.name, file.num_bytes, sha256)

    def _download(self, file: RemoteFile, part: Path) -> str:
        is_resumed = part.exists()
        url = hf_hub_url(self.name.repo_id, file.path, revision=self.commit)
        with _hub_errors(self.name, is_kept=self.is_kept):
            download(url, part, file.num_bytes, build_hf_headers(), self._step("downloading", file))
        sha256 = self._sha256_if_right(part, file)
        if sha256 is not None:
            return sha256
        part.unlink()
        if is_resumed:  # what was left of an earlier pull may be the damaged half
            return self._download(file, part)
        raise StoreError(
            f"{file.path} of {self.name.repo_id} came from {constants.ENDPOINT} with another "
            "checksum than announced; pull again, or check the proxy in between"
        )

    def _sha256_if_right(self, path: Path, file: RemoteFile) -> str | None:
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            return None
        git_blob = hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)
        sha256 = sha256_of(path, self._step("checking", file), git_blob)
        return sha256 if file.digest in (sha256, git_blob.hexdigest()) else None

    def _step(self, what: str, file: RemoteFile) -> Callable[[int], None]:
        return lambda done: self.progress(f"{what} {file.name}", done, file.num_bytes)


def _part_name(file: RemoteFile) -> str:
    # By content, so that another commit's half is never gone on with.
    return f"{file.digest}.part"


def _model_info(name: HubModel) -> ModelInfo:
    try:
        info = HfApi().model_info(
            name.repo_id,
            revision=name.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{constants.ENDPOINT} does not answer as a Hub does") from error
    commit = str(info.sha)
    is_pinned = name.revision is not None and _COMMIT.fullmatch(name.revision)
    if not _COMMIT.fullmatch(commit) or (is_pinned and commit != name.revision):
        raise StoreError(f"{constants.ENDPOINT} answered for another commit: {commit!r:.60}")
    return info


def licence_of(card: Path) -> str | None:
    """The licence that a model card on disk gives; None where it is not to be read.

    Errors: OSError.
    """
    try:
        return _licence(metadata_load(card))
    except (ValueError, RecursionError, YAMLError):
        return None


def _licence(card: Any) -> str | None:
    """The licence of a model card's data; where that is "other", the name it gives."""
    licence = None if card is None else card.get("license")
    if card is not None and licence == "other":
        licence = card.get("license_name") or licence
    return licence if isinstance(licence, str) else None


@contextmanager
def _hub_errors(name: HubModel, *, is_kept: bool = True) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into one line that says what helps.

    Args:
        is_kept: as of a transfer.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise StoreError(
            f"{name.text} is not stored and HF_HUB_OFFLINE is set; unset it to pull"
        ) from error
    except (HfHubHTTPError, httpx2.RequestError, httpx2.InvalidURL) as error:
        raise StoreError(_complaint(error, name, is_kept)) from error


def _complaint(error: Exception, name: HubModel, is_kept: bool) -> str:
    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return (
            f"{name.repo_id} is gated: accept its terms at {hub}/{name.repo_id}, then set HF_TOKEN "
            "or run `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name.repo_id} has no revision {name.revision!r}; see {hub}/{name.repo_id}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name.repo_id} is no folder here and no public model of {hub}; check the spelling, "
            "or set HF_TOKEN if it is private"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = "check HF_TOKEN" if status in (401, 403) else "try again later"
        return f"{hub} answered {status} for {name.text}; {hint}"
    resumed = ": a pull goes on where it stopped" if is_kept else ""
    return (
        f"cannot reach {hub} for {name.text} ({type(error).__name__}); check the network, the "
        f"proxy and HF_ENDPOINT, then try again{resumed}"
    )
