"""The memory view's figures, and whether the page is for everybody."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import new_context
from tests.browser.pages import Chat
from tests.browser.test_chat import ANSWER
from tests.scripted import WAIT
from tests.servers import Running
from thinslice.memory.meter import peak_rss_bytes
from thinslice.units import format_bytes, parse_bytes


def figure(page: Page, name: str) -> str:
    return page.locator(f"#memory [data-figure='{name}']").inner_text()


def as_shown(num_bytes: int) -> int:
    return parse_bytes(format_bytes(num_bytes).replace(" ", ""))


def test_its_figures_are_those_of_the_plan_and_of_the_kernel(chat: Chat) -> None:
    page, llm = chat.page, chat.script.server.served.engine.llm
    before = peak_rss_bytes()
    page.get_by_role("button", name="Memory: ").click()
    expect(page.locator("#memory td.size").first).to_be_visible()
    shown = {
        cell.get_attribute("data-part"): cell.inner_text()
        for cell in page.locator("#memory td.size").all()
    }
    expected = {**dict(llm.plan.parts), "headroom": llm.plan.headroom_bytes}
    assert shown == {name: format_bytes(size) for name, size in expected.items()}
    assert figure(page, "budget") == format_bytes(llm.plan.budget_bytes)
    # As the page rounds, which of gibibytes are steps of ten mebibytes.
    least, most = (as_shown(size) for size in (before - 2**14, peak_rss_bytes() + 2**14))
    assert least <= parse_bytes(figure(page, "peak").replace(" ", "")) <= most
    assert figure(page, "weights") == "All weights are resident"
    # The parts and what is left fill the bar.
    widths = page.locator("#memory .part").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().width / e.parentElement.clientWidth)"
    )
    shares = [size / llm.plan.budget_bytes for _, size in llm.plan.parts]
    assert widths == pytest.approx(shares, abs=0.01)


def test_its_figures_follow_the_work(chat: Chat) -> None:
    page, served = chat.page, chat.script.server.served
    del served.engine.submit  # the engine's own
    page.get_by_role("button", name="Memory: ").click()
    expect(page.locator("#memory [data-figure='tokens']")).to_be_visible()
    chat.send("Say something.")
    chat.wait()
    expected = f"{served.engine.llm.engine.metrics.completion_tokens:,}"
    expect(page.locator("#memory [data-figure='tokens']")).to_have_text(expected)
    metrics = served.engine.llm.engine.metrics
    assert figure(page, "blocks") == f"{metrics.kv_blocks_used} of {metrics.kv_blocks}"
    assert figure(page, "running") == str(metrics.num_running) == "0"
    assert figure(page, "drafts") == "off"
    assert f"{expected} token" in chat.last.locator(".speed").inner_text()


def test_streamed_weights_and_a_device_are_shown(chat: Chat) -> None:
    plan = {
        **{"budget_bytes": 4096, "parts": {"weights": 1024, "weight ring": 512}, "dtype": "int4"},
        **{"kv_dtype": "int8", "context": 1000, "draft": {}, "peak_bytes": 1536},
        "streaming": {"num_slices": 4000, "num_pinned": 1000},
        "device": {
            **{"name": "cuda", "host_budget_bytes": 8192},
            "host_parts": [["runtime", 2048], ["tokenizer", 1024]],
        },
    }
    body = {"model": "big", "plan": plan, "rss_bytes": 2048, "peak_bytes": 3072, "thinks": False}
    chat.page.route("**/plan", lambda route: route.fulfill(json=body))
    chat.page.get_by_role("button", name="Memory: ").click()
    expect(chat.page.locator("#memory [data-figure='weights']")).to_have_text(
        "1,000 of 4,000 slices resident, 3,000 streamed"
    )
    assert chat.page.locator("#memory .slices .here").count() == 15
    assert chat.page.locator("#memory .plan-bar").count() == 2
    assert figure(chat.page, "peak") == "3.00 KiB"
    told = chat.page.locator("#memory .plan-bar").last.get_attribute("aria-label")
    assert told == "Planned 3.00 KiB of 8.00 KiB, held at most 3.00 KiB"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(browser: Browser, server: Running, chat: Chat, scheme: str) -> None:
    with new_context(browser, color_scheme=scheme, reduced_motion="reduce") as context:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]")
        check(page, "empty")
        seen = Chat(page, chat.script)
        seen.ask("Show all.", ANSWER, "A thought.")
        page.locator(".thought summary").click()
        chat.script.steps = [("answer", "Half"), ConnectionError("gone")]
        seen.send("Fail.")
        seen.wait()
        page.get_by_role("button", name="Memory: ").click()
        expect(page.locator("#memory td.size").first).to_be_visible()
        check(page, "memory")
        page.get_by_role("button", name="Edit the message").first.click()
        chat.script.steps = [("answer", "Half"), WAIT]
        seen.send("Go on.")
        expect(seen.last.locator(".body")).to_contain_text("Half")
        check(page, "editing, answering")
        for name, dialog in (("Settings", "#settings"), ("Keyboard", "#keys")):
            page.get_by_role("button", name=name, exact=True).click()
            check(page, name)
            page.locator(f"{dialog} .panel-head button").click()


def check(page: Page, state: str) -> None:
    """Errors: AssertionError for each finding, with what it is about."""
    # In what order headings come is the model's matter.
    options = {"rules": {"heading-order": {"enabled": False}}}
    found = Axe().run(page, options=options).response["violations"]
    told = [(one["id"], one["impact"], [n["html"][:150] for n in one["nodes"]]) for one in found]
    assert told == [], state
