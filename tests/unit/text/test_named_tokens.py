"""Tokens named beside tokenizer.json, held against what transformers makes of the same folder."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.unit.text.test_tokenizer import BYTE_LEVEL, IM_END, IM_START, SHAPE
from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import CheckpointError
from thinslice.text.gguf_tokenizer import build_gguf_tokenizer
from thinslice.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

THINK = BYTE_LEVEL["tokenizer.ggml.tokens"].index("<think>")
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
FLAGS = ("content", "special", "single_word", "lstrip", "rstrip", "normalized")


def token(text: str = "<|im_end|>", **flags: Any) -> dict[str, Any]:
    return {"content": text, **PLAIN, **flags}


def typed(text: str = "<|im_end|>", **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(text, **flags)}


def decoder(token_id: int = IM_END, **flags: Any) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(token_id): token(special=False) | flags}}


# What each file says; one that is not there is not written.
FOLDERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no special tokens": {CONFIG: {}},
    "eos as text": {CONFIG: {"eos_token": "<|im_end|>"}},
    "eos with flags": {CONFIG: {"eos_token": typed(lstrip=True, normalized=True)}},
    "eos of one word": {CONFIG: {"eos_token": typed(single_word=True, rstrip=True)}},
    "extra list": {CONFIG: {"extra_special_tokens": ["<|im_end|>", "<|im_start|>"]}},
    "extra with flags": {CONFIG: {"extra_special_tokens": [typed(rstrip=True, special=True)]}},
    "extra names": {CONFIG: {"extra_special_tokens": {"image_token": "<|im_end|>"}}},
    "additional list": {CONFIG: {"additional_special_tokens": ["<|im_end|>"]}},
    "a name of its own": {CONFIG: {"image_token": "<|im_end|>"}},
    "a name with flags": {CONFIG: {"image_token": typed(lstrip=True)}},
    "decoder": {CONFIG: decoder(lstrip=True, normalized=True)},
    "decoder, special": {CONFIG: decoder(special=True)},
    "decoder, normalized": {CONFIG: decoder(special=True, normalized=True)},
    "map": {CONFIG: {}, MAP: {"eos_token": "<|im_end|>"}},
    "map with flags": {CONFIG: {}, MAP: {"pad_token": token(rstrip=True, normalized=True)}},
    "map, additional": {CONFIG: {}, MAP: {"additional_special_tokens": ["<|im_end|>"]}},
    "map, extra": {CONFIG: {}, MAP: {"extra_special_tokens": ["<|im_end|>"]}},
    "map, extra names": {CONFIG: {}, MAP: {"extra_special_tokens": {"a_token": "<|im_end|>"}}},
    "map, a name of its own": {CONFIG: {}, MAP: {"image_token": "<|im_end|>"}},
    "map alone": {MAP: {"eos_token": "<|im_end|>"}},
    "added tokens": {CONFIG: {}, ADDED: {"<|im_end|>": IM_END, "<think>": THINK}},
    "added tokens alone": {ADDED: {"<|im_end|>": IM_END}},
    # Several that agree.
    "config and map": {CONFIG: {"eos_token": "<|im_end|>"}, MAP: {"eos_token": "<|im_end|>"}},
    "config and added": {CONFIG: {"eos_token": "<|im_end|>"}, ADDED: {"<|im_end|>": IM_END}},
    "extra and added": {
        CONFIG: {"extra_special_tokens": ["<|im_end|>"]},
        ADDED: {"<|im_end|>": IM_END},
    },
    "name and added": {CONFIG: {"image_token": "<|im_end|>"}, ADDED: {"<|im_end|>": IM_END}},
    "map and added": {CONFIG: {}, MAP: {"eos_token": "<|im_end|>"}, ADDED: {"<|im_end|>": IM_END}},
    "all": {
        CONFIG: decoder(special=True) | {"eos_token": "<|im_end|>"},
        MAP: {"eos_token": "<|im_end|>"},
        ADDED: {"<|im_end|>": IM_END},
    },
    # Several that contradict each other.
    "config, not map": {CONFIG: {"eos_token": "<|im_end|>"}, MAP: {"eos_token": "<|im_start|>"}},
    "flags of config, of map": {
        CONFIG: {"eos_token": typed(lstrip=True)},
        MAP: {"eos_token": token(rstrip=True)},
    },
    "config, null in map": {CONFIG: {"eos_token": "<|im_end|>"}, MAP: {"eos_token": None}},
    "extra of both": {
        CONFIG: {"extra_special_tokens": ["<|im_end|>"]},
        MAP: {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    },
    "additional of both": {
        CONFIG: {"additional_special_tokens": ["<|im_end|>"]},
        MAP: {"additional_special_tokens": ["<|im_start|>"]},
    },
    "extra and additional": {
        CONFIG: {
            "extra_special_tokens": ["<|im_end|>"],
            "additional_special_tokens": ["<|im_start|>"],
        }
    },
    "a name of both": {CONFIG: {"image_token": "<|im_end|>"}, MAP: {"image_token": "<|im_start|>"}},
    # In no vocabulary: the next ids, of which the embeddings have some left.
    "new names": {CONFIG: {"pad_token": "<new>", "unk_token": "<unk>", "bos_token": "<s>"}},
    "new extra": {CONFIG: {"additional_special_tokens": ["<new>", "<|im_end|>", "<also new>"]}},
    "new of all kinds": {
        CONFIG: {
            "extra_special_tokens": ["<extra>", "<image>"],
            "image_token": "<image>",
            "pad_token": "<pad>",
        }
    },
    "new beside a decoder": {
        CONFIG: decoder() | {"pad_token": "<pad>", "extra_special_tokens": ["<new>"]}
    },
    "decoder before map": {
        CONFIG: decoder(special=True) | {"eos_token": "<|im_end|>"},
        MAP: {"eos_token": "<|im_start|>"},
    },
    "decoder before added": {CONFIG: decoder(), ADDED: {"<|im_start|>": IM_START}},
    "decoder against eos": {
        CONFIG: decoder(lstrip=True, normalized=True) | {"eos_token": typed(rstrip=True)}
    },
    "decoder against extra": {CONFIG: decoder() | {"extra_special_tokens": ["<|im_end|>"]}},
    "decoder against name": {CONFIG: decoder() | {"image_token": "<|im_end|>"}},
    "empty decoder": {
        CONFIG: {"added_tokens_decoder": {}, "eos_token": "<|im_end|>"},
        MAP: {"eos_token": "<|im_start|>"},
        ADDED: {"<think>": THINK},
    },
}
# What tokenizer.json itself says of <|im_end|>.
IN_TOKENIZER_JSON: dict[str, list[dict[str, Any]]] = {
    "absent": [],
    "special": [{"id": IM_END, **token(special=True)}],
    "plain": [{"id": IM_END, **token(special=False, rstrip=True, normalized=True)}],
}


def write(folder: Path, files: dict[str, Any], added: list[dict[str, Any]]) -> None:
    """A tokenizer whose vocabulary has all tokens, and what the files say of them."""
    state = json.loads(build_gguf_tokenizer(BYTE_LEVEL).to_str())
    state["model"]["vocab"] |= {one["content"]: one["id"] for one in state["added_tokens"]}
    state["added_tokens"] = added
    (folder / "tokenizer.json").write_text(json.dumps(state))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def read(folder: Path) -> TokenizerFiles:
    return read_tokenizer_files(Checkpoint(folder, "safetensors", SHAPE, {}, ()))


def table(backend: Backend) -> dict[int, tuple[Any, ...]]:
    """The flags of each added token by its id."""
    added = backend.get_added_tokens_decoder().items()
    return {token_id: tuple(getattr(one, name) for name in FLAGS) for token_id, one in added}


@pytest.mark.parametrize("added", IN_TOKENIZER_JSON.values(), ids=IN_TOKENIZER_JSON.keys())
@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS.keys())
def test_ids_and_flags_are_those_of_transformers(
    tmp_path: Path, files: dict[str, Any], added: list[dict[str, Any]]
) -> None:
    write(tmp_path, files, added)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = read(tmp_path)
    assert table(ours.backend) == table(theirs.backend_tokenizer)
    if CONFIG in files:
        assert (ours.special.bos_token, ours.special.eos_token) == (
            theirs.bos_token,
            theirs.eos_token,
        )
        assert ours.special.named == theirs.special_tokens_map


def test_the_table_tells_every_flag_apart(tmp_path: Path) -> None:
    """Each flag is true in one outcome and false in another."""
    seen = set()
    for number, files in enumerate(FOLDERS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, files, [])
        seen |= {
            (i, one) for row in table(read(folder).backend).values() for i, one in enumerate(row)
        }
    assert {(i, value) for i in range(1, 6) for value in (False, True)} <= seen


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Transformers 5 fails on these, and 4 takes them as they are meant.
        ({CONFIG: {"eos_token": token(lstrip=True)}}, {"lstrip": True}),
        ({CONFIG: {}, MAP: {"additional_special_tokens": [token(rstrip=True)]}}, {"rstrip": True}),
        # Transformers 5 makes this one no special token.
        ({CONFIG: {"extra_special_tokens": [typed(lstrip=True)]}}, {"lstrip": True}),
    ],
)
def test_what_transformers_5_does_not_take_is_special_as_it_is_named(
    tmp_path: Path, files: dict[str, Any], expected: dict[str, bool]
) -> None:
    write(tmp_path, files, [])
    wanted = token(special=True) | expected
    assert table(read(tmp_path).backend) == {IM_END: tuple(wanted[name] for name in FLAGS)}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        # Transformers passes over the ids.
        ({ADDED: {"<|im_end|>": 5}}, "is given the id 5, and the tokenizer has it as"),
        ({CONFIG: decoder(5)}, "is given the id 5, and the tokenizer has it as"),
        ({ADDED: {"<new>": "5"}}, "'<new>' has the id '5'"),
        ({CONFIG: {"eos_token": {"content": "a", "novel": True}}}, "a special token is .*novel"),
        ({CONFIG: {"eos_token": {"content": "a", "lstrip": 1}}}, "a special token is .*lstrip"),
        ({CONFIG: {"extra_special_tokens": "<|im_end|>"}}, "extra_special_tokens is '<|im_end|>'"),
        ({CONFIG: {"extra_special_tokens": [1]}}, "a special token is 1"),
        (
            {CONFIG: {"extra_special_tokens": 5}, MAP: {"extra_special_tokens": ["<|im_end|>"]}},
            "tokenizer_config.json: extra_special_tokens is 5; expected a list or an object",
        ),
        (
            {
                CONFIG: {},
                MAP: {"additional_special_tokens": 5, "extra_special_tokens": ["<|im_end|>"]},
            },
            "special_tokens_map.json: additional_special_tokens is 5; expected a list or an",
        ),
    ],
)
def test_contradictions_and_damage_are_refused(
    tmp_path: Path, files: dict[str, Any], reason: str
) -> None:
    write(tmp_path, files, [])
    with pytest.raises(CheckpointError, match=reason.replace("|", r"\|")):
        read(tmp_path)


HALF = "a\ud800"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        *[({CONFIG: {name: HALF}}, f"{CONFIG}: '{name}'") for name in ("eos_token", "image_token")],
        ({CONFIG: {"pad_token": token(HALF)}}, f"{CONFIG}: 'pad_token'"),
        ({CONFIG: {"extra_special_tokens": [HALF]}}, f"{CONFIG}: 'extra_special_tokens'"),
        ({CONFIG: {"extra_special_tokens": {"a": HALF}}}, f"{CONFIG}: 'extra_special_tokens'"),
        ({CONFIG: decoder(content=HALF)}, f"{CONFIG}: 'added_tokens_decoder'"),
        ({CONFIG: {}, MAP: {"bos_token": HALF}}, f"{MAP}: 'bos_token'"),
        ({CONFIG: {}, ADDED: {HALF: IM_END}}, f"{ADDED}: 'a.ud800'"),
    ],
)
def test_half_of_a_surrogate_pair_is_no_token(
    tmp_path: Path, files: dict[str, Any], reason: str
) -> None:
    write(tmp_path, files, [])
    with pytest.raises(CheckpointError, match=f"{reason} holds half of a surrogate pair"):
        read(tmp_path)


NEXT_ID = THINK + 1


def read_without_room(folder: Path, room: int = 0) -> TokenizerFiles:
    """Read a folder whose model has embeddings for so many tokens more than there are."""
    shape = replace(SHAPE, vocab_size=NEXT_ID + room)
    return read_tokenizer_files(Checkpoint(folder, "safetensors", shape, {}, ()))


@pytest.mark.parametrize("key", ["pad_token", "extra_special_tokens"])
def test_a_token_that_would_get_an_id_without_an_embedding_is_refused(
    tmp_path: Path, key: str
) -> None:
    write(tmp_path, {CONFIG: {key: ["<new>"] if key.endswith("s") else "<new>"}}, [])
    with pytest.raises(CheckpointError, match=f"'<new>' is in no vocabulary.* {NEXT_ID}"):
        read_without_room(tmp_path)
    assert table(read_without_room(tmp_path, 1).backend)[NEXT_ID][0] == "<new>"


def test_a_token_of_pictures_without_an_embedding_is_left_out(tmp_path: Path) -> None:
    names = {f"{name}_token": f"<{name}>" for name in ("image", "sound", "film")}
    write(tmp_path, {CONFIG: {**names, "text_token": "<|im_end|>", "again_token": "<image>"}}, [])
    assert set(table(read_without_room(tmp_path).backend)) == {IM_END}
    found = table(read_without_room(tmp_path, 2).backend)
    assert {i: row[0] for i, row in found.items()} == {
        IM_END: "<|im_end|>",
        NEXT_ID: "<image>",
        NEXT_ID + 1: "<sound>",
    }


def many(count: int) -> dict[str, dict[str, Any]]:
    """Folders that name so many tokens, each in another way."""
    names = [f"t{number}" for number in range(count)]
    held = {str(400 + i): token(name, special=bool(i % 2)) for i, name in enumerate(names)}
    return {
        "decoder": {CONFIG: {"added_tokens_decoder": held}},
        "added tokens": {ADDED: {name: 400 + i for i, name in enumerate(names)}},
        "extra": {CONFIG: {"extra_special_tokens": names}, MAP: {"extra_special_tokens": names}},
        "extra of both": {
            CONFIG: {"extra_special_tokens": names[::2]},
            MAP: {"extra_special_tokens": names},
        },
        "of the model": {CONFIG: {"model_specific_special_tokens": {one: one for one in names}}},
        "own names": {CONFIG: {f"{one}_token": one for one in names}},
    }


def read_many(folder: Path, kind: str, count: int) -> tuple[TokenizerFiles, float]:
    """A folder of that kind, and the seconds that reading it took."""
    write(folder, many(count)[kind], [])
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"] |= {f"t{number}": 400 + number for number in range(count)}
    path.write_text(json.dumps(state))
    shape = replace(SHAPE, vocab_size=400 + count)
    started = time.process_time()
    files = read_tokenizer_files(Checkpoint(folder, "safetensors", shape, {}, ()))
    return files, time.process_time() - started


@pytest.mark.parametrize("kind", many(0))
def test_thousands_of_named_tokens_are_added_at_once(tmp_path: Path, kind: str) -> None:
    files, seconds = read_many(tmp_path, kind, 16_384)
    added = table(files.backend)
    assert [added[400 + i][0] for i in range(16_384)] == [f"t{i}" for i in range(16_384)]
    special = {i for i in range(16_384) if added[400 + i][1]}
    expected = {
        "decoder": set(range(1, 16_384, 2)),
        "added tokens": set(),
    }
    assert special == expected.get(kind, set(range(16_384)))
    assert seconds < 5


@pytest.mark.parametrize("kind", many(0))
def test_more_named_tokens_than_any_model_has_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match="more than 16384 added tokens are named"):
        read_many(tmp_path, kind, 16_385)
