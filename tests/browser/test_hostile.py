"""Answers of a model, or of whoever wrote what it read, that want to run something."""

import json
from pathlib import Path

from playwright.sync_api import BrowserContext, expect

from tests.browser.pages import Chat
from tests.servers import Running

# Each would set window.hacked, go elsewhere, or change how the page looks, if anything of it ran.
ATTACKS = {
    "script": "<script>window.hacked=1</script>",
    "image": "<img src=x onerror=window.hacked=1>",
    "svg": "<svg onload=window.hacked=1><script>window.hacked=1</script></svg>",
    "link": "[a](javascript:window.hacked=1) [b](data:text/html,<script>parent.hacked=1</script>)",
    "link in capitals": "[a](JaVaScRiPt:window.hacked=1) <javascript:window.hacked=1>",
    "link in entities": "[a](&#106;avascript&#58;window.hacked=1) [b](java\tscript:hacked=1)",
    "link to a reference": "[a][b]\n\n[b]: javascript:window.hacked=1",
    "title": '[a](http://a "\\"onmouseover=window.hacked=1")',
    "frame": "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "style": "<style>body{display:none}</style><p style='position:fixed;inset:0'>x</p>",
    "form": "<form action=http://evil.test><input autofocus onfocus=window.hacked=1></form>",
    "base": "<base href=http://evil.test/><meta http-equiv=refresh content=0;url=http://evil.test>",
    "fence": '```x"><script>window.hacked=1</script>\n</code></pre><script>hacked=1</script>\n```',
    "picture": "![x](http://evil.test/p.png) ![y](javascript:hacked=1)",
    "annotation": "$\\text{</mtext></math><annotation-xml encoding='text/html'>"
    "<img src=x onerror=window.hacked=1></annotation-xml>}$",
    "mglyph": "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;"
    "&lt;img src=1 onerror=window.hacked=1&gt;'>",
    "maths tags": "$\\text{<img src=x onerror=hacked=1>}$ $\\text{<style>*{color:red}</style>}$",
    "maths link": "$\\href{javascript:hacked=1}{x}$ $\\class{skip}{x}$ $\\style{color:red}{x}$",
    "maths attributes": '$\\unicode{x22 onclick=window.hacked=1}$ $\\operatorname{"><script>}$',
    "maths far away": "$\\hspace{-9999cm}\\text{Go on}$ $\\raise999em{x}$ $\\rule{9999em}{9999em}$",
    "macros": "$\\def\\a{\\b\\b}\\def\\b{\\c\\c}\\def\\c{\\a}\\a$",
    "zero": "a\x00<script>window.hacked=1</script>",
    "table": "|<script>window.hacked=1</script>|\n|-|\n|<img src=x onerror=hacked=1>|",
}
# Nothing of an answer is one of these, or has one of these attributes.
FORBIDDEN = (
    ".assistant .block :is(script, style, img, iframe, form, input, base, meta, object, mglyph, "
    "annotation-xml, maction, [style], [onerror], [onclick], [onload], [href^=javascript])"
)


def test_nothing_of_an_answer_runs(chat: Chat) -> None:
    page = chat.page
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    chat.ask("Think.", "Done.", "\n\n".join(ATTACKS.values()))
    chat.last.locator(".thought summary").click()
    chat.wait()
    assert page.locator(FORBIDDEN).count() == 0
    before = page.locator(".bar").bounding_box()
    for name, text in ATTACKS.items():
        page.get_by_role("button", name="New conversation").click()
        chat.ask(text, text)
        for href, rel, target in page.locator(".assistant a").evaluate_all(
            "all => all.map(e => [e.getAttribute('href'), e.rel, e.target])"
        ):
            assert href is None or href.startswith(("http://", "https://", "mailto:")), name
            assert {"noopener", "noreferrer"} <= set(rel.split()), name
            assert target == "_blank", name
        page.locator(".assistant .block *").evaluate_all(
            "all => all.forEach(e => ['mouseover', 'focus', 'error', 'load'].forEach("
            "kind => e.dispatchEvent(new Event(kind))))"
        )
        assert page.evaluate("window.hacked") is None, name
        assert page.locator(FORBIDDEN).count() == 0, name
        assert page.locator(".bar").bounding_box() == before, name
    assert {url.split("/")[2] for url in asked} == {page.url.split("/")[2]}


def test_the_policy_stops_what_would_get_through(context: BrowserContext, server: Running) -> None:
    """The wall behind the first: were a stranger's HTML put into the page, it would not run."""
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("html[data-ready]")
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.setAttribute('onclick', 'window.hacked = 1')",
        "trustedTypes.createPolicy('another', {})",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'hacked=1'}))",
    ):
        refused = (
            f"() => {{ try {{ {attempt}; return '' }} catch (error) {{ return error.name }} }}"
        )
        assert page.evaluate(refused) in ("TypeError", "EvalError"), attempt
    # As a parser of HTML would have made it.
    page.evaluate(
        """async () => {
            const text = "<p onclick='window.hacked = 1'><img src=x onerror='window.hacked = 1'>";
            const answer = { finished: [text], rest: "", taken: 1 };
            const before = window.fetch;
            window.fetch = async (path, more) =>
                path === "/page/render" ? Response.json(answer) : before(path, more);
        }"""
    )
    page.fill("#prompt", "Hi.")
    page.press("#prompt", "Enter")
    page.locator(".assistant .body p").first.click()
    page.wait_for_selector("#app:not(.answering)")
    assert page.locator("[onclick], [onerror]").count() >= 2
    assert page.evaluate("window.hacked") is None


def test_a_wall_of_quotes(chat: Chat) -> None:
    answer = chat.ask("Quote.", "> " * 50_000)
    assert answer.is_visible()
    assert chat.ask("And then?", "Still here.").is_visible()
    assert chat.messages[-1] == "Still here."


def test_a_long_block_is_shown_as_it_is(chat: Chat) -> None:
    text = "word " * 8000
    answer = chat.ask("Write a lot.", text)
    expect(answer.locator(".body")).to_have_text(text.strip())


def test_a_file_of_conversations_is_not_trusted_either(chat: Chat, tmp_path: Path) -> None:
    one, two = "0" * 36, "1" * 36
    attack = "<img src=x onerror=window.hacked=1>"
    nodes = {
        one: {"id": one, "parent": None, "role": "user", "content": attack, "reasoning": ""},
        two: {
            **{"id": two, "parent": one, "role": "assistant", "content": attack},
            **{"reasoning": attack, "error": attack, "finish": "error", "tokens": attack},
        },
    }
    whole = {"id": "2" * 36, "title": attack, "nodes": nodes, "leaf": two}
    path = tmp_path / "bad.json"
    exported = {"format": "thinslice-conversations", "version": 1, "conversations": [whole]}
    path.write_text(json.dumps(exported))
    chat.page.set_input_files("#import-file", path)
    chat.page.locator("#conversations .entry").click()
    expect(chat.last.locator(".error")).to_contain_text(attack)
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator("img").count() == 0
