"""`vdtrain compare`: samples made by commands, judged by clicks and keys in Chromium, and the result of the votes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser import Page, chromium
from tests.world import SAMPLER, World
from vdtrain.cli import main
from vdtrain.report.comparison import make_comparison

PROMPTS = ["a red circle", "a blue star", "</script><img src=x onerror=\"document.title='taken'\">"]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "chromium") as page:
        yield page


def images(folder: Path, *shades: int, prompts: list[str] | None = None, flow: str = "text-to-image") -> Path:
    """Images of one shade each, with their prompts as an evaluation writes them."""
    folder.mkdir(parents=True)
    for number, shade in enumerate(shades):
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(folder / f"{number:04d}.png")
    texts = enumerate(prompts or [])
    rows = [{"file_name": f"{number:04d}.png", "prompt": text, "flow": flow} for number, text in texts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(file: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def votes_file(path: Path, comparison: str, rater: str, choices: dict[int, str]) -> Path:
    votes = [{"pair": number, "choice": choice} for number, choice in choices.items()]
    content = {"format": "vdtrain votes 1", "comparison": comparison, "rater": rater, "votes": votes}
    path.write_text(json.dumps(content))
    return path


def test_samples_are_compared_from_the_command_to_the_result(
    world: World, page: Page, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sets of images and captions of `vdtrain sample`; the person prefers the left ones, but for one."""
    for name, seed in (("ours", 1), ("theirs", 2)):
        made = [f"output_dir={name}/text-to-image", f"seed={seed}"]
        assert world.type("vdtrain", "sample", *SAMPLER, f"inputs={json.dumps(PROMPTS)}", *made)[0] == 0
        made = [f"output_dir={name}/image-to-text", f"seed={seed}", "flow=image-to-text", "samples_per_input=2"]
        assert world.type("vdtrain", "sample", *SAMPLER, "inputs=[image.png]", *made)[0] == 0
    assert main(["compare", "ours", "theirs"]) == 0
    file = world / "comparison.html"
    assert capsys.readouterr().out.splitlines()[-1] == "comparison.html"
    data = data_of(file)
    assert len(data["pairs"]) == 5
    page.open(file.as_uri())
    assert page.run("document.title") == "Blind comparison"
    # The fifth is judged after a look back, and after the page was closed and opened again.
    page.click("#left")
    page.press("ArrowRight")
    page.press("ArrowDown")
    page.press("Backspace")
    assert "Pair 3 of 5" in page.run("document.body.innerText")
    page.click("#equal")
    page.press("ArrowLeft")

    def goes_on() -> bool:
        # The browser writes what a page stores a moment later.
        page.open(file.as_uri())
        return "Pair 5 of 5" in page.run("document.body.innerText")

    page.until(goes_on)
    page.click("#left")
    assert page.run("!document.getElementById('done').hidden && document.getElementById('progress').value") == 5
    page.click("#download")
    (saved,) = page.until(lambda: list(tmp_path.glob("chromium/votes-*.json")))
    assert (page.problems, page.requests) == ([], [])
    choices = {vote["pair"]: vote["choice"] for vote in json.loads(saved.read_text())["votes"]}
    assert list(choices.values()) == ["left", "right", "equal", "left", "left"]
    assert main(["compare", "ours", "theirs", f"votes=[{saved}]", "output=result.json"]) == 0
    result = json.loads((world / "result.json").read_text())
    pairs = make_comparison(Path("ours"), Path("theirs"), 100, 0).pairs
    answers = [pair.meant(choices[pair.number]) for pair in pairs]
    found = {each["task"]: each for each in result["results"]}
    assert found.keys() == {"text-to-image", "image-to-text", "all"}
    for answer in ("a", "b", "equal"):
        assert found["all"]["shares"][answer]["votes"] == answers.count(answer)
    said = capsys.readouterr().out
    assert "1 rater" in said
    assert "all: no significant preference" in said


def test_the_page_shows_what_was_given_and_tells_nothing_of_the_sides(world: World, page: Page) -> None:
    for name, shades in (("ours", (10, 20, 30)), ("theirs", (110, 120, 130))):
        images(world / name, *shades, prompts=PROMPTS)
    assert main(["compare", "ours", "theirs"]) == 0
    text = (world / "comparison.html").read_text()
    assert not re.search(r"ours|theirs|\.png|swapped", text)
    data = data_of(world / "comparison.html")
    page.open((world / "comparison.html").as_uri())
    sides = []
    pixel = (
        "(async () => {{ const image = document.querySelector('#{} img'); await image.decode();"
        "const canvas = Object.assign(document.createElement('canvas'), {{width: 64, height: 64}}).getContext('2d');"
        "canvas.drawImage(image, 0, 0); return canvas.getImageData(32, 32, 1, 1).data[0]; }})()"
    )
    for pair in data["pairs"]:
        given = page.run("document.getElementById('given').textContent")
        assert given == pair["given"]["text"]
        shades = [page.run(pixel.format(side)) for side in ("left", "right")]
        ours = 10 + 10 * PROMPTS.index(given)
        assert sorted(round(shade / 10) * 10 for shade in shades) == [ours, ours + 100]
        sides.append(shades[0] < shades[1])
        page.press("ArrowLeft")
    assert page.run("document.title") == "Blind comparison"
    assert page.problems == []
    # Of three pairs, one or two have theirs on the left.
    assert 0 < sum(sides) < 3


def test_sides_and_order_are_drawn_by_the_seed_and_half_are_swapped(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(20)]
    ours = images(tmp_path / "ours", *range(20), prompts=prompts)
    # Another order of files: the prompts match them.
    theirs = images(tmp_path / "theirs", *range(119, 99, -1), prompts=prompts[::-1])
    one, same, other = (make_comparison(ours, theirs, 16, seed) for seed in (1, 1, 2))
    assert (one.pairs, one.identity) == (same.pairs, same.identity)
    assert one.identity != other.identity
    assert [pair.a for pair in one.pairs] != [pair.a for pair in other.pairs]
    assert sum(pair.swapped for pair in one.pairs) == 8
    assert [pair.a.given for pair in one.pairs] == [pair.b.given for pair in one.pairs]
    assert {pair.meant("left") for pair in one.pairs if pair.swapped} == {"b"}
    assert {pair.meant("left") for pair in one.pairs if not pair.swapped} == {"a"}
    assert one.unmatched == (0, 0)


def test_several_raters_add_up_and_the_statistics_are_those_of_the_books(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (images(tmp_path / name, *(base + n for n in range(12))) for name, base in (("a", 0), ("b", 100)))
    comparison = make_comparison(ours, theirs, None, 0)
    for_a = {pair.number: "right" if pair.swapped else "left" for pair in comparison.pairs}
    for_b = {pair.number: "left" if pair.swapped else "right" for pair in comparison.pairs}
    anna = {number: for_b[number] if number == 1 else for_a[number] for number in for_a}
    ben = {number: "equal" if number < 4 else for_a[number] for number in range(1, 11)}
    files = [
        votes_file(tmp_path / f"{number}.json", comparison.identity, rater, choices)
        # The first file of Anna was saved on the way.
        for number, (rater, choices) in enumerate((("anna", {1: for_b[1]}), ("anna", anna), ("ben", ben)))
    ]
    words = [str(ours), str(theirs), f"votes=[{','.join(map(str, files))}]", f"output={tmp_path}/result.json"]
    assert main(["compare", *words]) == 0
    assert "samples: A is preferred" in capsys.readouterr().out
    content = json.loads((tmp_path / "result.json").read_text())
    (result,) = content["results"]
    assert (content["raters"], result["votes"]) == (2, 22)
    assert {name: share["votes"] for name, share in result["shares"].items()} == {"a": 18, "b": 1, "equal": 3}
    # Wilson's interval, as its paper has it.
    z, n, p = 1.959963984540054, 22, 18 / 22
    centre, half = (p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert result["shares"]["a"]["low"] == pytest.approx(low, rel=1e-9)
    assert result["shares"]["a"]["high"] == pytest.approx(high, rel=1e-9)
    # Pair 1 has a vote for b and an equal one: eleven pairs for a, one for b.
    assert (result["pairs_a"], result["pairs_b"]) == (11, 1)
    assert result["p_value"] == pytest.approx(2 * (1 + 12) / 2**12, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"comparison": "another"}, "is of another comparison; give the folders in the order, and pairs and seed with "
         "the values, that its page was made with"),
        ({"format": "x"}, "holds no votes; give a file that the page of vdtrain compare saved"),
        ({"votes": [{"pair": 1}]}, "holds no votes; give a file that the page of vdtrain compare saved"),
        ({"votes": [{"pair": 99, "choice": "left"}]}, "holds a vote on no pair of this comparison; download it again"),
        ({"votes": [{"pair": 1, "choice": "top"}]}, "holds a vote on no pair of this comparison; download it again"),
        ({"votes": None}, "holds no votes; give a file that the page of vdtrain compare saved"),
    ],
)  # fmt: skip
def test_foreign_votes_are_one_line(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (images(tmp_path / name, *shades) for name, shades in (("a", (1, 2)), ("b", (3, 4))))
    path = votes_file(tmp_path / "votes.json", make_comparison(ours, theirs, 100, 0).identity, "anna", {1: "left"})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["compare", str(ours), str(theirs), f"votes=[{path}]"]) == 2
    assert capsys.readouterr().err == f"error: votes={path}: {said}\n"


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("a"), 1, 2, prompts=["one", "two"])
    images(Path("b"), 3, prompts=["three"])
    images(Path("broken"), 3, prompts=["one"])
    Path("broken/0000.png").write_bytes(b"no image")
    Path("empty").mkdir()
    images(Path("odd"), 1)
    Path("odd/prompts.jsonl").write_text("{")
    cases = {
        ("a", "gone"): "b=gone: cannot be read (",
        ("a", "empty"): "b=empty: holds neither images nor captions.txt; give a folder that vdtrain sample wrote",
        ("a", "b"): "b=b: no sample has task and input of one in a=a; compare samples from the same inputs",
        ("a", "broken"): "broken/0000.png: is no image that can be read; make it again, or remove it",
        ("a", "odd"): "b=odd: ",
        ("a",): "b: not given; write vdtrain compare A B",
        ("a", "a", "votes=[gone.json]"): "votes=gone.json: cannot be read (",
        ("a", "a", "output=a/0000.png/x.html"): "output=a/0000.png/x.html: cannot be written (",
    }
    for words, said in cases.items():
        assert main(["compare", *words]) == 2, words
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"error: {said}"), lines
    assert main(["compare", "a", "a", "pairs=1"]) == 0
    assert len(data_of(Path("comparison.html"))["pairs"]) == 1


def test_an_evaluation_is_compared_with_the_images_of_a_rival(tmp_path: Path) -> None:
    """As `vdtrain evaluate` keeps images and captions, and as examples/evaluate_stable_diffusion.py writes images."""
    ours, rival = tmp_path / "ours", tmp_path / "rival"
    for flow in ("text-to-image", "image-to-image"):
        images(ours / "images" / flow, 1, 2, prompts=PROMPTS[:2], flow=flow)
    images(ours / "images" / "real", 3, 4)
    rows = [{"file_name": f"{number:04d}.png", "caption": "a star"} for number in range(2)]
    (ours / "image-to-text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ours / "image-to-text.txt").write_text("a star\na star\n")
    Image.new("RGB", (8, 8)).save(ours / "text-to-image.png")
    images(rival / "images", 5, 6, prompts=PROMPTS[1::-1])
    lines = [json.loads(line) for line in (rival / "images/prompts.jsonl").read_text().splitlines()]
    bare = [{name: line[name] for name in ("file_name", "prompt")} for line in lines]
    (rival / "images/prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    comparison = make_comparison(ours, rival, None, 0)
    assert {(pair.task, pair.a.name, pair.b.name) for pair in comparison.pairs} == {
        ("text-to-image", "0000", "0001"),
        ("text-to-image", "0001", "0000"),
    }
    assert comparison.unmatched == (4, 0)
    captions = [pair for pair in make_comparison(ours, ours, None, 0).pairs if pair.task == "image-to-text"]
    assert [pair.a.source for pair in sorted(captions, key=lambda pair: pair.a.name)] == [
        (ours / f"images/real/{number:04d}.png").resolve() for number in range(2)
    ]


def test_an_image_outside_the_folder_is_not_shown(tmp_path: Path) -> None:
    """A list of names may be a stranger's, and the page goes to others."""
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for name in ("a", "b"):
        folder = images(tmp_path / name / "image-to-image", 1, prompts=["x"], flow="image-to-image")
        row = {"file_name": "0000.png", "real": "../../private.png", "flow": "image-to-image"}
        (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    assert make_comparison(tmp_path / "a", tmp_path / "b", None, 0).pairs[0].a.source is None
    Image.new("RGB", (8, 8)).save(tmp_path / "a/real.png")
    row["real"] = "../real.png"
    (tmp_path / "a/image-to-image/prompts.jsonl").write_text(json.dumps(row) + "\n")
    (pair,) = (each for each in make_comparison(tmp_path / "a", tmp_path / "b", None, 0).pairs if each.task)
    assert pair.shown(tmp_path)["given"]["image"].startswith("data:image/webp")
