"""Takes the pictures of docs/chat.md, with answers that were written by hand.

python -m tests.serving.screenshots docs/images
"""

import base64
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv4_jax.encoding import constants as C
from dsv4_jax.serving.service import Service, Settings
from tests.serving.browser import Tab, chromium, tab
from tests.serving.fakes import FakeModel, answer, make_service
from tests.serving.live import serving

WINDOW = {"width": 1000, "height": 870}
PHONE = {"width": 390, "height": 760}
PACE_S = 0.004  # between bytes, about the speed of a good server
QUESTION = "How does a prefix cache make the second turn of a chat faster?"
THOUGHTS = """\
The user wants to know why the second turn starts faster. The prompt of turn two begins with the \
whole of turn one, so its prefill can be skipped where the state is still there.

I should say what is kept, what the unit is, and show numbers in a small table. A short code \
sample may help as well."""
REPLY = """\
The prompt of the second turn **starts with the first turn**, word for word. What the model \
computed for that part is still in memory, so only the new tokens go through it:

1. Look up the longest known prefix, in units of 128 tokens.
2. Restore the state behind it.
3. Compute what follows.

```python
known = cache.longest_prefix(prompt)      # 4,096 of 4,131 tokens
state = cache.restore(known)
logits = prefill(prompt[len(known):], state)
```

| turn | prompt | computed |
|---|---|---|
| 1 | 4,020 | 4,020 |
| 2 | 4,131 | 35 |

The answer is *the same to the bit* as without the cache."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Current weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
CALL = f"""I will look that up.

<{C.DSML}tool_calls>
<{C.DSML}invoke name="weather">
<{C.DSML}parameter name="city" string="true">Reykjavík</{C.DSML}parameter>
<{C.DSML}parameter name="days" string="false">3</{C.DSML}parameter>
</{C.DSML}invoke>
</{C.DSML}tool_calls>"""
FORECAST = '{"today": "rain, 7 °C", "tomorrow": "sun, 9 °C", "Thursday": "wind, 6 °C"}'
ADVICE = "Take a raincoat today. **Tomorrow is the day for the walk**: sun and 9 °C."


@contextmanager
def pace(gate: threading.Semaphore) -> Iterator[None]:
    """Lets one byte after the other through, for as long as the block lasts."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(PACE_S):
            gate.release()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        gate.release(10**6)


@contextmanager
def opened(browser: Any, *says: str, **options: Any) -> Iterator[tuple[Tab, threading.Semaphore]]:
    """Opens the page of a server that says these completions; bytes wait at the gate."""
    gate = threading.Semaphore(0)
    model = FakeModel(*says, gate=gate)
    made = make_service(model).loaded()
    service = Service(Settings(("scripted-example",)))
    service.ready(made.planner, model, made.fingerprint)
    how = {"viewport": WINDOW, "color_scheme": "light", **options}
    with serving(service) as url, tab(browser, url, **how) as shown:
        shown.page.get_by_text("ready ·").wait_for()
        yield shown, gate


def shoot(shown: Tab, path: Path) -> None:
    shown.page.mouse.move(0, 0)
    devtools = shown.page.context.new_cdp_session(shown.page)
    taken = devtools.send("Page.captureScreenshot", {"format": "webp", "quality": 88})
    path.write_bytes(base64.b64decode(taken["data"]))
    print(f"{path}  {path.stat().st_size:,} bytes")


def finished(browser: Any, path: Path, **options: Any) -> None:
    with opened(browser, answer(REPLY, THOUGHTS), **options) as (shown, gate), pace(gate):
        shown.send(QUESTION)
        shown.wait_done()
        shoot(shown, path)


def streaming(browser: Any, path: Path) -> None:
    with opened(browser, answer(REPLY, THOUGHTS)) as (shown, gate):
        shown.send(QUESTION)
        gate.release(len(THOUGHTS) * 3 // 4)
        shown.answer().get_by_text(THOUGHTS[-110:-80]).wait_for()
        shown.answer().get_by_text("Thinking… 2 s").wait_for()
        shoot(shown, path)
        gate.release(10**6)


def tool_call(browser: Any, path: Path) -> None:
    says = (answer(CALL, "The weather tool knows that."), answer(ADVICE, "Rain first, then sun."))
    with opened(browser, *says) as (shown, gate), pace(gate):
        page = shown.page
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Tools").fill(json.dumps(TOOLS))
        page.get_by_role("button", name="Done").click()
        shown.send("When should I go for a walk in Reykjavík?")
        page.get_by_label("Result of weather").fill(FORECAST)
        page.get_by_role("button", name="Send results").click()
        shown.answer().get_by_text("raincoat").wait_for()
        shown.wait_done()
        shoot(shown, path)


def settings(browser: Any, path: Path) -> None:
    with opened(browser, answer("x")) as (shown, _):
        page = shown.page
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt").fill("Answer in one paragraph.")
        page.get_by_label("Temperature").fill("0.6")
        page.get_by_label("Tools").fill(json.dumps(TOOLS, indent=1))
        page.get_by_label("Tools").evaluate("node => { node.scrollTop = 0; node.blur() }")
        shoot(shown, path)


def main(argv: Sequence[str]) -> None:
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        finished(browser, folder / "chat-light.webp")
        finished(browser, folder / "chat-dark.webp", color_scheme="dark")
        finished(
            browser,
            folder / "chat-phone.webp",
            viewport=PHONE,
            device_scale_factor=2,
            is_mobile=True,
        )
        streaming(browser, folder / "chat-streaming.webp")
        tool_call(browser, folder / "chat-tool-call.webp")
        settings(browser, folder / "chat-settings.webp")


if __name__ == "__main__":
    main(sys.argv[1:])
