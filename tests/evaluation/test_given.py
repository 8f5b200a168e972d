"""`vdtrain evaluate` of images and captions that are in files already: ours, kept, and other people's. 60 seconds."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.evaluation.test_evaluate import FLOWS, PART, SAMPLES, metrics, settings, write_checkpoint
from tests.pairs import write_pairs
from tests.programs import run_ranks
from vdtrain.commands.evaluate import main as evaluate
from vdtrain.flows import all_flows

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a checkpoint, and an evaluation that kept its images."""
    made = tmp_path_factory.mktemp("given")
    write_pairs(made / "data", shards=2, count=12)
    write_checkpoint(made / "model", all_flows(["image", "text"]))
    assert evaluate([*settings(made, "ours"), "keep_images=true"]) == 0
    return made


def given(folder: Path, output: str, *more: str) -> list[str]:
    """Settings without a checkpoint."""
    own = [each for each in settings(folder, output) if not each.startswith(("checkpoint=", "samples=", "steps="))]
    return [*own, "model=tiny", *more]


def flow_of(folder: Path, output: str) -> dict[str, Any]:
    (found,) = metrics(folder, output)["flows"].values()
    return dict(found)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_kept_images_are_measured_as_the_samples_were(folder: Path) -> None:
    """As files, beside the real ones as files, the figures are those of the evaluation that wrote them."""
    ours = metrics(folder, "ours")["flows"]
    kept = folder / "ours" / "images"
    assert sorted(path.name for path in kept.iterdir()) == ["image-to-image", "real", "text-to-image"]
    prompts = [json.loads(line) for line in (kept / "text-to-image" / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == SAMPLES == len(list((kept / "real").glob("*.png")))
    for each in prompts:
        with Image.open(kept / "text-to-image" / each["file_name"]) as image:
            assert image.size == (SIDE, SIDE)
        assert (kept / "text-to-image" / each["real"]).is_file()
    words = given(folder, "text-again", f"images={kept}/text-to-image", f"real_images={kept}/real")
    assert evaluate(words) == 0
    same(flow_of(folder, "text-again"), ours["text-to-image"])
    # The sheet has a row for the real ones.
    with Image.open(folder / "text-again" / "text-to-image.png") as sheet:
        assert sheet.height > 600
    words = given(folder, "image-again", f"images={kept}/image-to-image", "flows=[image-to-image]")
    assert evaluate(words) == 0
    same(flow_of(folder, "image-again"), ours["image-to-image"])
    assert metrics(folder, "image-again")["real_samples"] == SAMPLES


def test_kept_captions_are_measured_as_the_samples_were(folder: Path) -> None:
    ours = metrics(folder, "ours")["flows"]
    assert evaluate(given(folder, "captions", f"captions={folder}/ours/image-to-text.jsonl")) == 0
    same(flow_of(folder, "captions"), ours["image-to-text"])
    # A table of other names for the columns, beside the real images as files and five captions for each.
    rows = [json.loads(line) for line in (folder / "ours" / "image-to-text.jsonl").read_text().splitlines()]
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "text"], *([row["file_name"], row["caption"]] for row in rows[::-1])])
    five = {row["file_name"]: [*["a red circle"] * 4, row["caption"]] for row in rows}
    (folder / "five.json").write_text(json.dumps(five))
    words = [f"captions={folder}/captions.csv", f"real_images={folder}/ours/images/real"]
    assert evaluate(given(folder, "five", *words, f"data.references={folder}/five.json")) == 0
    found = flow_of(folder, "five")
    assert found["bleu"] == pytest.approx(100)
    assert found["clip_score"] == pytest.approx(ours["image-to-text"]["clip_score"], rel=1e-5)


def test_images_of_another_program_with_prompts_of_their_own(folder: Path) -> None:
    """Without partners among the pairs; two processes make what one makes."""
    other = folder / "other"
    (other / "deep").mkdir(parents=True)
    prompts = {}
    for number in range(6):
        name = f"deep/{number}.png" if number % 2 else f"{number}.jpg"
        Image.new("RGB" if number else "L", (SIDE, SIDE), "red" if number else 200).save(other / name)
        prompts[name] = f"a red square, number {number}"
    (folder / "prompts.json").write_text(json.dumps(prompts))
    words = [f"images={other}", f"prompts={folder}/prompts.json"]
    assert evaluate(given(folder, "alone", *words)) == 0
    found = metrics(folder, "alone")
    assert (found["samples"], found["real_samples"]) == (6, 24)
    assert {"clip_distance", "clip_kid", "clip_precision", "clip_recall", "clip_score"} < set(
        found["flows"]["text-to-image"]
    )
    command = ["-m", "vdtrain", "evaluate", *given(folder, "together", *words)]
    ending = run_ranks([command] * 2, [folder / f"{rank}.log" for rank in range(2)], 300)
    assert ending.statuses == [0, 0], ending
    assert metrics(folder, "together")["flows"] == found["flows"]


def test_captions_shared_by_two_processes(folder: Path) -> None:
    words = [f"captions={folder}/ours/image-to-text.jsonl", f"samples={SAMPLES - 1}"]
    assert evaluate(given(folder, "captions-alone", *words)) == 0
    command = ["-m", "vdtrain", "evaluate", *given(folder, "captions-together", *words)]
    ending = run_ranks([command] * 2, [folder / f"captions-{rank}.log" for rank in range(2)], 300)
    assert ending.statuses == [0, 0], ending
    assert metrics(folder, "captions-together")["flows"] == metrics(folder, "captions-alone")["flows"]
    assert {"bleu", "cider", "distinct_1", "distinct_2", "clip_score"} < set(flow_of(folder, "captions-alone"))


def test_images_that_were_lost_are_made_again(folder: Path) -> None:
    shutil.copytree(folder / "ours", folder / "lost")
    kept = folder / "lost" / "images" / "text-to-image"
    names = sorted(path.name for path in kept.glob("*.png"))
    content = {name: (kept / name).read_bytes() for name in names}
    (kept / names[0]).unlink()
    assert evaluate([*settings(folder, "lost"), "keep_images=true"]) == 0
    assert {name: (kept / name).read_bytes() for name in names} == content
    # Parts without images, as an evaluation without keep_images leaves them, get them.
    shutil.rmtree(folder / "lost" / "images")
    again = ["keep_images=true", "flows=[text-to-image]"]
    assert evaluate([*settings(folder, "lost"), *again]) == 0
    assert {name: (kept / name).read_bytes() for name in names} == content
    assert len(list((folder / "lost" / "images" / "real").iterdir())) == SAMPLES


def picture(path: Path, side: int = SIDE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((side, side), 50).convert("RGB").save(path)
    return path


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("missing", "images={top}: 1 of the 4 prompts of prompts={top}/prompts.jsonl have no picture, the first 9.png"),
        ("extra", "images={top}: 1 of the 4 pictures have no prompt in prompts={top}/prompts.jsonl, the first 3.png"),
        ("broken", "images={top}: {top}/1.png: cannot be read (cannot identify image file"),
        ("cut", "images={top}: {top}/1.png: is cut short"),
        ("size", "images={top}: {top}/1.png: is 48 x 48 and not resolution=32"),
        ("one", "images={top}: has 1 pictures; the figures need at least 2"),
        ("few", "samples=9: images={top} has 3 pictures; set samples=3"),
        ("none", "images={top}/nothing: no such folder"),
        ("empty", "images={top}/empty: has no pictures"),
        ("prompts", "prompts=null: {top} has no prompts.jsonl and no texts beside its pictures"),
        ("twice", "prompts={top}/prompts.jsonl: names 0.png twice"),
        ("json", "prompts={top}/prompts.jsonl: line 2 is not JSON"),
        ("columns", "prompts={top}/prompts.jsonl: has no column of a text (file_name, x)"),
        ("blank", "prompts={top}/prompts.jsonl: row 2: has no name or no text"),
        ("both", "captions={top}/prompts.jsonl: images= is given too"),
        ("variation", "images={top}: image-to-image needs the image that each was made from"),
        ("kept", "keep_images: is for a checkpoint's samples"),
        ("names", "captions={top}/prompts.jsonl: has no caption of "),
        ("clip", "clip.weights: null"),
    ],
)
def test_what_is_wrong_is_one_line(
    what: str, line: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top, more = tmp_path / "made", []
    for number in range(3):
        picture(top / f"{number}.png")
    (tmp_path / "made" / "empty").mkdir()
    rows: list[Any] = [{"file_name": f"{number}.png", "prompt": "a red circle"} for number in range(3)]
    if what == "missing":
        rows.append({"file_name": "9.png", "prompt": "a blue star"})
    elif what == "extra":
        picture(top / "3.png")
    elif what == "broken":
        (top / "1.png").write_bytes(b"no image")
    elif what == "cut":
        (top / "1.png").write_bytes((top / "1.png").read_bytes()[:-100])
    elif what == "size":
        picture(top / "1.png", 48)
    elif what == "one":
        rows = rows[:1]
        (top / "1.png").unlink()
        (top / "2.png").unlink()
    elif what == "twice":
        rows.append(rows[0])
    elif what == "columns":
        rows = [{"file_name": "0.png", "x": "a"}]
    elif what == "blank":
        rows[1]["prompt"] = " "
    more = {
        "few": ["samples=9"],
        "none": [f"images={top}/nothing"],
        "empty": [f"images={top}/empty"],
        "both": [f"captions={top}/prompts.jsonl"],
        "variation": ["flows=[image-to-image]"],
        "kept": ["keep_images=true"],
        "names": [f"captions={top}/prompts.jsonl", "images=null"],
        "clip": ["clip.architecture=ViT-B-32-quickgelu"],
    }.get(what, [])
    lines = [json.dumps(row) for row in rows]
    if what == "json":
        lines[1] = "{"
    if what != "prompts":
        (top / "prompts.jsonl").write_text("\n".join(lines))
    assert evaluate(given(folder, "wrong", f"images={top}", *more)) == 2
    errors = [each for each in capsys.readouterr().err.splitlines() if not each.startswith(("warning: ", "takes: "))]
    assert len(errors) == 1
    assert errors[0].startswith("error: " + line.format(top=top)), errors[0]
    assert not (folder / "wrong").exists()


def test_a_damaged_image_inside_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What headers and ends do not tell ends the evaluation when it is read."""
    for number in range(2):
        picture(tmp_path / f"{number}.png").with_suffix(".txt").write_text("a red circle")
    content = bytearray((tmp_path / "1.png").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (tmp_path / "1.png").write_bytes(content)
    assert evaluate(given(folder, "damaged", f"images={tmp_path}")) == 1
    errors = [each for each in capsys.readouterr().err.splitlines() if not each.startswith(("warning: ", "takes: "))]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path}/1.png: ")


@pytest.mark.parametrize("form", ["lines.txt", "tabs.txt", "table.csv", "table.tsv", "list.json", "beside"])
def test_prompts_come_in_many_forms(form: str, folder: Path, tmp_path: Path) -> None:
    from vdtrain.config.command_schema import EvaluateConfig
    from vdtrain.config.compose import compose, to_object
    from vdtrain.evaluation.subjects import GivenImages

    texts = {f"{number}.png": f"caption, with a comma {number}" for number in range(3)}
    for name in texts:
        picture(tmp_path / "made" / name)
    path = tmp_path / form
    if form == "lines.txt":
        path.write_text("\n".join(texts.values()))
    elif form == "tabs.txt":
        path.write_text("\n".join(f"{name}\t{text}" for name, text in texts.items()))
    elif form.startswith("table"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="," if form.endswith("csv") else "\t")
            writer.writerows([["Prompt", "File_Name"], *((text, name[:-4]) for name, text in texts.items())])
    elif form == "list.json":
        path.write_text(json.dumps([{"key": name, "text": text} for name, text in texts.items()]))
    else:
        for name, text in texts.items():
            (tmp_path / "made" / name).with_suffix(".txt").write_text(text + "\n")
    words = [f"images={tmp_path}/made", *([] if form == "beside" else [f"prompts={path}"])]
    config = to_object(compose("evaluate", given(folder, "forms", *words)), EvaluateConfig)
    found = GivenImages(config)
    assert dict(zip(found.names, found.prompts, strict=True)) == texts


def test_every_flow_of_a_checkpoint_against_a_folder(folder: Path) -> None:
    """A folder of real images has no captions, unless a file has them."""
    real = folder / "ours" / "images" / "real"
    words = [f"real_images={real}", "samples=4", f"part_samples={PART}"]
    assert evaluate([*settings(folder, "by-folder"), *words, "flows=[image-to-image]"]) == 0
    assert evaluate([*settings(folder, "by-captions"), *words]) == 2
    names = {path.name: ["a red circle", "a circle"] for path in real.iterdir()}
    (folder / "names.json").write_text(json.dumps(names))
    assert evaluate([*settings(folder, "by-captions"), *words, f"data.references={folder}/names.json"]) == 0
    assert list(metrics(folder, "by-captions")["flows"]) == FLOWS
