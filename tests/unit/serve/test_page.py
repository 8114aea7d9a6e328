"""The page's files and its rendering, over HTTP."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.asking import post, server_fixture
from tests.servers import Running
from tests.unit.serve.test_guard import KEYS, SECRET
from thinslice.serve import page
from thinslice.serve.markdown import MAX_TEXT, render
from thinslice.serve.static_files import STATIC_FILES

STATIC = Path(page.__file__).parent / "static"


server = server_fixture(keys=KEYS)


def rendered(server: Running, **body: object) -> httpx2.Response:
    return post(server, "/page/render", body, {"x-api-key": SECRET})


@pytest.mark.parametrize("path", STATIC_FILES)
def test_files_are_there_for_all_with_their_policy(server: Running, path: str) -> None:
    answer = httpx2.get(server.url + path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    policy = {
        one.split()[0]: one.split()[1:]
        for one in answer.headers["content-security-policy"].split("; ")
    }
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == ["'none'"], name
    for name in ("script-src", "style-src", "connect-src", "img-src"):
        assert policy[name] == ["'self'"], name
    again = httpx2.get(server.url + path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = httpx2.get(server.url + path, headers={"if-none-match": '"other"'})
    assert other.status_code == 200


def test_ollamas_command_finds_a_server(server: Running) -> None:
    answer = httpx2.head(server.url)
    assert (answer.status_code, answer.content) == (200, b"")


def test_every_file_is_served_and_no_other(server: Running) -> None:
    assert len(STATIC_FILES) == len([*STATIC.iterdir()])
    for path in ("/page/index.html", "/page/none.js", "/page/../page.py", "/page/%2e%2e/page.py"):
        answer = httpx2.get(server.url + path, headers={"x-api-key": SECRET})
        assert answer.status_code == 404, path


def test_nothing_is_loaded_from_elsewhere() -> None:
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/", "")
        assert "http:" not in text, path
        assert "https:" not in text, path
        assert "style=" not in text, path
    text = (STATIC / "index.html").read_text()
    assert "<script>" not in text
    assert "onclick" not in text


def test_the_page_and_the_server_agree_on_the_longest_text() -> None:
    assert f"MAX_TEXT = {MAX_TEXT};" in (STATIC / "blocks.js").read_text()


def test_a_text_is_rendered(server: Running) -> None:
    answer = rendered(server, text="a\n\n*b*", is_whole=False)
    assert answer.json() == {"finished": [], "rest": "<p>a</p>\n<p><em>b</em></p>\n", "taken": 0}
    answer = rendered(server, text="🙂\n\n*b*\n", is_whole=False)
    assert answer.json() == {"finished": ["<p>🙂</p>\n"], "rest": "<p><em>b</em></p>\n", "taken": 4}


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a" * (MAX_TEXT + 1), "is_whole": True},
        {"text": "a"},
        {"text": 1, "is_whole": True},
        {"text": "a", "is_whole": "yes"},
        {},
    ],
)
def test_bad_bodies_are_refused(server: Running, body: dict[str, object]) -> None:
    answer = rendered(server, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_half_a_character_is_no_bug(server: Running) -> None:
    body = '{"text": "a \\ud83d b", "is_whole": true}'
    headers = {"x-api-key": SECRET}
    answer = httpx2.post(f"{server.url}/page/render", content=body, headers=headers)
    assert answer.status_code in (200, 400)


def test_many_texts_wait_and_more_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow(text: str, *, is_whole: bool) -> object:
        assert go.wait(30)
        return render(text, is_whole=is_whole)

    monkeypatch.setattr(page, "render", slow)
    monkeypatch.setattr(page, "_MAX_WAITING", 3)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(rendered, server, text="a", is_whole=True) for _ in range(4)]
        while not any(one.done() for one in asked):
            go.wait(0.01)
        # The server answers others in the meantime.
        assert httpx2.get(f"{server.url}/health").status_code == 200
        go.set()
    assert sorted(one.result().status_code for one in asked) == [200, 200, 200, 429]
