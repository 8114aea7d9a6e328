"""A real model's server that is killed in the middle of an answer, and started again."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import BrowserContext, expect

LONG = "Write a long story about a river, a mill and the people who live there."
BEGUN = re.compile(r"\w+ \w+ \w+ \w+ \w+")


@contextmanager
def served(port: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The embedded model's server and the page's address, as it tells it."""
    command = [sys.executable, "-m", "thinslice", "serve", "smollm2", "--memory", "400MiB"]
    with subprocess.Popen(
        [*command, "--context", "1024", "--port", port], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            while "serving" not in line:
                assert line, "it ended before it served"
                line = process.stderr.readline()
            found = re.search(r"http://[\d.:]+", line)
            assert found is not None
            yield process, found[0]
        finally:
            process.kill()


def test_an_answer_is_tried_again_once_the_server_is_back(
    context: BrowserContext, smollm2_path: Path
) -> None:
    assert smollm2_path.exists()
    page = context.new_page()
    with served("0") as (process, url):
        page.goto(url)
        page.wait_for_selector("html[data-ready]")
        page.evaluate("localStorage.setItem('thinslice.settings', '{\"temperature\": 0}')")
        page.fill("#prompt", LONG)
        page.press("#prompt", "Enter")
        expect(page.locator(".assistant .body")).to_contain_text(BEGUN)
        os.kill(process.pid, signal.SIGKILL)
        expect(page.locator(".error")).to_contain_text("connection to the server was lost")
    said = page.locator(".assistant .body").inner_text()
    assert said
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".error")).to_contain_text("cannot be reached")
    with served(url.rpartition(":")[2]):
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".assistant .body")).to_contain_text(BEGUN)
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector("#app:not(.answering)")
        # What had come before is a version of it; what never began is none.
        expect(page.locator(".assistant .place")).to_have_text("2/2")
        page.get_by_role("button", name="Version before").click()
        assert page.locator(".assistant .body").inner_text().startswith(said[:20])
