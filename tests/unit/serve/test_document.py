"""The document of the interface says what the server does, and its page what the document says."""

import hashlib
import json
import re
from base64 import b64encode
from html.parser import HTMLParser
from typing import Any

import httpx2
import pytest

from tests.asking import server_fixture
from tests.servers import NAME, Running
from thinslice.serve.document import ANSWERS, document, error_form
from thinslice.serve.guard import PUBLIC

MESSAGES: Any = [{"role": "user", "content": "the moon"}]
SHORT: Any = {"temperature": 0, "max_tokens": 3}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {**SHORT, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {**SHORT, "prompt": ["a b", "c"], "logprobs": 2, "echo": True},
    "/v1/responses": {"temperature": 0, "max_output_tokens": 3, "input": "the moon"},
    "/v1/messages": {**SHORT, "messages": MESSAGES},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "options": {"num_predict": 8, "temperature": 0}},
    "/api/generate": {"prompt": "a", "options": {"num_predict": 8, "temperature": 0}},
    "/api/show": {},
    "/tokenize": {"prompt": "abc", "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2]},
}
STREAMED = [path for path, answer in ANSWERS.items() if answer.stream is not None]


server = server_fixture()


@pytest.fixture(scope="module")
def told(server: Running) -> Any:
    return httpx2.get(f"{server.url}/openapi.json").json()


def ask(server: Running, path: str, **more: Any) -> httpx2.Response:
    url = server.url + path.replace("{name}", NAME)
    if path not in BODIES:
        return httpx2.get(url)
    return httpx2.post(url, json={"model": NAME, "stream": False, **BODIES[path], **more})


def fits(form: Any, found: Any) -> None:
    """It has all fields of its form and no other."""
    assert form.model_validate(found).model_dump(exclude_unset=True) == found


def test_every_route_says_what_it_takes_and_gives(told: Any) -> None:
    assert told["paths"].keys() == ANSWERS.keys()
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], path
            assert ("requestBody" in operation) == (method == "post") == (path in BODIES)
            assert operation["responses"].keys() >= {"200", "403", "500", "503"}
            assert "422" not in operation["responses"]
            for answer in operation["responses"].values():
                assert answer["description"]
                assert answer["content"]


def test_what_it_refers_to_is_there_and_nothing_else(told: Any) -> None:
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)))
    assert named <= told["components"]["schemas"].keys()
    assert not {"HTTPValidationError", "ValidationError"} & told["components"]["schemas"].keys()


@pytest.mark.parametrize("path", ANSWERS)
def test_answers_have_their_form(server: Running, path: str) -> None:
    answer = ask(server, path)
    assert answer.status_code == 200, answer.text
    form = ANSWERS[path].form
    if form is None:
        assert answer.headers["content-type"].startswith("text/plain")
    else:
        fits(form, answer.json())


@pytest.mark.parametrize("path", STREAMED)
def test_events_have_their_form(server: Running, path: str) -> None:
    stream = ANSWERS[path].stream
    assert stream is not None
    answer = ask(server, path, stream=True)
    assert answer.headers["content-type"].startswith(stream[0])
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(events) >= 2
    for event in events:
        if path == "/v1/messages":
            assert stream[1].model_validate(event)
        else:
            fits(stream[1], event)


@pytest.mark.parametrize("path", ANSWERS)
@pytest.mark.parametrize(
    "more", [{"model": "other"}, {"model": 1}, {"messages": 1, "prompt": 1, "tokens": "a"}]
)
def test_errors_have_their_form_and_are_told(
    server: Running, told: Any, path: str, more: Any
) -> None:
    if path not in BODIES:
        answer = httpx2.get(
            server.url + path.replace("{name}", "other"), headers={"host": "evil.com"}
        )
    else:
        answer = ask(server, path, **more)
    if answer.status_code == 200:
        assert "model" not in more or path in ("/api/show",)
        return
    (operation,) = told["paths"][path].values()
    assert str(answer.status_code) in operation["responses"]
    fits(error_form(path), answer.json())


def test_examples_are_answered(server: Running, told: Any) -> None:
    num_asked = 0
    for path, methods in told["paths"].items():
        for operation in methods.values():
            if "requestBody" not in operation:
                continue
            for one in operation["requestBody"]["content"]["application/json"]["examples"].values():
                answer = httpx2.post(server.url + path, json=one["value"], timeout=60)
                assert answer.status_code == 200, answer.text
                num_asked += 1
    assert num_asked == len(BODIES)


def test_a_model_of_another_name(server: Running, told: Any) -> None:
    assert "404" in told["paths"]["/v1/models/{name}"]["get"]["responses"]
    assert httpx2.get(f"{server.url}/v1/models/other").status_code == 404


def test_keys_are_told_where_there_are_any(server: Running, told: Any) -> None:
    assert "securitySchemes" not in told["components"]
    with_keys = document(server.app, NAME, has_keys=True)
    for path, methods in with_keys["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == (path not in PUBLIC)
            assert ("401" in operation["responses"]) == (path not in PUBLIC)


class _Page(HTMLParser):
    """Tags, identifiers and links of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.marks: list[str] = []
        self.links: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        assert given.keys() <= {"id", "href", "lang", "charset", "name", "content"}
        self.marks += [one for one in (given.get("id"),) if one]
        self.links |= {one for one in (given.get("href"),) if one}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_tells_all_and_needs_nothing_else(server: Running, told: Any) -> None:
    answer = httpx2.get(f"{server.url}/docs")
    page = _Page(answer.text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form"}
    assert {one for one in page.links if not one.startswith("#")} == {"openapi.json"}
    assert {one[1:] for one in page.links if one.startswith("#")} <= set(page.marks)
    assert len(page.marks) == len(set(page.marks))
    text = "".join(page.texts)
    for path, methods in told["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}" in text
    for schema in told["components"]["schemas"].values():
        for field in schema.get("properties", {}):
            assert field in text
    policy = answer.headers["content-security-policy"]
    style = answer.text.partition("<style>")[2].partition("</style>")[0]
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "unsafe" not in policy
