"""The chat page in a real browser, against a live server with a scripted model."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.service import Service, Settings
from tests.serving.browser import PHONE, Tab, chromium, tab
from tests.serving.fakes import (
    MODEL,
    FakeModel,
    answer,
    chat_answer,
    make_service,
    prompt_text,
)
from tests.serving.live import serving

MARKDOWN = """# Title
Some **bold *both***, `code`, ~~gone~~ and [a link](https://example.com/x?y=1).

- one
  - inner
- two
  continued

3. three
4. four

> quoted
> > twice

| a | b |
|---|---|
| 1 | `2` |

```python
print("<b>hi</b>")
```
snake_case_name and 2 * 3 * 4
"""
ATTACKS = [
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "[x](javascript:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    '[x](https://a"onmouseover="window.hacked=1)',
    "```html\n</code></pre><script>window.hacked=1</script>\n```",
    '```"><img src=x onerror=window.hacked=1>\nx\n```',
    "| <svg onload=window.hacked=1> | b |\n|---|---|\n| <img src=x onerror=window.hacked=1> | b |",
    "- <iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "![x](https://tracker.example/pixel.png)",
    "<style>*{background:url(https://tracker.example)}</style>",
]
CALL = (
    f'<{C.DSML}tool_calls>\n<{C.DSML}invoke name="look">\n'
    f'<{C.DSML}parameter name="where" string="true">up</{C.DSML}parameter>\n'
    f"</{C.DSML}invoke>\n</{C.DSML}tool_calls>"
)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser) -> Iterator[Any]:
    """Yields a function that serves completions and opens the page; checks it stayed clean."""
    tabs: list[Tab] = []
    with ExitStack() as stack:

        def start(*says: str, gate: Any = None, **options: Any) -> tuple[Tab, FakeModel]:
            model = FakeModel(*says, gate=gate)
            url = stack.enter_context(serving(make_service(model)))
            shown = stack.enter_context(tab(browser, url, **options))
            tabs.append(shown)
            shown.page.get_by_text("ready ·").wait_for()
            return shown, model

        yield start
        for shown in tabs:
            assert all(r.startswith(f"{shown.url}/") or r == "data:," for r in shown.requests)
            assert shown.complaints == []


def test_an_answer_streams_in_with_its_reasoning(opened):
    gate = threading.Semaphore(0)
    shown, _ = opened(answer("The answer is four.", reasoning="Two and two."), gate=gate)
    shown.send("2 + 2?")
    assert shown.page.locator("article.user .bubble").inner_text() == "2 + 2?"
    shown.answer().get_by_text("waiting for the first token").wait_for()
    gate.release(len("Two and"))
    shown.answer().locator(".thoughts[open]").get_by_text("Two and", exact=True).wait_for()
    assert shown.answer().locator("summary").inner_text().startswith("Thinking…")
    gate.release(len(" two.") + 1 + len("The answer"))
    shown.answer().locator(".markdown").get_by_text("The answer", exact=True).wait_for()
    assert shown.answer().locator(".thoughts[open]").count() == 0
    gate.release(10**6)
    shown.wait_done()
    assert shown.answer().locator(".markdown").inner_text() == "The answer is four."
    assert shown.answer().locator("summary").inner_text().startswith("Thought for")
    meta = shown.answer().locator(".meta").inner_text()
    assert "33 tokens (13 thinking)" in meta and "tokens/s" in meta and "prompt " in meta
    assert "of 4,096" in shown.page.locator("#context").inner_text()


def test_reasoning_under_its_other_name_is_shown(browser):
    model = FakeModel(answer("Four.", reasoning="Two and two."))
    service = make_service(model, reasoning_fields=("reasoning",))
    with serving(service) as url, tab(browser, url) as shown:
        shown.send("2 + 2?")
        shown.wait_done()
        assert "Two and two." in shown.answer().locator(".thoughts").text_content()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(opened, how):
    gate = threading.Semaphore(30)
    shown, model = opened(chat_answer("word " * 100), gate=gate)
    shown.page.get_by_label("Thinking").select_option("off")
    shown.send("talk")
    shown.answer().get_by_text("word word word").wait_for()
    if how == "button":
        shown.page.get_by_role("button", name="Stop").click()
    else:
        shown.page.keyboard.press("Escape")
    shown.answer().get_by_text("stopped").wait_for()
    gate.release(10**6)
    assert model.closed.wait(60) and model.streamed < 500
    shown.send("again")
    shown.wait_done()
    assert "word word" in prompt_text(model.prompts[-1])


def test_regenerate_and_edit_replace_what_follows(opened):
    shown, model = opened(answer("first"), answer("second"), answer("third"))
    shown.send("one")
    shown.wait_done()
    shown.page.get_by_role("button", name="Regenerate").click()
    shown.answer().get_by_text("second").wait_for()
    shown.wait_done()
    assert model.prompts[0] == model.prompts[1]
    shown.page.get_by_role("button", name="Edit").click()
    shown.page.get_by_label("Edit message").fill("two")
    shown.page.keyboard.press("Enter")
    shown.answer().get_by_text("third").wait_for()
    shown.wait_done()
    assert "two" in prompt_text(model.prompts[2]) and "one" not in prompt_text(model.prompts[2])
    assert shown.page.locator("article").count() == 2


def test_settings_reach_the_model_and_stay(opened):
    shown, model = opened(answer("ok"))
    page = shown.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Longest answer").fill("99")
    page.get_by_label("Colours").select_option("dark")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Thinking").select_option("max")
    shown.send("hello")
    shown.wait_done()
    prompt = prompt_text(model.prompts[0])
    assert "Be brief." in prompt and "Reasoning Effort" in prompt
    assert (model.sampling[0].temperature, model.sampling[0].max_tokens) == (0.3, 99)
    page.reload()
    page.get_by_text("ready ·").wait_for()
    assert shown.answer().locator(".markdown").inner_text() == "ok"
    assert page.get_by_label("Thinking").input_value() == "max"
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    page.get_by_role("button", name="New chat").click()
    page.reload()
    assert page.locator("article").count() == 0


def test_tools_that_went_bad_open_the_settings(opened):
    shown, _ = opened(answer("ok"))
    shown.page.evaluate("$('tools').value = '{'")
    shown.send("hello")
    assert "Tools:" in shown.page.get_by_role("alert").inner_text()
    assert shown.page.locator("article.user .bubble").inner_text() == "hello"


def test_wrong_settings_are_not_taken(opened):
    shown, _ = opened(answer("ok"))
    page = shown.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill("[{")
    page.get_by_role("button", name="Done").click()
    assert "Tools:" in page.get_by_role("alert").inner_text()
    page.get_by_label("Tools").fill("")
    page.get_by_label("Temperature").fill("7")
    page.keyboard.press("Escape")
    assert page.get_by_role("alert").inner_text()
    page.get_by_label("Temperature").fill("")
    page.keyboard.press("Escape")
    page.locator("#settings").wait_for(state="hidden")


def test_markdown(opened):
    shown, _ = opened(answer(MARKDOWN))
    shown.send("q")
    shown.wait_done()
    text = shown.answer().locator(".markdown")
    assert text.locator("h2").inner_text() == "Title"
    assert text.locator("p").first.inner_html() == (
        "Some <strong>bold <em>both</em></strong>, <code>code</code>, <del>gone</del> and "
        '<a href="https://example.com/x?y=1" target="_blank" '
        'rel="noopener noreferrer nofollow">a link</a>.'
    )
    assert text.locator("> ul > li").count() == 2
    assert text.locator("ul ul li").inner_text() == "inner"
    assert text.locator("ol").get_attribute("start") == "3"
    assert text.locator("blockquote blockquote").inner_text() == "twice"
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    assert text.locator("pre").inner_text() == 'print("<b>hi</b>")'
    assert text.locator("p").last.inner_html() == "snake_case_name and 2 * 3 * 4"


def test_streaming_draws_what_drawing_at_once_draws(opened):
    """Blocks that are drawn while they grow end as if they had been whole from the start."""
    shown, _ = opened(answer("x"))
    same = shown.page.evaluate(
        """(text) => {
          const grown = make("div"), whole = make("div");
          for (let end = 0; end <= text.length; end++) markdown(grown, text.slice(0, end));
          markdown(whole, text);
          return grown.innerHTML === whole.innerHTML;
        }""",
        MARKDOWN,
    )
    assert same


def test_hostile_markdown_is_drawn_without_getting_stuck(opened):
    shown, _ = opened(answer("x"))
    drawn = "(text) => { const n = make('div'); markdown(n, text); return n.textContent.length }"
    for text in ("[" * 20_000, "**a " * 8_000, "> " * 9_000, "`" * 20_000, "- " * 9_000 + "x"):
        assert shown.page.evaluate(drawn, text) > 0, text[:4]


def test_script_injection_is_inert(opened):
    shown, _ = opened(*(answer(attack, reasoning=attack) for attack in ATTACKS))
    page = shown.page
    for attack in ATTACKS:
        shown.send(attack)
        shown.wait_done()
    page.reload()
    page.get_by_text("ready ·").wait_for()
    assert page.locator("article").count() == 2 * len(ATTACKS)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#turns :is(script, img, iframe, svg, style)").count() == 0
    links = page.locator("#turns a").evaluate_all("nodes => nodes.map((node) => node.href)")
    assert all(link.startswith("https://") for link in links)
    handlers = "nodes => nodes.flatMap((n) => n.getAttributeNames()).filter((a) => /^on/.test(a))"
    assert page.locator("#turns *").evaluate_all(handlers) == []


def test_a_tool_call_is_shown_and_answered_by_hand(opened):
    shown, model = opened(answer(CALL), answer("It is blue."))
    page = shown.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill(json.dumps(TOOLS))
    page.get_by_role("button", name="Done").click()
    shown.send("What is up?")
    page.get_by_text("Tool call: look").wait_for()
    page.get_by_label("Result of look").wait_for()  # the arguments have arrived
    assert json.loads(shown.answer().locator("pre").inner_text()) == {"where": "up"}
    assert page.get_by_role("button", name="Send", exact=True).is_disabled()
    page.get_by_label("Result of look").fill("the sky")
    page.get_by_role("button", name="Send results").click()
    shown.answer().get_by_text("It is blue.").wait_for()
    prompt = prompt_text(model.prompts[-1])
    assert "the sky" in prompt and "up" in prompt
    page.reload()
    page.get_by_text("Result of look").wait_for()


def test_phone_width_has_no_sideways_scroll(opened):
    wide = f"{MARKDOWN}\n`{'w' * 300}` {'x' * 300}\n```\n{'y' * 300}\n```\n"
    wide += f"| {'a ' * 60} | b |\n|---|---|\n| {'z' * 200} | c |\n"
    shown, _ = opened(answer(wide, reasoning="r" * 300), viewport=PHONE)
    shown.send("u" * 300)
    shown.wait_done()
    shown.page.locator("summary").first.click()
    assert shown.overflow() <= 0
    shown.page.get_by_role("button", name="Settings").click()
    assert shown.overflow() <= 0
    box = shown.page.locator("#settings").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= PHONE["width"]


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(opened):
    shown, _ = opened(answer("ok"))
    shown.send("q")
    shown.wait_done()
    nameless = shown.page.locator("button, input, select, textarea").evaluate_all(
        """nodes => nodes.filter((n) => !(n.textContent.trim() && n.tagName === "BUTTON")
          && !n.getAttribute("aria-label") && !n.labels?.length).map((n) => n.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(30):
        shown.page.keyboard.press("Tab")
        reached.add(shown.page.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
    assert {"Settings", "New chat", "Copy", "Edit", "Regenerate"} <= reached


def test_copying_and_exporting(opened):
    shown, _ = opened(answer("it's here"), permissions=["clipboard-read", "clipboard-write"])
    page = shown.page
    shown.send("q")
    shown.wait_done()
    shown.answer().get_by_role("button", name="Copy").click()
    shown.answer().get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "it's here"
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Copy as curl").click()
    page.locator("#copy-curl", has_text="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command.startswith(f"curl {shown.url}/v1/chat/completions")
    assert "it'\\''s here" in command
    with page.expect_download() as found:
        page.get_by_role("button", name="Export JSON").click()
    with open(found.value.path(), encoding="utf-8") as file:
        assert json.load(file)["messages"][1]["content"] == "it's here"


def test_a_refusal_is_readable_and_can_be_tried_again(opened):
    shown, model = opened(answer("fine"))
    shown.send("q" * 5000)
    shown.wait_done()
    assert "4096 tokens" in shown.answer().get_by_role("alert").inner_text()
    shown.complaints.clear()  # the browser notes the status 400
    shown.page.get_by_role("button", name="Edit").click()
    shown.page.get_by_label("Edit message").fill("short")
    shown.page.keyboard.press("Enter")
    shown.answer().get_by_text("fine").wait_for()


def test_a_warning_of_the_server_is_shown(opened):
    shown, _ = opened(answer("fine"))

    def warn(route: Any) -> None:
        reply = route.fetch()
        headers = {**reply.headers, "x-dsv4-warning": "A small context."}
        route.fulfill(response=reply, headers=headers)

    shown.page.route("**/v1/chat/completions", warn)
    shown.send("q")
    shown.wait_done()
    assert "A small context." in shown.answer().locator(".meta").inner_text()


def test_a_failure_in_the_middle_keeps_what_came(opened):
    shown, model = opened(answer("x" * 200))
    model.fails_after = 100
    shown.send("q")
    shown.wait_done()
    assert shown.answer().get_by_role("alert").inner_text()


@contextmanager
def tab_on(browser: Any, service: Service) -> Iterator[Tab]:
    with serving(service) as url, tab(browser, url) as shown:
        yield shown


def test_loading_is_shown_until_the_model_is_there(browser):
    service = Service(Settings((MODEL,), notice="Only a demo."))
    service.phase, service.percent = "compiling", 80
    with tab_on(browser, service) as shown:
        shown.page.get_by_text("compiling 80 %").wait_for()
        assert shown.page.get_by_text("Only a demo.").is_visible()
        assert shown.page.get_by_role("button", name="Send", exact=True).is_disabled()
        loaded = make_service(FakeModel(answer("hi"))).loaded()
        service.ready(loaded.planner, loaded.model, loaded.fingerprint)
        shown.page.get_by_text("ready ·").wait_for()
        shown.send("q")
        shown.wait_done()


def test_examples_are_offered_until_something_is_asked(browser):
    service = make_service(FakeModel(answer("four")), examples=("What is 2+2?", "<b>Why?</b>"))
    with tab_on(browser, service) as shown:
        shown.page.get_by_role("button", name="<b>Why?</b>").wait_for()
        shown.page.get_by_role("button", name="What is 2+2?").click()
        shown.wait_done()
        assert "four" in shown.answer().inner_text()
        assert shown.page.get_by_text("What is 2+2?").count() == 1 + 1  # hidden, and asked
        assert not shown.page.get_by_role("button", name="What is 2+2?").is_visible()
        assert shown.complaints == []


def test_a_key_is_asked_for_and_not_kept_on_disk(browser):
    with tab_on(browser, make_service(FakeModel(answer("hi")), api_keys=("sesame",))) as shown:
        shown.page.get_by_text("needs an API key").wait_for()
        shown.page.get_by_role("button", name="Settings").click()
        shown.page.get_by_label("API key").fill("sesame")
        shown.page.get_by_role("button", name="Done").click()
        shown.page.get_by_text("ready ·").wait_for()
        shown.send("q")
        shown.wait_done()
        assert shown.answer().locator(".markdown").inner_text() == "hi"
        assert "sesame" not in shown.page.evaluate("JSON.stringify({...localStorage})")


def test_going_offline_is_said_and_recovers(opened):
    shown, _ = opened(answer("hi"))
    context = shown.page.context
    context.set_offline(True)
    shown.send("q")
    shown.page.get_by_text("The server cannot be reached.").wait_for()
    shown.page.get_by_text("offline, trying again").wait_for()
    context.set_offline(False)
    shown.page.get_by_text("ready ·").wait_for()
    shown.page.get_by_role("button", name="Try again").click()
    shown.answer().get_by_text("hi", exact=True).wait_for()
    shown.wait_done()
    shown.complaints[:] = [c for c in shown.complaints if not re.search("ERR_INTERNET", c)]


@pytest.mark.parametrize("kept", ["{", '{"turns": [{"role": "assistant"}]}', "[]", "null"])
def test_a_damaged_memory_does_not_break_the_page(opened, kept):
    shown, _ = opened(answer("hi"))
    shown.page.evaluate("addEventListener('pagehide', (e) => e.stopImmediatePropagation(), true)")
    shown.page.evaluate("(kept) => { keep = () => {}; localStorage.setItem(STORE, kept) }", kept)
    shown.page.reload()
    shown.page.get_by_text("ready ·").wait_for()
    shown.send("q")
    shown.wait_done()
