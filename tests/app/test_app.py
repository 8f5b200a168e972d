"""`vdtrain app`, started as a person starts it, and clicked through in Chromium with the tiny model."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.browser import Page, chromium
from tests.evaluation.test_evaluate import write_checkpoint
from tests.programs import program
from tests.world import one_line
from vdtrain.app.desk import Desk, Report, StoppedError
from vdtrain.app.server import is_loopback
from vdtrain.cli import main
from vdtrain.config.compose import SCHEMAS, compose, to_object
from vdtrain.config.overrides import Override
from vdtrain.flows import all_flows
from vdtrain.inference.checkpoint import describe
from vdtrain.inference.sampler import load_model, settled

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SETTINGS = ["resolution=32", "steps=2", "threads=1", "output_dir=results"]


@dataclass
class Served:
    """A page that is served from `folder`, and shown in a browser."""

    folder: Path
    address: str
    page: Page

    def go(self, tab: str) -> str:
        """Open a tab; the selector of what is in it."""
        name = json.dumps(tab)
        tabs = "[...document.querySelectorAll('button[role=tab]')]"
        self.page.until(lambda: self.page.run(f"{tabs}.some(each => each.innerText == {name})"))
        self.page.run(f"{tabs}.find(each => each.innerText == {name}).click()")
        place = f"#{tab.lower().replace(' ', '-')}"
        self.wait(f"{place} .make")
        self.wait(f"{place} textarea, {place} input[type=file]")
        # The page lays itself out anew when a tab is first shown.
        time.sleep(1)
        return place

    def wait(self, selector: str) -> None:
        self.page.until(lambda: self.page.run(f"!!document.querySelector({json.dumps(selector)})"))

    def give(self, place: str, file: Path) -> None:
        self.page.give(f"{place} input[type=file]", file)
        self.wait(f"{place} .image-frame img")
        time.sleep(1)

    def results(self) -> list[Path]:
        return sorted(self.folder.glob("results/*"))

    def make(self, place: str) -> Path:
        """Click, and wait for the result; its folder."""
        before = set(self.results())
        self.page.click(f"{place} .make")
        self.page.until(lambda: set(self.results()) - before or self.said(place))
        assert self.said(place) == ""
        (made,) = set(self.results()) - before
        shown = f"document.querySelector('{place} .file-preview')?.innerText"
        self.page.until(lambda: self.page.run(shown))
        return made

    def typed(self, place: str) -> str:
        """The commands that the page shows, below a heading that is clicked first."""
        heading = f"[...document.querySelectorAll('{place} button')].find(each => /command line/.test(each.innerText))"
        self.page.run(f"{heading}.click()")
        self.wait(f"{place} .cm-line")
        shown = f"[...document.querySelectorAll('{place} .cm-line')].map(each => each.innerText).join('\\n')"
        text: str = self.page.run(shown)
        return text

    def said(self, place: str) -> str:
        text: str = self.page.run(f"document.querySelector('{place} .status').innerText").strip()
        return text

    def says(self, place: str, start: str) -> str:
        """Click, and wait for a line."""
        self.page.click(f"{place} .make")
        self.page.until(lambda: self.said(place).startswith(start))
        return self.said(place)

    def download(self, place: str) -> list[bytes]:
        """All files that a tab offers."""
        links = f"[...document.querySelectorAll('{place} .file-preview a')].map(each => each.href)"
        here = "fetch(each).then(got => got.blob()).then(blob => new Response(blob).arrayBuffer())"
        coded = (
            f"Promise.all({links}.map(each => {here}.then(got => btoa(String.fromCharCode(...new Uint8Array(got))))))"
        )
        return [base64.b64decode(each) for each in self.page.run(coded)]


def settings_in(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        found: dict[str, Any] = json.loads(image.text["vdtrain"])  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("app")
    write_checkpoint(folder / "model", all_flows(["image", "text"]))
    picture = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(picture).ellipse((20, 8, 68, 56), fill="red")
    picture.save(folder / "picture.png")
    with socket.create_server(("127.0.0.1", 0)) as outside, chromium(folder / "chromium") as page:
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        surroundings = os.environ | dict.fromkeys(PROXIES, proxy) | {"no_proxy": "127.0.0.1,localhost"}
        words = [program("vdtrain"), "app", "model", *SETTINGS, "port=0"]
        process = subprocess.Popen(
            words, cwd=folder, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), process.stderr.read()
            page.open(address, 1440, 950)
            yield Served(folder, address, page)
            # Neither the page nor the server asked for anything elsewhere.
            assert page.problems == []
            assert [each for each in page.requests if not each.startswith(address)] == []
            outside.settimeout(0)
            with pytest.raises(BlockingIOError):
                outside.accept()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == "stopped by Ctrl-C\n"
        finally:
            process.kill()
            process.wait()


def test_a_text_becomes_an_image_that_the_command_line_makes_again(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(served.folder)
    place = served.go("Text to image")
    assert served.says(place, "error: ") == "error: prompt: empty; write a text"
    prompt = 'a "red" circle, on ${white}; seed=3'
    served.page.write(f"{place} textarea", prompt)
    served.page.write("input[aria-label='Width']", "33")
    assert served.says(place, "error: width").startswith("error: width=33: not a multiple of ")
    assert served.results() == []
    served.page.write("input[aria-label='Width']", "64")
    served.page.write("input[aria-label='Seed']", "5")
    made = served.make(place)
    assert served.said(place) == ""
    (png,) = served.download(place)
    assert png == (made / "0000.png").read_bytes()
    kept = settings_in(png)
    assert (kept["inputs"], kept["seed"], kept["width"], kept["height"]) == ([prompt], 5, 64, 32)
    command, *words = shlex.split(served.typed(place))[1:]
    assert main([command, "output_dir=typed", "threads=1", *words]) == 0
    assert settings_in(Path("typed/0000.png").read_bytes()) == kept
    with Image.open("typed/0000.png") as ours, Image.open(made / "0000.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()
    served.page.write("input[aria-label='Width']", "32")


@pytest.mark.slow
def test_every_tab_makes_its_result(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(served.folder)
    picture = served.folder / "picture.png"
    place = served.go("Image variation")
    assert served.says(place, "error: ") == "error: image: empty; give an image file"
    served.give(place, picture)
    served.page.write("input[aria-label='number input for Results']", "2")
    served.page.press("Tab")
    assert len(list(served.make(place).glob("*.png"))) == len(served.download(place)) == 2
    for tab in ("Image to text", "Text variation"):
        place = served.go(tab)
        if tab == "Image to text":
            served.give(place, picture)
        else:
            served.page.write(f"{place} textarea", "a red circle")
        made = served.make(place)
        captions, settings = served.download(place)
        assert captions == (made / "captions.txt").read_bytes()
        assert json.loads(settings)["samples_per_input"] == 2
        shown = served.page.run(f"[...document.querySelectorAll('{place} textarea')].at(-1).value")
        assert shown == captions.decode().removesuffix("\n")
        assert len(shown.splitlines()) <= 2
    served.page.write("input[aria-label='number input for Results']", "1")
    served.page.press("Tab")
    place = served.go("Disentanglement")
    served.give(place, picture)
    served.page.click(f"{place} input[type=checkbox]")
    made = served.make(place)
    served.page.until(lambda: len(served.page.run(f"[...document.querySelectorAll('{place} .file-preview tr')]")) == 5)
    assert [settings_in(png)["focus"] for png in served.download(place)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    place = served.go("Dual context")
    served.page.write(f"{place} textarea", "a blue star")
    served.give(place, picture)
    served.make(place)
    (png,) = served.download(place)
    contexts = [{"text": "a blue star", "weight": 0.5}, {"image": "picture.png", "weight": 0.5}]
    assert settings_in(png)["contexts"] == contexts
    place = served.go("Editing")
    served.give(place, picture)
    assert served.says(place, "error: ") == "error: remove, add: both are empty; give at least one"
    served.page.write(f"{place} textarea", "a circle")
    served.make(place)
    (png,) = served.download(place)
    assert settings_in(png)["remove"] == "a circle"
    assert served.page.run(f"[...document.querySelectorAll('{place} textarea')].at(-1).value") != ""


@pytest.mark.slow
def test_a_painted_mask_and_a_focus_enter_the_blend(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(served.folder)
    place = served.go("Multi-context")
    assert served.says(place, "error: ") == "error: texts, images: all empty; give at least one"
    served.give(place, served.folder / "picture.png")
    served.page.write(f"{place} input[aria-label='number input for Focus']", "0.2")
    served.page.press("Tab")
    buttons = f"[...document.querySelectorAll('{place} button')]"
    served.page.run(f"{buttons}.find(each => /Mask/.test(each.innerText)).click()")
    served.wait(f"{place} canvas")
    time.sleep(3)
    canvas = f"document.querySelector('{place} canvas')"
    box = f"(box => [box.x + box.width / 2, box.y + box.height / 2])({canvas}.getBoundingClientRect())"
    x, y = served.page.run(f"{canvas}.scrollIntoView({{block: 'center'}}), {box}")
    served.page.mouse("mousePressed", x - 30, y)
    for step in range(-30, 31, 10):
        served.page.mouse("mouseMoved", x + step, y)
    served.page.mouse("mouseReleased", x + 30, y)
    time.sleep(2)
    made = served.make(place)
    (png,) = served.download(place)
    (context,) = settings_in(png)["contexts"]
    assert context == {"image": "picture.png", "weight": 0.5, "focus": 0.2, "mask": "mask-2.png"}
    with Image.open(made / "mask-2.png") as mask:
        assert mask.getextrema() == (0, 255)
        assert 0 < sum(mask.histogram()[:1]) / (mask.width * mask.height) < 0.2
        assert mask.getpixel((mask.width // 2, mask.height // 2)) == 0
    typed = shlex.split(served.typed(place))[1:]
    for words, name in ((typed, "typed"), ([each.replace(', "focus": 0.2', "") for each in typed], "unfocused")):
        assert main([*words, f"output_dir={name}-blend", "threads=1"]) == 0
    assert Image.open("typed-blend/0000.png").tobytes() == Image.open(made / "0000.png").tobytes()
    assert Image.open("unfocused-blend/0000.png").tobytes() != Image.open(made / "0000.png").tobytes()


@pytest.mark.slow
def test_what_is_no_image_is_one_line_and_a_sampling_can_be_stopped(served: Served) -> None:
    before = served.results()
    odd = served.folder / "odd.png"
    Image.new("RGB", (8, 8)).save(odd, "GIF")
    place = served.go("Image variation")
    served.page.run(f"document.querySelector('{place} button[aria-label=\"Remove Image\"]')?.click()")
    served.wait(f"{place} input[type=file]")
    served.page.give(f"{place} input[type=file]", odd)
    served.wait(f"{place} .image-frame img")
    said = "error: odd.png: GIF is not read; give a file of JPEG, PNG, WEBP, AVIF or HEIC"
    assert served.says(place, "error: ") == said
    place = served.go("Text to image")
    served.page.write(f"{place} textarea", "a red circle")
    served.page.write("input[aria-label='number input for Results']", "16")
    served.page.write("input[aria-label='number input for Steps']", "200")
    # However slow the browser of a busy machine is, it sees the sampling before that ends: it takes minutes.
    for side in ("Width", "Height"):
        served.page.write(f"input[aria-label='{side}']", "256")
    served.page.press("Tab")
    served.page.click(f"{place} .make")
    served.page.until(lambda: served.page.run("/[1-9][0-9]*\\/200/.test(document.body.innerText)"))
    served.page.click(f"{place} .stop")
    served.page.until(lambda: served.said(place) == "stopped")
    # The sampling ends with its present step.
    served.page.until(lambda: served.results() == before)
    for side in ("Width", "Height"):
        served.page.write(f"input[aria-label='{side}']", "32")
    served.page.write("input[aria-label='number input for Results']", "1")
    served.page.write("input[aria-label='number input for Steps']", "2")
    served.page.press("Tab")
    served.make(place)
    # A request that has ended keeps its results, and the page does not say that it was stopped.
    made = served.results()
    served.page.click(f"{place} .stop")
    said = "nothing was being sampled; a request that waited is taken back"
    served.page.until(lambda: served.said(place) == said)
    assert served.results() == made != before


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    write_checkpoint(folder / "model", all_flows(["image", "text"]))
    settings = {"checkpoint": str(folder / "model"), "output_dir": str(folder / "results"), "threads": 1}
    words = [Override(key, "", key, None, given=value) for key, value in settings.items()]
    config = to_object(compose("app", words), SCHEMAS["app"])
    found = describe(config)
    config = settled(config, found.model)
    return Desk(config, found, load_model(config, found))


def a_circle(folder: Path) -> list[dict[str, Any]]:
    return [{"flow": "text-to-image", "inputs": ["a red circle"], "height": 32, "width": 32, "steps": 2}]


def test_a_stop_holds_while_the_last_step_is_made(desk: Desk) -> None:
    """The page says "stopped" then too, so nothing may be left of the result."""

    def stop_at_the_end(done: int, steps: int, part: int, parts: int) -> None:
        if done == steps - 1:
            assert desk.stop("a person")

    results = Path(desk.config.output_dir)
    with pytest.raises(StoppedError):
        desk.make("a person", "sample", a_circle, stop_at_the_end)
    assert list(results.glob("*")) == []
    assert not desk.stop("a person")
    assert desk.make("a person", "sample", a_circle, lambda *_: None).images
    assert len(list(results.glob("*"))) == 1


def test_a_stop_holds_for_what_waits_for_its_turn(desk: Desk) -> None:
    """A request waits while the last step of one that was stopped is made, of the same person or of another."""
    before, ends = set(Path(desk.config.output_dir).glob("*")), dict[str, BaseException | None]()
    working, goes_on = threading.Event(), threading.Event()

    def request(name: str, person: str, report: Report) -> threading.Thread:
        def run() -> None:
            try:
                desk.make(person, "sample", a_circle, report)
                ends[name] = None
            except BaseException as error:
                ends[name] = error

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def wait(*_: int) -> None:
        working.set()
        assert goes_on.wait(60)

    first = request("first", "a person", wait)
    assert working.wait(60)
    threads = [first, *(request(name, name, lambda *_: None) for name in ("another", "third"))]
    end = time.monotonic() + 60
    # The request stands in the list before it has its turn.
    while not desk.stop("another"):
        assert time.monotonic() < end
        time.sleep(0.01)
    goes_on.set()
    for thread in threads:
        thread.join(60)
    assert (ends["first"], ends["third"]) == (None, None)
    assert isinstance(ends["another"], StoppedError)
    assert len(set(Path(desk.config.output_dir).glob("*")) - before) == 2


def test_mistakes_on_the_command_line_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            ("gone",): "checkpoint=gone: does not exist",
            ("empty", f"port={port}"): f"port={port}: in use; choose another, or 0 for any that is free",
            ("empty", "port=70000"): "port=70000: must be from 0 to 65535",
            ("empty", "host=nowhere.invalid"): "host=nowhere.invalid: not an address of this machine",
            ("empty", "host=192.0.2.1"): "host=192.0.2.1: not an address of this machine",
            ("empty", "output_dir=file/x"): "output_dir=file/x: ",
        }
        for words, said in cases.items():
            assert main(["app", *words]) == 2, words
            assert one_line(capsys.readouterr().err).startswith(f"error: {said}"), words
    assert main(["app", "empty", "host=0.0.0.0", "port=0"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        "warning: host=0.0.0.0: everyone who can reach this machine can use the page, without a password"
    )
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org")] == [
        *(True, True, True),
        *(False, False, False),
    ]
