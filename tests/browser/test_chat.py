"""The chat page as its user has it."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import new_context
from tests.browser.pages import Chat
from tests.scripted import WAIT, Script
from tests.servers import Running, running
from tests.tiny_llm import TEMPLATE
from tests.unit.serve.test_guard import KEYS, SECRET
from thinslice.serve.settings import ServerSettings

ANSWER = """## Result

It is $x^2$, and \\(y\\) too:

$$
\\boxed{\\frac{1}{2}}
$$

```python
def half(x):
    return x / 2
```

| a | b |
|---|--:|
| 1 | 2 |
"""


def test_an_answer_is_drawn_with_code_maths_and_tables(chat: Chat) -> None:
    answer = chat.ask("Show me.", ANSWER)
    expect(answer.get_by_role("heading", name="Result")).to_be_visible()
    assert answer.locator("math").count() == 3
    assert answer.locator("math mfrac").count() == 1
    assert answer.locator("menclose").evaluate("e => getComputedStyle(e).borderTopStyle") == "solid"
    assert answer.locator(".code .k").first.inner_text() == "def"
    assert answer.locator("td.right").inner_text() == "2"
    assert chat.script.asked[-1][0] == [{"role": "user", "content": "Show me."}]


def test_code_is_copied_whole(chat: Chat) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = chat.ask("Code, please.", ANSWER)
    answer.get_by_role("button", name="Copy", exact=True).click()
    expect(chat.page.locator("#status")).to_have_text("Copied")
    found = chat.page.evaluate("navigator.clipboard.readText()")
    assert found == "def half(x):\n    return x / 2\n"


def test_text_is_seen_while_it_comes(chat: Chat) -> None:
    chat.script.steps = [("answer", "The **beginning**."), WAIT, ("answer", "\n\nThe end.")]
    chat.send("Slowly.")
    expect(chat.last.locator("strong")).to_have_text("beginning")
    expect(chat.page.get_by_role("button", name="Stop")).to_be_visible()
    chat.script.go_on()
    chat.wait()
    assert chat.messages[-1] == "The beginning.\n\nThe end."


def test_finished_blocks_are_rendered_once(chat: Chat) -> None:
    sent: list[str] = []
    chat.page.on(
        "request",
        lambda one: sent.append(one.post_data_json["text"]) if "render" in one.url else None,
    )
    steps = [step for number in range(5) for step in (("answer", f"Block {number}.\n\n"), WAIT)]
    chat.script.steps = [*steps, ("answer", "Over.")]
    chat.send("Many.")
    for number in range(5):
        expect(chat.last.locator(".body")).to_contain_text(f"Block {number}.")
        chat.script.go_on()
    chat.wait()
    assert "Block 0." in sent[0]
    assert "Block 0." not in sent[-1]
    assert chat.messages[-1].count("Block") == 5


def test_thoughts_are_folded_and_have_their_time(chat: Chat) -> None:
    answer = chat.ask("Think.", "Done.", "First *this*.\n\nThen that.")
    told = answer.locator(".thought summary")
    assert re.fullmatch(r"Thought for \d+\.\d s", told.inner_text())
    assert not answer.get_by_text("Then that.").is_visible()
    told.click()
    expect(answer.locator(".thought em")).to_have_text("this")
    # They are not part of what the model is told next.
    chat.ask("And?", "Yes.")
    assert chat.script.asked[-1][0][1] == {"role": "assistant", "content": "Done."}


def test_stop_ends_the_answer_on_the_server_too(chat: Chat) -> None:
    chat.script.steps = [("answer", "It goes on"), WAIT]
    chat.send("Talk.")
    expect(chat.last.locator(".body")).to_contain_text("It goes on")
    chat.page.get_by_role("button", name="Stop").click()
    chat.wait()
    expect(chat.last.locator(".note")).to_have_text("You stopped this answer.")
    assert chat.messages[-1] == "It goes on"
    chat.ask("Next.", "Here.")
    assert chat.script.num_left == 1


def test_a_reload_keeps_the_conversation(chat: Chat) -> None:
    chat.ask("What is kept?", ANSWER)
    before = chat.messages
    chat.page.reload()
    chat.page.wait_for_selector("html[data-ready]")
    chat.wait()
    assert chat.messages == before
    assert chat.conversations() == ["What is kept?"]


def test_what_had_come_is_kept_where_the_page_is_left(chat: Chat) -> None:
    chat.script.steps = [("answer", "Half of it"), WAIT]
    chat.send("Begin.")
    expect(chat.last.locator(".body")).to_contain_text("Half of it")
    chat.page.reload()
    chat.page.wait_for_selector("html[data-ready]")
    expect(chat.last.locator(".body")).to_have_text("Half of it")
    expect(chat.last.locator(".note")).to_have_text("This answer was cut off.")


def test_an_answer_is_tried_again_as_another_version(chat: Chat) -> None:
    chat.ask("Name a colour.", "Red.")
    chat.script.says("Blue.")
    chat.last.get_by_role("button", name="Answer again").click()
    chat.wait()
    assert chat.messages == ["Name a colour.", "Blue."]
    expect(chat.last.locator(".place")).to_have_text("2/2")
    chat.last.get_by_role("button", name="Version before").click()
    assert chat.messages == ["Name a colour.", "Red."]


def test_an_edited_message_begins_another_branch(chat: Chat) -> None:
    chat.ask("One.", "First.")
    chat.ask("Two.", "Second.")
    chat.script.says("Other.")
    chat.page.get_by_role("button", name="Edit the message").first.click()
    chat.page.get_by_role("textbox", name="Edit the message").fill("Uno.")
    chat.page.keyboard.press("Enter")
    chat.wait()
    assert chat.messages == ["Uno.", "Other."]
    assert chat.script.asked[-1][0] == [{"role": "user", "content": "Uno."}]
    chat.page.get_by_role("button", name="Version before").click()
    assert chat.messages == ["One.", "First.", "Two.", "Second."]


def test_export_and_import(chat: Chat, browser: Browser, server: Running, tmp_path: Path) -> None:
    chat.ask("Keep this.", "Kept: <b>.")
    with chat.page.expect_download() as download:
        chat.page.get_by_role("button", name="Export all").click()
    path = tmp_path / "kept.json"
    download.value.save_as(path)
    with new_context(browser) as other:
        page = other.new_page()
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]")
        page.set_input_files("#import-file", path)
        page.get_by_role("button", name="Keep this.", exact=True).click()
        expect(page.locator(".assistant .body")).to_have_text("Kept: <b>.")


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        '{"format": "else", "version": 1, "conversations": []}',
        '{"format": "thinslice-conversations", "version": 1, "conversations": [{"title": 1}]}',
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(chat: Chat, tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    chat.page.set_input_files("#import-file", path)
    expect(chat.page.locator("#toast")).to_contain_text("Nothing is imported.")
    assert chat.conversations() == []


def test_a_file_whose_messages_follow_each_other_in_a_circle_is_refused(
    chat: Chat, tmp_path: Path
) -> None:
    one, two = "0" * 36, "1" * 36
    node = {"role": "user", "content": "", "reasoning": ""}
    nodes = {one: {**node, "id": one, "parent": two}, two: {**node, "id": two, "parent": one}}
    conversation = {"id": "2" * 36, "title": "", "nodes": nodes, "leaf": one}
    whole = {"format": "thinslice-conversations", "version": 1, "conversations": [conversation]}
    (path := tmp_path / "circle.json").write_text(json.dumps(whole))
    chat.page.set_input_files("#import-file", path)
    expect(chat.page.locator("#toast")).to_contain_text("follows none")


def test_conversations_are_renamed_deleted_and_brought_back(chat: Chat) -> None:
    chat.ask("First title", "Yes.")
    page = chat.page
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="Title").fill("Second title")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Second title")
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#conversations .entry")).to_have_text("Second title")


def test_a_title_ends_with_a_whole_word(chat: Chat) -> None:
    chat.ask("word " * 30, "Yes.")
    chat.page.get_by_role("button", name="New conversation").click()
    chat.ask("\U0001f600" * 60, "Yes.")
    assert chat.conversations() == ["\U0001f600" * 39 + "…", "word " * 14 + "word…"]


def test_settings_are_sent_and_kept(chat: Chat) -> None:
    page = chat.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Most tokens").fill("77")
    page.get_by_label("Top-p").fill("7")  # out of range: not sent
    page.get_by_label("System prompt").fill("Be brief.")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    chat.ask("Hi.", "Hello.")
    messages, params = chat.script.asked[-1]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert (params.temperature, params.max_tokens, params.top_p) == (0.25, 77, None)


def test_a_thought_is_bounded_where_the_model_thinks(
    browser: Browser, chat: Chat, tmp_path: Path
) -> None:
    chat.page.get_by_role("button", name="Settings").click()
    field = chat.page.get_by_label("Longest thought")
    expect(field).to_be_disabled()
    expect(field).to_have_accessible_description(re.compile("does not think"))
    template = f"{{% if 0 %}}<think>{{% endif %}}{TEMPLATE}"
    with running(tmp_path, template=template) as server, new_context(browser) as context:
        script, page = Script(server), context.new_page()
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]")
        thinking = Chat(page, script)
        thinking.ask("Hi.", "Hello.")
        assert script.asked[-1][1].max_thinking_tokens is None
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_text("does not think")).to_be_hidden()
        page.get_by_label("Longest thought").fill("0")
        page.keyboard.press("Escape")
        page.reload()
        page.wait_for_selector("html[data-ready]")
        thinking.ask("Hi.", "Hello.")
        assert script.asked[-1][1].max_thinking_tokens == 0
        # Kept for another model, whose answers would be refused or changed by it.
        page.route(
            "**/plan", lambda route: route.fulfill(json={**route.fetch().json(), "thinks": False})
        )
        page.reload()
        page.wait_for_selector("html[data-ready]")
        thinking.ask("Hi.", "Hello.")
        assert script.asked[-1][1].max_thinking_tokens is None
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Longest thought")).to_have_value("0")


def test_light_and_dark(chat: Chat, browser: Browser, server: Running) -> None:
    def lightness(page: Page) -> float:
        colour = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765

    assert lightness(chat.page) > 0.9
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_text("Dark").click()
    assert lightness(chat.page) < 0.2
    with new_context(browser, color_scheme="dark") as other:
        page = other.new_page()
        page.goto(server.url)
        assert lightness(page) < 0.2


def test_a_refusal_is_shown_in_the_servers_words(chat: Chat) -> None:
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Most tokens").fill("100000")
    chat.page.keyboard.press("Escape")
    # The real engine's, which refuses what does not fit its context.
    del chat.script.server.served.engine.submit
    chat.send("Too much.")
    expect(chat.last.locator(".error")).to_contain_text("100000")
    chat.page.evaluate("localStorage.clear()")
    chat.script.take_over()
    chat.script.says("Now it fits.")
    chat.last.get_by_role("button", name="Retry").click()
    chat.wait()
    assert chat.messages == ["Too much.", "Now it fits."]
    expect(chat.last.locator(".versions")).to_have_count(0)


def test_a_message_that_is_too_long_says_what_helps(chat: Chat) -> None:
    """Asking again does not."""
    del chat.script.server.served.engine.submit
    chat.send("word " * 1500)
    expect(chat.last.locator(".error")).to_contain_text("the context is 512")
    expect(chat.last.locator(".error")).to_contain_text("Edit your message to make it shorter")


def test_a_key_is_asked_for_once(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        running(tmp_path_factory.mktemp("keys"), keys=KEYS) as server,
        new_context(browser) as context,
    ):
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_be_visible()
        page.get_by_label("Key", exact=True).fill(SECRET)
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]")
        assert page.evaluate("localStorage.getItem('thinslice.key')") is None
        page.reload()
        page.wait_for_selector("html[data-ready]")
        page.fill("#prompt", "Hi.")
        page.keyboard.press("Enter")
        page.wait_for_selector("#app:not(.answering) .foot button")
        assert page.locator(".error").count() == 0
        assert SECRET not in page.content()


def test_over_a_network_without_https(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = ServerSettings(drain_s=0.0, allow_host=("model.test",))
    with (
        running(tmp_path_factory.mktemp("network"), settings) as server,
        new_context(browser) as context,
    ):
        page = context.new_page()
        page.goto(f"http://model.test:{server.port}")
        page.wait_for_selector("html[data-ready]")
        assert not page.evaluate("isSecureContext")
        chat = Chat(page, Script(server))
        answer = chat.ask("Code, please.", ANSWER)
        assert answer.locator("mfrac").count() == 1
        answer.get_by_role("button", name="Copy", exact=True).click()
        expect(page.locator("#status")).to_have_text("Copied")
        page.locator("#prompt").focus()
        page.keyboard.press("Control+v")
        assert "return x / 2" in page.input_value("#prompt")


def test_by_keyboard_alone(chat: Chat) -> None:
    page, keyboard = chat.page, chat.page.keyboard
    chat.script.says("An answer.")
    expect(page.locator("#prompt")).to_be_focused()
    keyboard.type("Hello")
    keyboard.press("Shift+Enter")
    keyboard.type("there")
    keyboard.press("Enter")
    chat.wait()
    assert chat.messages == ["Hello\nthere", "An answer."]
    keyboard.press("ArrowUp")
    keyboard.press("Control+a")
    keyboard.type("Again")
    keyboard.press("Enter")
    chat.wait()
    assert chat.messages == ["Again", "An answer."]
    chat.script.steps = [("answer", "Long"), WAIT]
    page.locator("#prompt").focus()
    keyboard.type("More")
    keyboard.press("Enter")
    expect(chat.last.locator(".body")).to_contain_text("Long")
    keyboard.press("Escape")
    chat.wait()
    keyboard.press("Alt+m")
    expect(page.locator("#memory")).to_be_visible()
    keyboard.press("Alt+m")
    expect(page.locator("#memory")).to_be_hidden()
    keyboard.press("Alt+n")
    expect(page.locator("#messages > li")).to_have_count(0)
    expect(page.locator("#prompt")).to_be_focused()
    # Every button can be reached.
    seen = set()
    for _ in range(30):
        keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"new", "import", "open-memory", "open-settings"} <= seen


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_scrolls_down_only(
    browser: Browser, server: Running, chat: Chat, width: int
) -> None:
    size = {"width": width, "height": 700}
    with browser.new_context(viewport=size, has_touch=True, is_mobile=True) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("html[data-ready]")
        phone = Chat(page, chat.script)
        chat.script.says(
            ANSWER + "\n" + "a" * 500 + "\n\n`" + "b" * 500 + "`\n\n$" + "x+" * 300 + "y$"
        )
        page.fill("#prompt", "c" * 300)
        page.get_by_role("button", name="Send").click()
        phone.wait()
        for element in ("html", "#scroller", ".assistant .body"):
            wide = page.locator(element).evaluate("e => e.scrollWidth - e.clientWidth")
            assert wide <= 0, element
        small = page.locator("button:visible").evaluate_all(
            "all => all.map(e => [e.getBoundingClientRect(), e.outerHTML])"
            ".filter(([r]) => r.width < 44 || r.height < 44).map(([r, html]) => html)"
        )
        assert small == []
        page.get_by_role("button", name="Conversations").click()
        expect(page.get_by_role("button", name="New conversation")).to_be_visible()


def test_text_from_right_to_left(chat: Chat) -> None:
    answer = chat.ask("لماذا؟", "## لأن\n\n- واحد\n- اثنان\n\nنعم `code`\n\nEnglish.")
    directions = answer.locator(".body > .block:not(:empty)").evaluate_all(
        "all => all.map(e => getComputedStyle(e).direction)"
    )
    assert directions == ["rtl", "rtl", "rtl", "ltr"]
    assert answer.locator("code").evaluate("e => getComputedStyle(e).direction") == "ltr"
