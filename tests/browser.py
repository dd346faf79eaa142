"""A page in a real browser: headless Chromium, spoken to over a pipe by its DevTools protocol.

    with Browser() as browser:
        page = browser.open(file, width=390, dark=True)
        assert not page.problems and page.evaluate("document.title")

`page.problems` holds what no page may have: errors of scripts, lines on the console that are errors, and anything that
was asked of the network. Pictures that `page.screenshot(name)` takes lie in the folder `screenshots` of the tests'
output where MHC_SCREENSHOTS names one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")
PATIENCE = 60.0  # seconds for an answer; the machine may be busy
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--force-device-scale-factor=1", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {
    "Enter": 13,
    "Escape": 27,
    "Tab": 9,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    " ": 32,
}


class Browser:
    """One Chromium with a profile of its own, gone at the end."""

    def __enter__(self) -> Browser:
        self._stack = contextlib.ExitStack()
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        for end in (self._to, self._from):
            self._stack.callback(os.close, end)
        # The protocol's pipes are the descriptors 3 and 4 of the browser.
        shell = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", str(CHROMIUM), *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._buffer, self._pages = 0, b"", {}  # type: ignore[var-annotated]
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(Exception):
            self.ask("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stack.close()

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A file in a window of this size, loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        self._pages[page.session] = page
        page.show(file, width, height, dark)
        return page

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; what pages tell meanwhile goes to them."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._next(until, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, until: float, what: str) -> dict[str, Any]:
        """The next message; events are handed to their page on the way."""
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                raise AssertionError(f"Chromium gave no answer to {what} in {PATIENCE:.0f} seconds")
            read = os.read(self._from, 1 << 20)
            if not read:
                raise AssertionError(f"Chromium ended at {what}, with exit code {self._process.wait()}")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        if (page := self._pages.get(told.get("sessionId"))) is not None and "method" in told:
            page.hear(told["method"], told["params"])
        return told

    def wait(self, page: Page, event: str) -> None:
        until = time.monotonic() + PATIENCE
        while event not in page.heard:
            self._next(until, event)


class Page:
    """One page.

    Attributes:
        problems: what no page may have, as text.
        load_seconds: from the navigation to the end of the load event, by the page's own clock.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.problems: list[str] = []
        self.heard: set[str] = set()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.ask(method, self.session, **parameters)

    def hear(self, event: str, told: dict[str, Any]) -> None:
        self.heard.add(event)
        if event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.problems.append("console: " + " ".join(str(one.get("value", one)) for one in told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(f"log: {told['entry']['text']}")
        elif event == "Network.requestWillBeSent":
            url = told["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.problems.append(f"fetched {url}")

    def show(self, file: Path, width: int, height: int, dark: bool) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.media(dark=dark)
        self.heard.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        self.browser.wait(self, "Page.loadEventFired")
        self.load_seconds = self.evaluate("performance.getEntriesByType('navigation')[0].loadEventStart") / 1e3

    def media(self, *, dark: bool = False, paper: bool = False) -> None:
        """What the reader's system prefers, and whether the page is on a screen or on paper."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, once it is there if it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until it is true in the page."""
        self.evaluate(
            "new Promise((done, failed) => { const began = Date.now(); const look = () => { "
            f"if ({expression}) done(true); else if (Date.now() - began > 30000) failed(new Error("
            f"{json.dumps('never: ' + expression)})); else setTimeout(look, 20); }}; look(); }})"
        )

    def press(self, key: str) -> None:
        """A key on the keyboard, where the focus is."""
        code = _KEYS.get(key, ord(key[0].upper()))
        text = {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def move(self, x: float, y: float) -> None:
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, name: str, *, whole: bool = False) -> Any:
        """What is seen, as an array of (height, width, RGB) in 0 to 255; the page in all its length if `whole`."""
        import numpy
        from PIL import Image

        picture = base64.b64decode(
            self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))["data"]
        )
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(os.environ.get("MHC_SCREENSHOTS", folder))
            kept.mkdir(parents=True, exist_ok=True)
            (kept / f"{name}.png").write_bytes(picture)
            with Image.open(kept / f"{name}.png") as image:
                return numpy.asarray(image.convert("RGB"))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}}

    def pdf(self) -> bytes:
        """As it prints."""
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=False)["data"])

    def scrolls_sideways(self) -> bool:
        return bool(self.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth + 1"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """For all tests of a process: starting one takes a second."""
    with Browser() as started:
        yield started
