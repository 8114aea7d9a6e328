"""/tokenize, /detokenize and /tokenizer_info."""

import threading
from typing import Any

import httpx2
import pytest

from tests.asking import post, server_fixture
from tests.servers import NAME, Running
from thinslice.engine.results import ResultsRoom
from thinslice.serve import tokenize
from thinslice.text.messages import Conversation
from thinslice.text.tokenizer import Tokenizer

MESSAGES: Any = [{"role": "user", "content": "the moon"}]


server = server_fixture()


def told(server: Running, path: str, **body: Any) -> httpx2.Response:
    return post(server, path, body)


def test_a_text_and_back(server: Running) -> None:
    llm = server.served.engine.llm
    for text in ("the moon", "äöü 中文 <|im_start|>", "a " * 1000):
        ids = llm.tokenizer.encode(text, add_special_tokens=True)
        expected = {"count": len(ids), "max_model_len": 512, "tokens": ids}
        assert told(server, "/tokenize", model=NAME, prompt=text).json() == expected
        assert told(server, "/detokenize", tokens=ids).json() == {"prompt": text}
    assert told(server, "/tokenize", prompt="").json()["tokens"] == []
    assert told(server, "/detokenize", tokens=[]).json() == {"prompt": ""}


def test_a_conversation(server: Running) -> None:
    llm = server.served.engine.llm
    found = told(server, "/tokenize", messages=MESSAGES).json()
    assert found["tokens"] == llm.prepare(MESSAGES).token_ids
    less = told(server, "/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    text = llm.rendered(Conversation(MESSAGES), add_generation_prompt=False)
    assert told(server, "/detokenize", tokens=less["tokens"]).json() == {"prompt": text}
    assert less["count"] < found["count"]


def test_special_tokens_are_added_where_they_are_asked_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    encode = Tokenizer.encode

    def seen(self: Tokenizer, text: str, *, add_special_tokens: bool, limit: Any = None) -> Any:
        asked.append(add_special_tokens)
        return encode(self, text, add_special_tokens=add_special_tokens, limit=limit)

    monkeypatch.setattr(Tokenizer, "encode", seen)
    for body in ({"prompt": "a"}, {"messages": MESSAGES}):
        for added in (None, True, False):
            told(server, "/tokenize", **body, add_special_tokens=added)
    assert asked == [True, True, False, False, True, False]


def test_strings_of_tokens(server: Running) -> None:
    found = told(server, "/tokenize", prompt="thä", return_token_strs=True).json()
    assert found["token_strs"] == ["th", "\ufffd", "\ufffd"]


def test_what_a_harness_asks_of_a_tokenizer(server: Running) -> None:
    found = httpx2.get(f"{server.url}/tokenizer_info").json()
    assert found["eos_token"] == "<|im_end|>"
    assert found["model_max_length"] == 512


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, None),
        ("/tokenize", {"messages": [{"role": "x"}]}, None),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [99999]}, None),
        ("/detokenize", {"tokens": [1 << 80]}, None),
        ("/detokenize", {"tokens": [1] * 65_537}, "tokens"),
        ("/tokenize", {"prompt": "ab " * 40_000}, "prompt"),
    ],
)
def test_what_has_no_tokens_is_refused(
    server: Running, path: str, body: dict[str, Any], param: str | None
) -> None:
    found = told(server, path, **body)
    assert found.status_code == 400, found.text
    assert param is None or found.json()["error"]["param"] == param


def test_another_model_is_not_found(server: Running) -> None:
    assert told(server, "/tokenize", model="x", prompt="a").status_code == 404
    assert told(server, "/detokenize", model="x", tokens=[1]).status_code == 404


def test_tokens_that_the_plan_has_no_room_for_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = server.served.engine.llm.engine.results
    left = room.left_bytes
    told(server, "/tokenize", prompt="a")
    assert room.left_bytes == left
    monkeypatch.setattr(ResultsRoom, "take", lambda *_: False)
    assert told(server, "/tokenize", prompt="a").status_code == 429


def test_the_event_loop_does_not_wait_for_a_text(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is being tokenized, the server answers others."""
    begun, may_end = threading.Event(), threading.Event()
    encoded = tokenize._encoded

    def slow(*asked: Any) -> Any:
        begun.set()
        assert may_end.wait(30)
        return encoded(*asked)

    monkeypatch.setattr(tokenize, "_encoded", slow)
    asking = threading.Thread(target=told, args=(server, "/tokenize"), kwargs={"prompt": "a"})
    asking.start()
    assert begun.wait(30)
    assert httpx2.get(f"{server.url}/health", timeout=10).status_code == 200
    may_end.set()
    asking.join()
