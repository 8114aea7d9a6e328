"""Choose the files of a Hub repository that make a model: by name alone, nothing is fetched.

Only data is ever chosen: never Python, never pickle. Every local name is a plain file name, so no
repository can write outside its folder.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from thinslice.checkpoint.adapters import ADAPTER_CONFIG, is_adapter_weights
from thinslice.checkpoint.file_names import CONFIG, SETTINGS, TOOL_TEMPLATES, is_document
from thinslice.errors import CheckpointError, ConfigError, StoreError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SMALL = {CONFIG, INDEX, *SETTINGS, TOOL_TEMPLATES[0]}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# llama.cpp's gguf-split names the parts of a model so.
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_TAG = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d|TQ\d|BF16|FP?16|FP?32|MXFP4|NVFP4)\w*)$", re.I)
# Projectors of vision models and statistics of a quantiser are GGUF files, but no model.
_NO_MODEL = re.compile(r"mmproj|imatrix", re.I)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        path: inside the repository.
        name: its name in the store.
        digest: SHA-256 of the content, or, with 40 digits, the SHA-1 git gives it as a blob.
    """

    path: str
    name: str
    num_bytes: int
    digest: str


def remote_files(siblings: Iterable[Any]) -> dict[str, RemoteFile]:
    """The files with a plain name, by path, from huggingface_hub's RepoSibling objects.

    Errors: StoreError for a size or a digest that is none.
    """
    files = {}
    for sibling in siblings:
        name = sibling.rfilename.rpartition("/")[2]
        if not _PLAIN_NAME.fullmatch(name):
            continue
        size = sibling.size if sibling.lfs is None else sibling.lfs.size
        digest = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
        if type(size) is not int or size < 0 or not _DIGEST.fullmatch(str(digest)):
            raise StoreError(f"the Hub tells no size and checksum for {sibling.rfilename!r:.120}")
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, name, size, str(digest))
    return files


def small_files(files: Mapping[str, RemoteFile]) -> list[RemoteFile]:
    """Settings, tokenizer, model card and licence."""
    return [files[path] for path in files if path in _SMALL or is_document(path)]


def documents(files: Mapping[str, RemoteFile]) -> list[RemoteFile]:
    """Model card and licence: all that a GGUF does not hold itself."""
    return [files[path] for path in files if is_document(path)]


def check_is_safetensors(repo_id: str, files: Mapping[str, RemoteFile]) -> None:
    """Refuse a repository that is no whole safetensors model, and say what would work.

    Errors: ConfigError where it holds GGUF files to choose from; else CheckpointError.
    """
    weights = [path for path in files if "/" not in path and is_adapter_weights(path)]
    models = [path for path in _root_safetensors(files) if path not in weights]
    if weights and (ADAPTER_CONFIG in files or not models):
        raise CheckpointError(
            f"{repo_id} holds an adapter ({weights[0]}), which is not applied to a model: take a "
            "model that it was merged into"
        )
    if not models and INDEX not in files:
        if tags := _ggufs_by_tag(files):
            raise ConfigError(f"{repo_id} holds GGUF files; name one as {_choices(repo_id, tags)}")
        pickles = [path for path in files if path.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        only = ", only pickle, which can run any code when it is loaded" if pickles else ""
        raise CheckpointError(f"{repo_id} holds neither safetensors nor a GGUF{only}")
    for required in (CONFIG, "tokenizer.json"):
        if required not in files:
            raise CheckpointError(f"{repo_id} has no {required}, which a model needs")


def safetensors_files(
    repo_id: str, files: Mapping[str, RemoteFile], index: Mapping[str, Any] | None
) -> list[RemoteFile]:
    """The weights: model.safetensors, or the shards that the index names, or the only file.

    Errors: CheckpointError where the index or the files do not tell.
    """
    if _SINGLE in files:
        return [files[_SINGLE]]
    if index is None:
        paths = [path for path in _root_safetensors(files) if not is_adapter_weights(path)]
        if len(paths) != 1:
            raise CheckpointError(f"{repo_id} has {len(paths)} safetensors files and no {INDEX}")
        return [files[paths[0]]]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{repo_id}: {INDEX} has no weight_map")
    paths = sorted({str(shard) for shard in weight_map.values()})
    for path in paths:
        if path not in files or not path.endswith(".safetensors"):
            raise CheckpointError(f"{repo_id}: {INDEX} names {path!r:.120}, which is not there")
    if len({files[path].name for path in paths}) != len(paths):
        raise CheckpointError(f"{repo_id}: {INDEX} names two files of the same name")
    return [files[path] for path in paths]


def _root_safetensors(files: Mapping[str, RemoteFile]) -> list[str]:
    return [path for path in files if "/" not in path and path.endswith(".safetensors")]


def gguf_files(repo_id: str, files: Mapping[str, RemoteFile], tag: str) -> list[RemoteFile]:
    """The GGUF with this quantisation, all its parts in order.

    Errors: ConfigError, with the tags there are, where there is none or more than one;
    CheckpointError where a part is missing.
    """
    tags = _ggufs_by_tag(files)
    if not tags:
        raise ConfigError(f"{repo_id} holds no GGUF; without :{tag} it names the safetensors")
    models = tags.get(tag, {})
    if not models:
        raise ConfigError(f"{repo_id} has no GGUF {tag}; there is {_choices(repo_id, tags)}")
    if len(models) > 1:
        raise ConfigError(
            f"{repo_id} has {len(models)} GGUF models {tag} ({', '.join(sorted(models)):.300}); "
            "download one and name its path"
        )
    (parts,) = models.values()
    parts = sorted(parts, key=lambda part: part.name)
    split = _PART.search(_stem(parts[0].name))
    if split is not None:
        expected = [f"-{number:05}-of-{split[2]}" for number in range(1, int(split[2]) + 1)]
        if [_stem(part.name)[-len(split[0]) :] for part in parts] != expected:
            raise CheckpointError(f"{repo_id}: {len(parts)} of {int(split[2])} parts are there")
    return parts


def _ggufs_by_tag(files: Mapping[str, RemoteFile]) -> dict[str, dict[str, list[RemoteFile]]]:
    """Tag -> model -> its files; the parts of a split model are one model."""
    tags: dict[str, dict[str, list[RemoteFile]]] = {}
    for file in files.values():
        if file.name.lower().endswith(".gguf") and not _NO_MODEL.search(file.name):
            model = _PART.sub("", _stem(file.path))
            tags.setdefault(_tag_of(model), {}).setdefault(model, []).append(file)
    return tags


def _stem(name: str) -> str:
    return name[: -len(".gguf")]


def _tag_of(model: str) -> str:
    """What stands at the end of the name: Q4_K_M of Qwen3-8B-Q4_K_M."""
    match = _TAG.search(model)
    return (match[1] if match else re.split(r"[-./]", model)[-1]).upper()


def _choices(repo_id: str, tags: Iterable[str]) -> str:
    return ", ".join(f"{repo_id}:{tag}" for tag in sorted(tags)[:40])
