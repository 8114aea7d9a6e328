"""Open a model on disk: a folder of safetensors with its config.json, or a GGUF.

Only headers and JSON are read. Pickle files are refused and Python files of a model folder are
never imported, for both can run any code.
"""

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from thinslice.checkpoint.adapters import refuse_adapters, refuse_other_gguf
from thinslice.checkpoint.files import is_there, os_errors_named, read_json_object
from thinslice.checkpoint.gguf_header import GgufHeader, GgufMetadata, model_name, read_gguf
from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.checkpoint.names import (
    ROPE_FACTORS,
    check_names,
    expected_tensors,
    from_gguf_names,
    from_trunk_names,
    left_out_note,
    trunk_name,
)
from thinslice.checkpoint.own_head import settle_head
from thinslice.checkpoint.packed_tensors import check_packed_tensors
from thinslice.checkpoint.safetensors_header import (
    SINGLE_NAME,
    check_dtypes,
    read_safetensors_folder,
    read_safetensors_header,
)
from thinslice.errors import CheckpointError
from thinslice.plan.advised_sampling import advised_sampling, gguf_sampling
from thinslice.plan.architectures import text_trunk_of
from thinslice.plan.known_keys import gguf_notes
from thinslice.plan.packing import Packing
from thinslice.plan.shape_from_config import notes_of_config, shape_from_config
from thinslice.plan.shape_from_gguf import shape_from_gguf
from thinslice.units import MIB

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_CONFIG_BYTES = MIB
_MAX_ROPE_FACTORS = 512
# What the tokenizer of a GGUF is made of.
_VOCABULARY = frozenset(
    f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder of safetensors, a GGUF (or any part of a split one), or a folder of one GGUF.

    Peak extra memory: the parsed header, see read_safetensors_header and read_gguf_header.
    Errors: CheckpointError where the model is missing, damaged, unsupported, or kept as pickle.
    """
    with os_errors_named(path):
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        suffix = path.suffix.lower()
        if suffix == ".gguf":
            return _open_gguf(path)
        if suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_refusal(path))
        if suffix == ".safetensors":
            raise CheckpointError(f"{path} is one file of a model; name its folder instead")
        raise CheckpointError(
            f"{path} is no model: name a folder with config.json and safetensors, or a .gguf file"
        )


def without_vocabulary(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, its metadata without the lists of tokens, scores and merges.

    As Python objects they take about 200 bytes a token, and nothing needs them once a tokenizer is
    made of them.
    """
    metadata = checkpoint.metadata
    if not isinstance(metadata, GgufMetadata):
        return checkpoint
    return replace(checkpoint, metadata=metadata.without(_VOCABULARY))


def with_vocabulary(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with all of its metadata; its header is read again where lists were left out.

    Peak extra memory: the header's, see ``read_gguf_header``.
    Errors: CheckpointError as ``open_checkpoint``.
    """
    metadata = checkpoint.metadata
    if not isinstance(metadata, GgufMetadata) or metadata.is_whole:
        return checkpoint
    return replace(checkpoint, metadata=open_checkpoint(checkpoint.path).metadata)


def _open_folder(folder: Path) -> Checkpoint:
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    suffixes = {file.suffix.lower() for file in files}
    has_config = is_there(folder / "config.json")
    refuse_adapters(folder, [file.name for file in files])
    if ".safetensors" in suffixes and has_config:
        return _open_safetensors(folder)
    if ".gguf" in suffixes:
        return _open_gguf(_only_gguf(folder, files))
    if ".safetensors" in suffixes:
        raise CheckpointError(f"{folder} holds safetensors but no config.json")
    for file in files:
        if file.suffix.lower() in _PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_refusal(file))
    raise CheckpointError(f"{folder} holds no model: neither safetensors nor a GGUF")


def _open_safetensors(folder: Path) -> Checkpoint:
    config = read_json_object(folder / "config.json", _MAX_CONFIG_BYTES)
    generation_path = folder / "generation_config.json"
    generation, sampling, sampling_notes = None, dict[str, float](), tuple[str, ...]()
    if is_there(generation_path):
        generation = read_json_object(generation_path, _MAX_CONFIG_BYTES)
        sampling, sampling_notes = advised_sampling(generation, generation_path.name)
    shape = shape_from_config(config, generation)
    notes = notes_of_config(config, generation) + sampling_notes
    packing = Packing.from_config(config)
    if packing is not None:
        stored = read_safetensors_header(folder / SINGLE_NAME)
        shape, tensors = check_packed_tensors(shape, packing, stored)
    else:
        held, absent = _read_weights(folder, text_trunk_of(config) is not None)
        shape, held = settle_head(shape, held)
        needed = expected_tensors(shape)
        for name in needed:
            if name not in held and name in absent:
                raise CheckpointError(absent[name])
        check_dtypes(needed, held)
        shape, tensors = check_names(shape, held)
        notes += left_out_note(shape, held)
    files = tuple(sorted({entry.path for entry in tensors.values()}))
    return Checkpoint(
        folder,
        "safetensors",
        shape,
        tensors,
        files,
        packing=packing,
        notes=notes,
        sampling=sampling,
    )


def _read_weights(
    folder: Path, is_trunk: bool
) -> tuple[Mapping[str, TensorEntry], Mapping[str, str]]:
    """The tensors, and what is wrong with those that should be there too; of a trunk, its own."""
    found = read_safetensors_folder(folder)
    if not is_trunk:
        return found.tensors, found.absent
    absent = {trunk_name(name): problem for name, problem in found.absent.items()}
    own = {name: problem for name, problem in absent.items() if name is not None}
    return from_trunk_names(found.tensors), own


def _open_gguf(path: Path) -> Checkpoint:
    header, files = read_gguf(path)
    refuse_other_gguf(path, header.metadata, header.tensors)
    tensor_shapes = {name: entry.shape for name, entry in header.tensors.items()}
    shape = shape_from_gguf(header.metadata, tensor_shapes, _rope_factors(header))
    shape, tensors = check_names(shape, from_gguf_names(header.tensors, shape))
    sampling, sampling_notes = gguf_sampling(header.metadata)
    notes = gguf_notes(header.metadata, header.metadata["general.architecture"]) + sampling_notes
    return Checkpoint(
        files[0],
        "gguf",
        shape,
        tensors,
        files,
        header.metadata,
        notes=notes,
        sampling=sampling,
    )


def _rope_factors(header: GgufHeader) -> tuple[float, ...]:
    """The divisors of the rotary frequencies that a GGUF keeps as a tensor."""
    entry = header.tensors.get(ROPE_FACTORS)
    if entry is None:
        return ()
    if entry.dtype != "F32" or len(entry.shape) != 1 or entry.shape[0] > _MAX_ROPE_FACTORS:
        raise CheckpointError(f"{entry.path}: {ROPE_FACTORS} is {entry.dtype} {entry.shape}")
    with os_errors_named(entry.path), entry.path.open("rb") as file:
        file.seek(entry.offset)
        content = file.read(entry.num_bytes)
    if len(content) != entry.num_bytes:
        raise CheckpointError(f"{entry.path} shrank while it was read")
    return struct.unpack(f"<{entry.shape[0]}f", content)


def _only_gguf(folder: Path, files: list[Path]) -> Path:
    """A GGUF of a folder that holds one model, whole or split."""
    ggufs = [file for file in files if file.suffix.lower() == ".gguf"]
    models = {model_name(file): file for file in reversed(ggufs)}
    if len(models) > 1:
        names = ", ".join(file.name for file in reversed(models.values()))
        raise CheckpointError(
            f"{folder} holds {len(models)} GGUF models; name one of {names:.1000}"
        )
    return ggufs[0]


def _pickle_refusal(path: Path) -> str:
    return (
        f"{path} is a pickle file, which can run any code when it is loaded; "
        "take the model as safetensors or GGUF"
    )
