"""What surrounds a command: texts that are not UTF-8, numbers that are none. And every remedy names what exists."""

from __future__ import annotations

import ast
import gzip
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from data_pipeline.__main__ import main as data_pipeline_main
from tests.world import DATA, IDS, IMAGES, MAINS, ROOT, SAMPLER, TRAIN, World, one_line, quoted, with_output
from vdtrain.cli import main as vdtrain_main
from vdtrain.config.settings import REMOVED, RENAMED
from vdtrain.weights.imports import SOURCES


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [("blocked urls.txt", bytes, bytes), ("blocked urls.txt.gz", gzip.compress, gzip.decompress)],
    ids=["text", "gzip"],
)
def test_a_list_that_is_not_utf8_is_converted_by_the_command_that_is_named(
    world: World, name: str, write: Callable[[bytes], bytes], read: Callable[[bytes], bytes]
) -> None:
    assert world.type("python", "-m", "miniature", "draw", *DATA, *IMAGES)[0] == 0
    file, text = world / name, "http://café.example/1\n"
    file.write_bytes(write(text.encode("cp1252")))
    words = [*with_output("select", "FOLDER/scratch"), f"data.select.block_lists.url=['FOLDER/{name}']"]
    status, said = world.type(*words)
    assert status == 2
    assert "data.select.block_lists.url: " in said
    assert "is not UTF-8 (byte 0xe9)" in said
    world.type_all(one_line(said))
    assert read(file.read_bytes()).decode() == text
    assert not list(world.folder.glob("*.utf8*"))
    assert world.type(*words)[0] == 0


@pytest.mark.parametrize("content", [b"name: caf\xe9\n", b"name: [tiny\nb: 1\n"], ids=["latin-1", "no YAML"])
def test_a_configuration_of_ones_own_that_cannot_be_read_is_named(world: World, content: bytes) -> None:
    (world / "conf/tracking").mkdir(parents=True)
    own = world / "conf/tracking/own.yaml"
    own.write_bytes(content)
    words = ["vdtrain", "preflight", "stage=stage1_single_flow", *TRAIN, "tracking=own"]
    words.append("hydra.searchpath=[FOLDER/conf]")
    status, said = world.type(*words)
    line = one_line(said)
    assert status == 2
    assert str(own) in line
    if b"\xe9" in content:
        world.type_all(line)
        assert own.read_text(encoding="utf-8") == "name: café\n"
    else:
        assert f"{own}: invalid YAML in line 2; correct that file" in line
    own.write_text((ROOT / "conf/tracking/none.yaml").read_text())
    status, said = world.type(*words)
    assert status == 0, said


def test_records_with_bytes_that_are_no_text_are_passed_over(world: World) -> None:
    run = world / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "restarts.jsonl", "wandb_url"):
        (run / name).write_bytes(b'\xff\xfe\x00{"step"\n')
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_bytes(b"\xff")
    assert world.type("vdtrain", "preflight", "stage=stage1_single_flow", *TRAIN, "run_dir=FOLDER/run")[0] == 0
    status, said = world.type("python", "-m", "vdtrain.run.restarts", str(run))
    assert status == 3
    assert "the trainer has not begun there" in one_line(said)


ENVIRONMENTS = [
    {"RANK": "abc"},
    {"LOCAL_RANK": "-1"},
    {"WORLD_SIZE": "0"},
    {"MASTER_PORT": "29500/tcp"},
    {"SLURM_STEP_ID": "batch"},
    {"SLURM_PROCID": "x"},
    {"SLURM_LOCALID": "²"},
    {"SLURM_NTASKS": "2(x3)"},
    {"SLURM_JOB_ID": "4711_1"},
    {"SLURM_RESTART_COUNT": "x"},
]
VERBS_ON_RANKS = (["vdtrain", "train"], ["vdtrain", "evaluate"], ["python", "-m", "data_pipeline", "latents"])


@pytest.mark.parametrize("variables", ENVIRONMENTS, ids=str)
def test_ids_that_are_no_numbers_are_said_before_work(
    world: World, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, value),) = variables.items()
    for words in VERBS_ON_RANKS:
        monkeypatch.setenv(name, value)
        status, said = world.type(*words, "--cfg", "job")
        line = one_line(said)
        assert status == 2
        assert line.startswith(f"error: launcher: {name}={value}: not a number from ")
        assert quoted(line) == [f"unset {name}"]


def test_without_these_ids_the_commands_run(world: World) -> None:
    """As the remedy of each has it."""
    assert not {name for variables in ENVIRONMENTS for name in variables} & os.environ.keys()
    for words in VERBS_ON_RANKS:
        assert world.type(*words, "--cfg", "job")[0] == 0


def test_a_rank_beyond_the_number_of_processes_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(IDS, ("2", "0", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert "RANK=2: 2 processes count from 0" in one_line(world.type("vdtrain", "train", "--cfg", "job")[1])
    monkeypatch.setenv("RANK", "1")
    assert world.type("vdtrain", "train", "--cfg", "job")[0] == 0


def test_a_requeueing_is_refused_in_a_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "run").write_text("no folder")
    status, said = world.type("python", "-m", "vdtrain.run.restarts", "FOLDER/run")
    assert status == 3
    one_line(said)


def test_a_image_that_is_a_folder_or_text_is_asked_for_as_a_image(world: World) -> None:
    (world / "notes.png").write_text("no image")
    Image.new("RGB", (40, 40)).save(world / "moving.png", "GIF")
    pillow_heif.from_pillow(Image.new("RGB", (40, 40))).save(world / "phone.heic")
    for file, reason in (
        ("moving.png", "moving.png: GIF is not read; give a file of JPEG, PNG, WEBP, AVIF or HEIC"),
        ("model", "model: cannot be read (model is a folder, not a file); give an image file"),
        ("notes.png", "cannot identify"),
        ("none.png", "No such"),
    ):
        status, said = world.type("vdtrain", "edit", *SAMPLER, f"inputs=[{file}]", "add=a")
        assert status == 2
        assert reason in one_line(said)
    for file in ("image.png", "phone.heic"):
        assert world.type("vdtrain", "edit", *SAMPLER, f"inputs=[{file}]", "add=a")[0] == 0
    assert world.type("vdtrain", "sample", *SAMPLER, "phone.heic", "flow=image-to-image")[0] == 0
    assert np.asarray(Image.open(world / "samples/0000.png")).shape == (32, 32, 3)


# --- that what a remedy names exists ---------------------------------------------------------------------------------

# Programs of a remedy, by what tries them.
TRIED = {
    "iconv": "test_a_list_that_is_not_utf8_is_converted_by_the_command_that_is_named",
    "gzip": "test_a_list_that_is_not_utf8_is_converted_by_the_command_that_is_named",
    "mount": "test_each_cause_of_a_folder_that_cannot_be_written_has_its_own_remedy",
    "lsattr": "test_each_cause_of_a_folder_that_cannot_be_written_has_its_own_remedy",
    "chattr": "test_each_cause_of_a_folder_that_cannot_be_written_has_its_own_remedy",
    "df": "test_each_cause_of_a_folder_that_cannot_be_written_has_its_own_remedy",
    "namei": "test_each_cause_of_a_folder_that_cannot_be_written_has_its_own_remedy",
    "ls": "test_a_folder_of_another_user_asks_for_access",
    "ulimit": "test_too_many_open_files_is_no_matter_of_the_index",
    "unset": "test_ids_that_are_no_numbers_are_said_before_work",
    "--master-port": "test_a_port_that_is_taken_is_named_and_another_one_is_the_remedy",
}
# They look, and change nothing; what they look at, a failing disk, cannot be made here.
LOOK = {"dmesg", "sysctl", "fuser"}
# What cannot be tried on a test's machine, and why.
OUTSIDE = {
    "git": "takes a repository with large files",
    "hf": "takes an account of the hub",
    "pip": "takes a package index",
    "srun": "takes a cluster",
    "wandb": "takes a server and an account",
}
# No command: a name in a sentence.
NAMES = {"tokenizers", "output", "${"}
# Values that stand for those that a message fills in, by the words before them.
FILLED = {"import ": "clip", "data=": "shapes", "resolutions=[": "32", "miniature ": "draw"}
GAP = "\0"


def messages() -> Iterator[tuple[str, str]]:
    """Every text in the source that is no documentation: (file and line, text, with a gap where a value comes in)."""

    def text(node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return "".join(text(each) or GAP for each in node.values)
        return None

    for file in sorted([*(ROOT / "vdtrain").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")]):
        if file.name == "model_card.py":  # its texts are a page
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        passed = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        passed |= {each for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for each in node.values}
        for node in ast.walk(tree):
            found = text(node) if isinstance(node, ast.expr) and node not in passed else None
            if found and not found.startswith("Usage: "):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", found


def filled(command: str) -> list[str]:
    for before, value in FILLED.items():
        command = command.replace(before + GAP, before + value)
    return shlex.split(command.replace(GAP, "x"))


def test_every_command_of_a_message_is_one_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    ours = 0
    for place, message in messages():
        for command in quoted(message):
            words = filled(command)
            if words[:2] == ["python", "-m"]:
                assert MAINS[words[2]]([*words[3:], *([] if "--help" in words else ["--cfg", "job"])]) == 0, place
            elif words[:3] == ["vdtrain", "weights", "import"]:
                # Without a source the whole command is meant, whose help lists them.
                assert all(word in SOURCES for word in words[3:4]), place
                assert vdtrain_main(["weights", "--help"]) == 0
            elif words[0] == "vdtrain" and "COMMAND" not in words:
                assert vdtrain_main([*words[1:2], "--help"]) == 0, place
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), place
            else:
                continue
            ours += 1
    assert ours >= 8, capsys.readouterr().err


def test_every_other_program_of_a_message_is_tried_or_there() -> None:
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for place, message in messages():
        # A command that is filled in as a whole is its own tests' to try.
        for program in (filled(command)[0] for command in quoted(message) if command != GAP):
            known = {*TRIED, *LOOK, *OUTSIDE, *NAMES, "python", "vdtrain", "make", "from"}
            assert program in known, f"{place}: {program}"
            if program in TRIED:
                assert f"def {TRIED[program]}(" in tests, program


def test_no_message_names_a_command_without_marking_it() -> None:
    """So that the tests above see it."""
    for place, message in messages():
        bare = re.sub(r"`[^`]*`", "", message)
        if "prog=" not in message and not message.startswith(("python -m vdtrain", "python -m data_pipeline")):
            assert not re.search(r"python -m (?:data_pipeline|vdtrain)", bare.partition("Usage")[0]), place


def test_the_options_of_wandb_that_messages_name_are_ones_that_it_has() -> None:
    for command in {command for _, message in messages() for command in quoted(message) if command[:5] == "wandb"}:
        _, command, *rest = filled(command)
        program = Path(sys.executable).with_name("wandb")
        help_text = subprocess.run([program, command, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(word in help_text for word in rest if word.startswith("--"))


def known_settings(capsys: pytest.CaptureFixture[str]) -> set[str]:
    from omegaconf import OmegaConf

    found: set[str] = set()

    def walk(node: object, path: str) -> None:
        found.add(path)
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))

    for main, words in (
        (vdtrain_main, ["train"]),
        (vdtrain_main, ["evaluate"]),
        (data_pipeline_main, ["latents", "data=shapes"]),
    ):
        capsys.readouterr()
        assert main([*words, "--cfg", "job"]) == 0
        walk(OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out)), "")
    return found


def test_every_setting_that_a_message_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = known_settings(capsys) | RENAMED.keys() | REMOVED.keys()
    groups = "data|stage|hardware|checkpoint|ema|optimizer|objective|tracking|fid|clip"
    pattern = re.compile(rf"(?<![\w/.{GAP}-])((?:{groups})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w(]|\.{GAP})")
    # Tables whose entries are given, and names of files.
    free = re.compile(
        r"data\.sources|data\.stream\.cache|data\.stream\.|clip\.model|.*\.(json|py|pkl)$|stage\.phases|.*\._target_"
    )
    named = {name: place for place, message in messages() for name in pattern.findall(message)}
    assert len(named) > 60
    assert {name: place for name, place in named.items() if name not in known and not free.match(name)} == {}
