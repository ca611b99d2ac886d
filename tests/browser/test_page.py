"""The chat page in a real browser, against a server of the protocol that plays parts."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from browser.openai_server import Server
from browser.page import LAST, ask, wait, wait_until_done

PAGE = Path(__file__).parents[2] / "runtime" / "llmrun" / "page" / "index.html"


def test_the_page_is_small_and_needs_nothing_from_outside() -> None:
    text = PAGE.read_text()
    assert len(text.encode()) < 40_000
    assert not re.search(r"""(fetch|request)\(["'`]/""", text)  # a proxy may put a prefix before its paths
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"\s(src|srcset|action)=|@import|url\(|\son\w+=", text.partition("<script>")[0])


def test_an_answer_streams_and_tells_its_speed(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    wait(tab, "document.title === 'demo-q4-tp2'")
    ask(tab, "slow")
    wait(tab, "document.querySelector('.assistant .body').textContent.includes('word5 ')")
    assert tab.inner_text("#send") == "Stop"
    tab.press("#prompt", "Escape")
    wait_until_done(tab)
    stopped_at = tab.inner_text(LAST)
    time.sleep(0.3)
    assert tab.inner_text(LAST) == stopped_at  # and nothing is added later
    assert "word5" in stopped_at  # which may end with it
    assert "stopped" in tab.inner_text(".assistant .tools")
    until = time.monotonic() + 5
    while not server.broken_pipes and time.monotonic() < until:
        time.sleep(0.05)
    assert server.broken_pipes == 1  # the server was told
    ask(tab, "Grüße, 世界 🙂")
    wait_until_done(tab)
    assert tab.inner_text(LAST) == "You said: Grüße, 世界 🙂"
    assert "tokens/s" in tab.inner_text(".assistant:last-child .tools")
    sent = server.requests[-1]
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert (sent["stream"], sent["model"]) == (True, "demo-q4-tp2")
    assert "temperature" not in sent
    assert tab.evaluate("document.activeElement.id") == "prompt"


def test_thoughts_are_folded_and_stay_here(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    ask(tab, "think")
    wait_until_done(tab)
    assert tab.inner_text(LAST) == "Good night."
    assert tab.inner_text(".thought summary") == "Thoughts"
    assert not tab.is_visible(".thought div")
    tab.click(".thought summary")
    assert tab.inner_text(".thought div") == "It is <b>late</b>.\nSo?"
    ask(tab, "think on")  # cut off within
    wait_until_done(tab)
    assert tab.inner_text(LAST) == ""
    assert tab.locator(".thought").count() == 2
    assert tab.locator(".waiting").count() == 0
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["think", "Good night.", "think on"]


def test_the_page_works_behind_a_prefix(tab: Any, server: Server) -> None:
    server.prefix = "/box/llm"
    tab.goto(server.url)
    wait(tab, "document.title === 'demo-q4-tp2'")
    ask(tab, "hello")
    wait_until_done(tab)
    assert tab.inner_text(LAST) == "You said: hello"


def test_the_stop_button_stops(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    ask(tab, "slow")
    wait(tab, "document.querySelector('.assistant .body').textContent.includes('word2 ')")
    tab.click("#send")
    wait_until_done(tab)
    assert "stopped" in tab.inner_text(".assistant .tools")


def test_shift_and_enter_make_a_line(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    tab.fill("#prompt", "a")
    low = tab.evaluate("document.querySelector('#prompt').clientHeight")
    tab.press("#prompt", "Shift+Enter")
    tab.keyboard.type("b")
    assert tab.evaluate("document.querySelector('#prompt').clientHeight") > low
    tab.press("#prompt", "Enter")
    wait_until_done(tab)
    assert server.requests[0]["messages"][0]["content"] == "a\nb"


@pytest.mark.parametrize("event", ["isComposing: true", "keyCode: 229"])
def test_the_enter_that_ends_a_composition_sends_nothing(event: str, tab: Any, server: Server) -> None:
    """Chinese and Japanese are typed so; Safari says that the composition is over before it tells of its last key."""
    tab.goto(server.url)
    tab.fill("#prompt", "にほん")
    tab.evaluate(f"""document.querySelector('#prompt').dispatchEvent(
        new KeyboardEvent('keydown', {{ key: 'Enter', bubbles: true, cancelable: true, {event} }}))""")
    assert tab.input_value("#prompt") == "にほん"


def test_settings_go_into_the_request(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    tab.click("#open-settings")
    for name, value in {"system": "Be brief.", "temperature": "0", "top_p": "0.5", "max_tokens": "12"}.items():
        tab.fill(f"#{name}", value)
    tab.fill("#top_p", "3")
    tab.click("#save")
    assert tab.is_visible("#settings")  # 3 is no probability
    tab.fill("#top_p", "0.5")
    tab.press("#top_p", "Enter")
    ask(tab, "hello")
    wait_until_done(tab)
    sent = server.requests[0]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (0, 0.5, 12)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_missing_key_is_asked_for_and_kept_for_the_tab_only(tab: Any, server: Server) -> None:
    tab.allowed.append("401")
    server.key = "s3cret"
    tab.goto(server.url)
    tab.wait_for_selector("#settings[open]")
    assert "wants an API key" in tab.inner_text("#trouble")
    tab.fill("#key", "wrong")
    tab.press("#key", "Enter")
    wait(tab, "document.querySelector('#trouble').textContent.includes('does not accept')")
    tab.fill("#key", "ключ")
    tab.press("#key", "Enter")
    assert tab.is_visible("#settings")  # no header can carry it
    tab.fill("#key", "s3cret")
    tab.press("#key", "Enter")
    wait(tab, "document.title === 'demo-q4-tp2'")
    assert tab.evaluate("localStorage.length") == 0
    assert tab.evaluate("document.cookie") == ""
    tab.reload()
    wait(tab, "document.title === 'demo-q4-tp2'")


@pytest.mark.parametrize(
    ("refusal", "said"),
    [((429, "full"), "The server is busy; it asks to wait 7 s."), ((500, "rank 1 is lost."), "rank 1 is lost.")],
)
def test_a_refusal_is_told_and_can_be_tried_again(
    refusal: tuple[int, str], said: str, tab: Any, server: Server
) -> None:
    tab.allowed.append(str(refusal[0]))
    tab.goto(server.url)
    server.refusals.append(refusal)
    ask(tab, "hello")
    wait_until_done(tab)
    assert tab.inner_text("#trouble span") == said
    tab.click("#trouble button")
    wait_until_done(tab)
    assert tab.inner_text(LAST) == "You said: hello"
    assert tab.is_hidden("#trouble")
    assert len(server.requests[-1]["messages"]) == 1


def test_an_answer_stays_where_there_is_no_other(tab: Any, server: Server) -> None:
    tab.allowed.append("429")
    tab.goto(server.url)
    ask(tab, "hello")
    wait_until_done(tab)
    server.refusals += [(429, "full")] * 2
    tab.click("text=Again")
    wait_until_done(tab)
    tab.click("#trouble button")
    wait_until_done(tab)
    assert tab.inner_text(LAST) == "You said: hello"
    tab.click("#trouble button")
    wait_until_done(tab)
    assert tab.is_hidden("#trouble")
    assert [tab.locator(f".{role}").count() for role in ("user", "assistant")] == [1, 1]
    assert [message["role"] for message in server.requests[-1]["messages"]] == ["user"]


def test_a_question_is_sent_and_edited_as_it_was_typed(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    ask(tab, " \n    def f():\n        pass \n")
    wait_until_done(tab)
    assert server.requests[-1]["messages"][-1]["content"] == "    def f():\n        pass"
    tab.fill("#prompt", "and a draft")
    tab.click("text=Edit")
    assert tab.input_value("#prompt") == "    def f():\n        pass\nand a draft"


def test_a_full_context_is_explained(tab: Any, server: Server) -> None:
    tab.allowed.append("400")
    tab.goto(server.url)
    server.refusals.append((400, "the prompt is too long.", "context_length_exceeded"))
    ask(tab, "hello")
    wait_until_done(tab)
    assert tab.inner_text("#trouble span") == "the prompt is too long. A new chat has room."


def test_a_question_asked_while_the_model_loads_can_be_asked_again(tab: Any, server: Server) -> None:
    tab.allowed.append("503")
    server.model = ""
    tab.goto(server.url)
    wait(tab, "document.querySelector('#trouble').textContent.includes('being loaded')")
    ask(tab, "hello")
    wait_until_done(tab)
    server.model = "demo-q4-tp2"
    tab.click("#trouble button")
    wait(tab, f"document.querySelector('{LAST}')?.textContent === 'You said: hello'")
    assert tab.inner_text("#model") == "demo-q4-tp2"


def test_a_server_that_comes_back_with_another_model_goes_on_with_the_chat(tab: Any, server: Server) -> None:
    tab.allowed.append("404")
    tab.goto(server.url)
    ask(tab, "one")
    wait_until_done(tab)
    server.model = "another"
    ask(tab, "two")
    wait_until_done(tab)
    assert "this is another" in tab.inner_text("#trouble span")
    tab.click("#trouble button")
    wait(tab, f"document.querySelector('{LAST}')?.textContent === 'You said: two'")
    assert tab.inner_text("#model") == "another"
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["one", "You said: one", "two"]


@pytest.mark.parametrize(("part", "said"), [("die", "rank 1 (pid 4711) is gone"), ("break off", "broke off")])
def test_an_answer_that_dies_is_told(part: str, said: str, tab: Any, server: Server) -> None:
    tab.goto(server.url)
    ask(tab, part)
    wait_until_done(tab)
    assert said in tab.inner_text("#trouble span")
    assert tab.inner_text(LAST) == "so far"


def test_a_server_that_is_gone_is_told(tab: Any, server: Server) -> None:
    tab.allowed.append("ERR_CONNECTION_REFUSED")
    tab.goto(server.url)
    server.shutdown()
    server.server_close()
    ask(tab, "hello")
    wait_until_done(tab)
    assert "connection" in tab.inner_text("#trouble span")


def test_again_edit_and_new_chat(tab: Any, server: Server) -> None:
    tab.goto(server.url)
    for text in ("one", "two"):
        ask(tab, text)
        wait_until_done(tab)
    tab.click(".assistant:last-child .tools button >> text=Again")
    wait_until_done(tab)
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["one", "You said: one", "two"]
    tab.click(".user .tools button >> text=Edit")
    assert tab.input_value("#prompt") == "two"
    assert len(tab.query_selector_all(".turn")) == 2
    tab.fill("#prompt", "three")
    tab.click("#send")
    wait_until_done(tab)
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["one", "You said: one", "three"]
    ask(tab, "slow")
    wait(tab, "document.querySelector('.assistant:last-child .body').textContent.includes('word2 ')")
    tab.click("#new")
    assert tab.query_selector_all(".turn") == []
    ask(tab, "four")
    wait_until_done(tab)
    assert tab.inner_text("#chat").count("You said: four") == 1
    assert len(server.requests[-1]["messages"]) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(scheme: str, tab: Any, server: Server) -> None:
    tab.set_viewport_size({"width": 360, "height": 640})
    tab.emulate_media(color_scheme=scheme)
    tab.goto(server.url)
    ask(tab, "markdown")
    wait_until_done(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    box = tab.eval_on_selector("#send", "e => e.getBoundingClientRect().bottom")
    assert box <= 640
    # WCAG AA: 4.5 to 1
    for selector in ("body", ".tools span", ".user .body", "#send"):
        assert contrast(tab, selector) >= 4.5, selector


def contrast(tab: Any, selector: str) -> float:
    """Return the contrast of an element's text with what is behind it."""
    colours = tab.evaluate(
        """(selector) => {
        let element = document.querySelector(selector);
        const parse = (text) => text.match(/[\\d.]+/g).map(Number), ink = parse(getComputedStyle(element).color);
        for (; element; element = element.parentElement) {
            const behind = parse(getComputedStyle(element).backgroundColor);
            if (behind.length === 3 || behind[3] === 1) return [ink, behind];
        }
    }""",
        selector,
    )

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)
