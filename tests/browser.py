"""A headless Chromium that clicks and types, driven over its debugging pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMAND = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"
CODES = {" ": "Space", "/": "Slash", "m": "KeyM"}  # others are called as their keys


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A page of 1400 x 900 pixels without a network; skips where there is no Chromium.

    Args:
        folder: for its profile.
    """
    command = next(filter(None, map(shutil.which, COMMAND)), None)
    if command is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    to_it, from_us = (_high(fd) for fd in os.pipe())
    to_us, from_it = (_high(fd) for fd in os.pipe())
    words = [command, *FLAGS, OFFLINE, f"--user-data-dir={folder}", "--window-size=1400,900"]
    shell = ["bash", "-c", f'exec "$0" "$@" 3<&{to_it} 4>&{from_it}', *words, "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(shell, pass_fds=(to_it, from_it), **quiet)
    os.close(to_it)
    os.close(from_it)
    try:
        yield Browser(os.fdopen(to_us, "rb"), os.fdopen(from_us, "wb", buffering=0))
    finally:
        process.kill()
        process.wait()


def _high(fd: int) -> int:
    """The same pipe under a number that a shell does not use."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(fd)
    return high


class Browser:
    """One page.

    Attributes:
        errors: what scripts of the page threw so far.
    """

    def __init__(self, reading: Any, writing: Any) -> None:
        self._reading, self._writing, self._count, self._session = reading, writing, 0, None
        self.errors: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        [page] = [one["targetId"] for one in targets if one["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.call("Runtime.enable")
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(answer["params"]["exceptionDetails"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\0"):
            data += self._reading.read(1) or pytest.fail("Chromium ended")
        return json.loads(data[:-1])

    def open(self, file: Path, hash: str = "") -> None:
        """Go to a file, and wait until it is there whole."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=file.resolve().as_uri() + hash)
        self.until("location.protocol === 'file:' && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(f"!!({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def click(self, element: str) -> None:
        """Press and release the mouse in the middle of an element, an expression."""
        self.js(f"({element}).scrollIntoView({{block: 'nearest'}})")
        box = f"({element}).getBoundingClientRect()"
        x, y = self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def key(self, key: str, kinds: tuple[str, ...] = ("keyDown", "keyUp")) -> None:
        """Press and release a key, or one of both."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in kinds:
            more = text if kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=CODES.get(key, key), **more
            )

    def write(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, file: Path) -> None:
        """Save what is seen as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
