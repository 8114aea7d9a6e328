"""Who gets through: hosts, origins and keys."""

import hashlib
from pathlib import Path

import httpx2
import pytest

from tests.asking import server_fixture, slow_steps
from tests.servers import NAME, Running, running
from thinslice.errors import ConfigError
from thinslice.serve.guard import PUBLIC
from thinslice.serve.keys import VARIABLE, Key, Keys, read_keys
from thinslice.serve.settings import ServerSettings
from thinslice.serve.static_files import STATIC_FILES

SECRET = "sk-a-secret-of-the-tests"
KEYS = Keys((Key("alice", hashlib.sha256(SECRET.encode()).digest()),))
PAGE = "https://chat.example.com"


server = server_fixture(
    ServerSettings(
        drain_s=0.0, max_waiting=256, allow_host=("model.example.com",), allow_origin=(PAGE,)
    ),
    KEYS,
)


def status(server: Running, path: str = "/v1/models", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.get(f"{server.url}{path}", headers=named).status_code


def paths(server: Running) -> list[tuple[str, str]]:
    """Every route of the application with each of its methods, and what is none."""
    document = httpx2.get(f"{server.url}/openapi.json", headers={"x-api-key": SECRET}).json()
    found = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert {path for _, path in found} > {"/v1/models", "/v1/chat/completions", "/plan"}
    others = ("/openapi.json", "/docs", "/nothing", "/page/nothing", *STATIC_FILES)
    of_page = [("head", "/"), ("post", "/page/render"), ("get", "/page/{name}")]
    return [*found, *of_page, *(("get", path) for path in others)]


def test_no_route_is_left_out_of_the_document(server: Running) -> None:
    every = {getattr(route, "path", None) for route in server.app.routes}
    assert every - {path for _, path in paths(server)} <= {None}


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer sk-wrong", f"Basic {SECRET}", SECRET])
def test_every_route_needs_the_key(server: Running, given: str) -> None:
    for method, path in paths(server):
        answer = httpx2.request(
            method, f"{server.url}{path}", headers={"authorization": given} if given else {}
        )
        expected = path not in PUBLIC
        assert (answer.status_code == 401) == expected, (method, path, answer.status_code)


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {SECRET}"}, {"x_api_key": SECRET}])
def test_the_key_opens(server: Running, headers: dict[str, str]) -> None:
    assert status(server, **headers) == 200


@pytest.mark.parametrize(
    ("host", "is_let_in"),
    [
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("app.localhost:1", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),
        ("model.example.com", True),
        ("MODEL.example.com:443", True),
        ("evil.example.com", False),
        ("localhost.evil.com", False),
        ("127.0.0.1.evil.com", False),
        ("evil.com/health?", False),
        ("a/?", False),
        ("user@localhost", False),
        ("", False),
    ],
)
def test_hosts(server: Running, host: str, is_let_in: bool) -> None:
    found = status(server, host=host, x_api_key=SECRET)
    assert (found == 200) == is_let_in, found
    assert found in (200, 400, 403)


def test_a_host_never_stands_for_the_key(server: Running) -> None:
    for host in ("a/health?", "localhost/health?", "localhost:80/health#"):
        assert status(server, host=host) in (400, 401, 403)


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [(PAGE, True), ("https://evil.example.com", False), ("null", False), ("http://[", False)],
)
def test_origins(server: Running, origin: str, is_let_in: bool) -> None:
    answer = httpx2.get(f"{server.url}/v1/models", headers={"origin": origin, "x-api-key": SECRET})
    assert (answer.status_code == 200) == is_let_in
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (PAGE if is_let_in else None)
    assert "access-control-allow-credentials" not in answer.headers


def test_its_own_origin_is_let_in(server: Running) -> None:
    assert status(server, origin=server.url, x_api_key=SECRET) == 200


def test_a_browser_may_ask_beforehand(server: Running) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    answer = httpx2.options(f"{server.url}/v1/chat/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == PAGE


def test_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    path.write_text(f'[[key]]\nname = "bob"\nsha256 = "{digest}"\n')
    keys = read_keys(path, {VARIABLE: "another secret"})
    assert keys.find(SECRET) == Key("bob", bytes.fromhex(digest))
    found = keys.find("another secret")
    assert found is not None
    assert found.name == "environment"
    assert keys.find("wrong") is None
    assert not read_keys(None, {})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "x = 1",
        "[[key]]\nname = 'a'\n",
        "[[key]]\nname = 'a'\nsha256 = 'abc'\n",
        "[[key]]\nname = ''\nsha256 = '" + "a" * 64 + "'\n",
        "[[key]]\nname = 'a'\nsha256 = '" + "a" * 64 + "'\nrole = 'x'\n",
        ("[[key]]\nname = 'a'\nsha256 = '" + "a" * 64 + "'\n") * 2,
        "[[key",
        "\xff",
    ],
)
def test_bad_files_of_keys_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError):
        read_keys(path, {})
    with pytest.raises(ConfigError):
        read_keys(tmp_path / "none.toml", {})


@pytest.mark.parametrize("origin", ["*", "https://a/b", "chat.example.com", ""])
def test_origins_are_checked(origin: str) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(allow_origin=(origin,))


def test_a_short_key_of_the_environment_is_refused() -> None:
    with pytest.raises(ConfigError):
        read_keys(None, {VARIABLE: "short"})


def test_prompts_of_two_keys_share_no_prefix(server: Running) -> None:
    body = {"model": NAME, "prompt": "a" * 64, "max_tokens": 1, "temperature": 0}
    answers = [
        httpx2.post(f"{server.url}/v1/completions", json=body, headers={"x-api-key": SECRET}).json()
        for _ in range(2)
    ]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers]
    assert cached[0] == 0 < cached[1]
    alone = server.served.engine.llm.generate("a" * 64)
    assert alone[0].num_cached == 0


def test_a_key_that_asks_much_holds_no_other_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch, 0.002)
    keys = Keys(
        tuple(
            Key(name, hashlib.sha256(name.encode()).digest()) for name in ("key-of-a", "key-of-b")
        )
    )
    settings = ServerSettings(drain_s=0.0, max_waiting=256)
    with running(tmp_path, settings, keys=keys) as server:
        scheduler = server.served.engine.llm.engine.scheduler
        url = f"{server.url}/v1/completions"
        many = {"model": NAME, "prompt": "a", "max_tokens": 50, "n": 120, "temperature": 0}
        asked = {"json": {**many, "stream": True}, "headers": {"x-api-key": "key-of-a"}}
        with httpx2.stream("POST", url, timeout=60, **asked) as answer:
            lines = answer.iter_lines()  # which end the answer with themselves
            next(lines)
            one = {**many, "n": 1, "max_tokens": 1}
            found = httpx2.post(url, json=one, headers={"x-api-key": "key-of-b"}, timeout=60)
            assert found.status_code == 200
            assert len(scheduler.waiting) > 80
        server.wait_until_idle()


def test_prompts_of_too_many_tokens_together_are_refused(server: Running) -> None:
    body = {"model": NAME, "prompt": [[5] * 500] * 80, "max_tokens": 1}
    found = httpx2.post(f"{server.url}/v1/completions", json=body, headers={"x-api-key": SECRET})
    assert found.status_code == 400
    assert "40000 tokens; at most 32768" in found.json()["error"]["message"]


def test_a_key_that_stands_in_its_file_is_not_told(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[key]]\nname = "alice"\nkey = "the secret itself"\n')
    with pytest.raises(ConfigError, match="got name, key") as refused:
        read_keys(path, {})
    assert "secret" not in str(refused.value)
