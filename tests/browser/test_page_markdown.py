"""How the chat page shows Markdown in a real browser, and what an answer cannot do to it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from browser.openai_server import MARKDOWN, Server
from browser.page import LAST, ask, wait, wait_until_done


def test_hostile_markdown_does_nothing(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    ask(tab, "hostile")
    wait_until_done(tab)
    time.sleep(0.3)
    assert tab.evaluate("window.hacked") is None
    names = set(tab.eval_on_selector_all(f"{LAST} *", "all => all.map(e => e.tagName.toLowerCase())"))
    assert names.isdisjoint({"script", "img", "svg", "iframe", "object", "style", "form", "input"})
    links = tab.eval_on_selector_all(f"{LAST} a", "all => all.map(e => [e.href, e.rel, e.target])")
    assert {rel for _, rel, _ in links} == {"noopener noreferrer"}
    assert [url for url, _, _ in links][:2] == ["https://example.org/a_(b)?c=1", "https://example.org/bare"]
    assert all(url.startswith("https://example.org") for url, _, _ in links)
    attributes = tab.eval_on_selector_all(f"{LAST} *", "all => all.flatMap(e => e.getAttributeNames())")
    assert set(attributes) <= {"href", "rel", "target", "class", "type", "start"}
    assert "<script>window.hacked = 1</script>" in tab.inner_text(f"{LAST} h1")


def test_a_script_that_gets_into_the_page_all_the_same_does_not_run(tab: Any, server: Server) -> None:
    """The policy is the second wall: here something puts markup into the page."""
    tab.allowed.append("Content Security Policy")
    tab.goto(server.url)
    tab.evaluate("""() => {
        document.querySelector('#chat').innerHTML =
            '<img src=x onerror="window.hacked = 1"><a href="javascript:window.hacked=2">x</a>';
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 3';
        document.body.append(script);
        document.querySelector('#chat a').click();
    }""")
    time.sleep(0.3)
    assert tab.evaluate("window.hacked") is None
    assert "refused" in tab.evaluate("fetch('https://example.org').catch(() => 'refused')")


def test_markdown_becomes_elements(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    ask(tab, "markdown")
    wait_until_done(tab)
    texts = {
        name: tab.eval_on_selector_all(f"{LAST} {name}", "all => all.map(e => e.textContent)")
        for name in (
            "h2",
            "strong",
            "em",
            "del",
            "p code",
            "ol > li",
            "ol ul > li",
            "blockquote blockquote",
            "th",
            "td",
        )
    }
    assert texts["h2"] == ["Two ways"]
    assert texts["strong"] == ["bold", "Both\nlines", "one"]
    assert (texts["em"], texts["del"], texts["p code"]) == (["italic"], ["gone"], ["code"])
    assert len(texts["ol > li"]) == 2
    assert texts["ol ul > li"] == ["nested one", "nested two"]
    assert [text.strip() for text in texts["blockquote blockquote"]] == ["twice"]
    assert (texts["th"], texts["td"]) == (["name", "size"], ["a | b", "12"])
    assert tab.eval_on_selector(f"{LAST} td:nth-child(2)", "e => getComputedStyle(e).textAlign") == "right"
    assert tab.eval_on_selector(f"{LAST} pre", "e => e.textContent") == 'if a < b:\n    print("**not bold**")'
    assert tab.inner_text(f"{LAST} .code > div span") == "python"
    assert len(tab.query_selector_all(f"{LAST} p br")) == 1
    assert len(tab.query_selector_all(f"{LAST} hr")) == 1
    assert "snake_case_name and 2 * 3 * 4." in tab.inner_text(LAST)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.click(f"{LAST} .code button")
    assert tab.evaluate("navigator.clipboard.readText()") == 'if a < b:\n    print("**not bold**")'
    tab.click(".assistant .tools button >> text=Copy")
    assert tab.evaluate("navigator.clipboard.readText()") == MARKDOWN


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        # emphasis
        ("***both***", "<p><strong><em>both</em></strong></p>"),
        ("**bold *it***", "<p><strong>bold <em>it</em></strong></p>"),
        ("**`**kwargs`** x", "<p><strong><code>**kwargs</code></strong> x</p>"),
        ("*an `*` in code* x", "<p><em>an <code>*</code> in code</em> x</p>"),
        ("*a \\* b* c", "<p><em>a * b</em> c</p>"),
        ("имя_файла_тут, naïve_é_x", "<p>имя_файла_тут, naïve_é_x</p>"),
        ("f*** you: a *** b, ****", "<p>f*** you: a *** b, ****</p>"),
        # addresses
        (
            "(https://example.org/a_(b)_c, https://example.org/d).",
            "<p>([https://example.org/a_(b)_c], [https://example.org/d]).</p>",
        ),
        # blocks
        (
            "1. one\n   ~~~\n   ---\n   kind: x\n   ~~~\n2. two",
            '<ol start="1"><li>one<div class="code">[text]<pre><code>---\nkind: x</code></pre></div></li><li>two</li></ol>',
        ),
        ("- a\n---\n- b", "<ul><li>a</li></ul><hr><ul><li>b</li></ul>"),
        ("this | that\n---\nx", "<p>this | that</p><hr><p>x</p>"),
    ],
)
def test_markdown_shows_every_character_but_its_marks(text: str, shown: str, tab: Any, server: Server) -> None:
    tab.goto(server.url)
    found = tab.evaluate(
        """(text) => {
        const element = document.createElement('div');
        showMarkdown(element, text);
        for (const head of element.querySelectorAll('.code > div')) head.replaceWith(`[${head.firstChild.textContent}]`);
        for (const link of element.querySelectorAll('a')) link.replaceWith(`[${link.href}]`);
        return element.innerHTML;
    }""",
        text,
    )
    assert found == shown


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_copying_twice_leaves_the_button_and_the_keyboard_where_they_were(
    has_clipboard: bool, tab: Any, server: Server
) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(server.url)
    if not has_clipboard:  # as over plain HTTP to another host
        tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    ask(tab, "hello")
    wait_until_done(tab)
    button = ".assistant .tools button"
    for _ in range(2):
        tab.press(button, "Enter")
        wait(tab, f"document.querySelector('{button}').textContent === 'Copied'")
    assert tab.evaluate("document.activeElement.textContent") == "Copied"
    time.sleep(1.6)  # longer than it says so
    assert tab.inner_text(button) == "Copy"


def test_nasty_markdown_does_not_hold_the_page(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    ask(tab, "nasty")
    wait_until_done(tab)
    took_ms = tab.evaluate("""() => {
        const text = document.querySelector('.assistant .body').sources.join('\\n'), started = performance.now();
        showMarkdown(document.createElement('div'), text);
        return performance.now() - started;
    }""")
    assert took_ms < 1000


@pytest.mark.parametrize("text", ["*a* " * 150_000, "- " + "`a` " * 150_000, "a\n\n" * 150_000])
def test_a_long_answer_of_one_pattern_is_shown(text: str, tab: Any, server: Server) -> None:
    """Models get stuck in one, and a browser takes some 100 000 arguments of a call."""
    tab.goto(server.url)
    shown = """(text) => {
        const element = document.createElement('div');
        showMarkdown(element, text);
        return element.textContent.length;
    }"""
    assert tab.evaluate(shown, text) >= 150_000
