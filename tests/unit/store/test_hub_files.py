from types import SimpleNamespace
from typing import Any

import pytest

from thinslice.errors import CheckpointError, ConfigError, StoreError
from thinslice.store.hub_files import (
    RemoteFile,
    check_is_safetensors,
    gguf_files,
    remote_files,
    safetensors_files,
    small_files,
)
from thinslice.store.names import HubModel, parse_model_name


def files_of(*paths: str) -> dict[str, RemoteFile]:
    return {path: RemoteFile(path, path.rpartition("/")[2], 1, "0" * 40) for path in paths}


def sibling(path: str, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"rfilename": path, "size": 1, "blob_id": "0" * 40, "lfs": None} | changes
    )


@pytest.mark.parametrize(
    ("path", "tag"),
    [
        ("Qwen3-8B-Q4_K_M.gguf", "Q4_K_M"),
        ("tinyllama-1.1b-chat-v1.0.Q5_0.gguf", "Q5_0"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("ggml-model-q4_k_s.gguf", "Q4_K_S"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("model-IQ4_XS.gguf", "IQ4_XS"),
        ("model_bf16.gguf", "BF16"),
        ("BF16/model-BF16-00001-of-00001.gguf", "BF16"),
        ("Q4_K_M.gguf", "Q4_K_M"),
        ("my-model.gguf", "MODEL"),
        ("m-F16.gguf", "F16"),
    ],
)
def test_a_gguf_is_found_by_the_tag_its_name_ends_in(path: str, tag: str) -> None:
    files = files_of(path, "mmproj-F16.gguf", "other-Q2_K.gguf", "imatrix.gguf", "README.md")
    assert [file.path for file in gguf_files("org/name", files, tag)] == [path]


def test_a_tag_is_not_taken_for_the_beginning_of_another() -> None:
    files = files_of("m-Q4_K_M.gguf", "m-UD-Q4_K.gguf", "m-Q4_K.gguf")
    assert [file.path for file in gguf_files("org/name", files, "Q4_K")] == ["m-Q4_K.gguf"]


def test_all_parts_of_a_split_gguf_are_taken_in_order() -> None:
    parts = [f"Q8/m-Q8_0-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    files = files_of(*reversed(parts), "m-Q4_0.gguf")
    assert [file.path for file in gguf_files("org/name", files, "Q8_0")] == parts
    with pytest.raises(CheckpointError, match="2 of 3 parts are there"):
        gguf_files("org/name", files_of(parts[0], parts[2]), "Q8_0")


def test_a_wrong_tag_is_answered_with_names_that_can_be_used() -> None:
    files = files_of("m-Q4_K_M.gguf", "m-UD-Q2_K_XL.gguf", "m-F16.gguf")
    with pytest.raises(ConfigError) as error:
        gguf_files("org/name", files, "Q9")
    choices = str(error.value).partition("; there is ")[2].split(", ")
    names = [parse_model_name(choice) for choice in choices]
    assert names == [HubModel("org/name", None, tag) for tag in ("F16", "Q4_K_M", "UD-Q2_K_XL")]
    for name in names:
        assert len(gguf_files(name.repo_id, files, name.quant)) == 1


def test_two_models_with_one_tag_are_named() -> None:
    with pytest.raises(ConfigError, match=r"2 GGUF models Q8_0 \(a/m-Q8_0, b/m-Q8_0\)"):
        gguf_files("org/name", files_of("a/m-Q8_0.gguf", "b/m-Q8_0.gguf"), "Q8_0")


def test_a_repository_without_gguf_is_told_so() -> None:
    with pytest.raises(ConfigError, match="holds no GGUF"):
        gguf_files("org/name", files_of("model.safetensors"), "Q8_0")


def test_a_repository_of_gguf_alone_is_answered_with_its_tags() -> None:
    with pytest.raises(ConfigError, match="name one as org/name:Q4_0, org/name:Q8_0"):
        check_is_safetensors("org/name", files_of("m-Q8_0.gguf", "m-Q4_0.gguf", "config.json"))


def test_pickle_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="only pickle, which can run any code"):
        check_is_safetensors("org/name", files_of("pytorch_model.bin", "config.json"))
    with pytest.raises(CheckpointError, match=r"neither safetensors nor a GGUF$"):
        check_is_safetensors("org/name", files_of("README.md"))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_what_a_model_needs_is_asked_for(missing: str) -> None:
    files = files_of("model.safetensors", "config.json", "tokenizer.json")
    check_is_safetensors("org/name", files)
    del files[missing]
    with pytest.raises(CheckpointError, match=f"has no {missing}"):
        check_is_safetensors("org/name", files)


def test_an_adapter_is_told_from_a_model() -> None:
    settings = ("config.json", "tokenizer.json", "adapter_config.json")
    for weights in (
        ("adapter_model.safetensors",),
        ("adapter_model.safetensors", "model.safetensors"),
        ("adapters.safetensors", "m-1.safetensors", "model.safetensors.index.json"),
    ):
        with pytest.raises(CheckpointError, match="org/name holds an adapter"):
            check_is_safetensors("org/name", files_of(*weights, *settings))
    model = ("model.safetensors", "config.json", "tokenizer.json")
    check_is_safetensors("org/name", files_of("adapter_model.safetensors", *model))
    check_is_safetensors("org/name", files_of("adapter_config.json", *model))


def test_shards_in_a_folder_of_their_own_are_fetched_by_their_names() -> None:
    index = {"weight_map": {"a": "parts/m-1.safetensors", "b": "parts/m-2.safetensors"}}
    files = files_of("parts/m-1.safetensors", "parts/m-2.safetensors", "config.json")
    files |= files_of("tokenizer.json", "model.safetensors.index.json")
    check_is_safetensors("org/name", files)
    found = safetensors_files("org/name", files, index)
    assert [file.name for file in found] == ["m-1.safetensors", "m-2.safetensors"]
    files |= files_of("other/m-1.safetensors")
    index["weight_map"]["c"] = "other/m-1.safetensors"
    with pytest.raises(CheckpointError, match="names two files of the same name"):
        safetensors_files("org/name", files, index)


def test_only_data_files_are_small_files() -> None:
    wanted = ["config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json"]
    wanted += ["tokenizer_config.json", "chat_template.jinja", "LICENSE.md", "README.md"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    others = [
        "additional_chat_templates/rag.jinja",
        "modeling.py",
        "setup.cfg",
        "tokenizer.model",
        "sub/config.json",
        "LICENSE.py",
    ]
    assert [file.path for file in small_files(files_of(*wanted, *others))] == wanted


def test_the_weights_are_those_the_reader_will_read() -> None:
    index = {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}
    shards = ("m-1.safetensors", "m-2.safetensors")

    def paths(files: dict[str, RemoteFile], index: dict[str, Any] | None) -> list[str]:
        return [file.path for file in safetensors_files("org/name", files, index)]

    assert paths(files_of("model.safetensors", *shards), index) == ["model.safetensors"]
    assert paths(files_of(*shards, "consolidated.safetensors"), index) == list(shards)
    assert paths(files_of("only.safetensors", "sub/x.safetensors"), None) == ["only.safetensors"]
    for files, wrong in (
        (files_of(*shards), None),
        (files_of(*shards), {}),
        (files_of("m-1.safetensors"), index),
        (files_of(*shards, "setup.py"), {"weight_map": {"a": "setup.py"}}),
        (files_of(*shards), {"weight_map": {"a": ["m-1.safetensors"]}}),
    ):
        with pytest.raises(CheckpointError):
            paths(files, wrong)


def test_every_file_gets_a_plain_name_or_is_left_out() -> None:
    hostile = ["a/..", "b\\c.gguf", ".hidden", "c/.git", "d\n.gguf", "e/", "x" * 300, "nul\0.gguf"]
    files = remote_files([sibling(path) for path in [*hostile, "../../up.gguf", "/etc/passwd"]])
    assert {file.name for file in files.values()} == {"up.gguf", "passwd"}


@pytest.mark.parametrize(
    "changes", [{"size": None}, {"size": -1}, {"blob_id": None}, {"blob_id": "../x"}]
)
def test_a_file_without_size_or_checksum_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="no size and checksum"):
        remote_files([sibling("config.json", **changes)])
