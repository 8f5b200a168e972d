"""A headless Chromium that tests click through, by its own protocol (DevTools) over two pipes: no other package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0
KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Backspace": 8,
    "Tab": 9,
    "Home": 36,
    "End": 35,
    "PageUp": 33,
    "+": 187,
}


class Page:
    """One tab.

    Attributes:
        problems: errors of scripts, lines of the console at the level of an error, refusals by the page's policy.
        requests: addresses that were asked for, but for the page itself and the data in it.
    """

    def __init__(self, to: int, answers: int, downloads: Path) -> None:
        self._to, self._answers, self._buffer, self._number = to, answers, b"", 0
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page, and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.run("window.before = true")
        self.call("Page.navigate", url=address)
        self.until(lambda: self.run("document.readyState === 'complete' && window.before !== true"))

    def run(self, script: str) -> Any:
        """The value of an expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        self._settle()

    def mouse(self, kind: str, x: float, y: float) -> None:
        """mouseMoved, mousePressed or mouseReleased at a place of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, pointerType="mouse")
        self._settle()

    def click(self, selector: str) -> None:
        """Click on the middle of an element as a person does: it must be visible, and nothing may cover it."""
        place = json.dumps(selector)
        x, y = self.run(
            f"(() => {{ const element = document.querySelector({place}); element.scrollIntoView({{block: 'center'}});"
            "const box = element.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        assert self.run(f"document.querySelector({place}).contains(document.elementFromPoint({x}, {y}))"), selector
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def write(self, selector: str, text: str) -> None:
        """Type a text into a field, in place of what stands there."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)
        self._settle()

    def give(self, selector: str, file: Path) -> None:
        """Give a file to a field for one."""
        field = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=field["result"]["objectId"])

    def screenshot(self, path: Path) -> None:
        """The window as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait for a condition; its value."""
        end = time.monotonic() + SECONDS
        while not (found := condition()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)
        return found

    def _settle(self) -> None:
        """Wait until the page has taken an input and shows what follows."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            read = os.read(self._answers, 1 << 20)
            assert read, "Chromium has ended"
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(event["exceptionDetails"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(event["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.problems.append(str(event["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {event['message']}")
        elif method == "Network.requestWillBeSent" and event.get("type") != "Document":
            address = event["request"]["url"]
            self.requests += [] if address.startswith(("data:", "blob:")) else [address]


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A tab of a new Chromium, which saves downloads and its profile in `folder`; skips the test if there is none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    pipes = [*os.pipe(), *os.pipe()]
    # Far from descriptors 3 and 4, from which the protocol is read and to which it is written.
    their_in, our_out, our_in, their_out = (fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in pipes)
    for each in pipes:
        os.close(each)
    words = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile"]
    shell = ["bash", "-c", f'exec "$@" 3<&{their_in} 4>&{their_out}', "bash", *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(shell, pass_fds=(their_in, their_out), **quiet)
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(our_out, our_in, folder)
    finally:
        process.kill()
        process.wait()
        os.close(our_out)
        os.close(our_in)
