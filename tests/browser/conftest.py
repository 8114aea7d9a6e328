"""A browser, a server whose answers a test writes, and the page on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    expect,
    sync_playwright,
)

from tests.browser.pages import Chat
from tests.own_browser import chromium
from tests.scripted import Script
from tests.servers import Running, running

# How long what comes at once on an idle machine may take on a busy one.
_LIMIT_MS = 30_000
expect.set_options(timeout=_LIMIT_MS)


# Not for the whole session: as long as it is open, its event loop is the thread's.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    assert program is not None, "apt-get install chromium"
    with sync_playwright() as playwright:
        # A name that is no localhost: over HTTP, browsers keep some of what they can from such.
        args = ["--no-sandbox", "--host-resolver-rules=MAP model.test 127.0.0.1"]
        found = playwright.chromium.launch(executable_path=program, args=args)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def script(server: Running) -> Script:
    return Script(server)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that nobody has used before."""
    with new_context(browser) as found:
        yield found


def is_trouble(message: ConsoleMessage) -> bool:
    """Whether the browser complains, of something else than a status that is no success."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@contextmanager
def new_context(browser: Browser, **options: object) -> Iterator[BrowserContext]:
    found = browser.new_context(viewport={"width": 1280, "height": 800}, **options)  # type: ignore[arg-type]
    found.set_default_timeout(_LIMIT_MS)
    yield found
    found.close()


@pytest.fixture
def page(context: BrowserContext, server: Running) -> Iterator[Page]:
    """The page, of which no script has failed and nothing was blocked when the test is over."""
    found = context.new_page()
    troubles: list[str] = []
    found.on("pageerror", lambda error: troubles.append(str(error)))
    found.on("console", lambda one: troubles.append(one.text) if is_trouble(one) else None)
    found.goto(server.url)
    found.wait_for_selector("html[data-ready]")
    yield found
    assert troubles == []


@pytest.fixture
def chat(page: Page, script: Script) -> Chat:
    return Chat(page, script)
