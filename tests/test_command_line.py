"""Prompts and paths as people type them, to the command that reads them; and every mistake in one line of our own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from data_pipeline.__main__ import main as data_pipeline
from miniature.__main__ import main as miniature
from tests import programs
from tests.pairs import write_pairs
from tests.weights.small import weights
from vdtrain.cli import COMMANDS, main
from vdtrain.config.command_line import plain_path, shell
from vdtrain.config.compose import SCHEMAS, compose, groups
from vdtrain.config.fields import Mark, keys, look_up
from vdtrain.config.overrides import (
    QUOTED,
    escaped,
    unquoted,
    word_for,
)
from vdtrain.errors import printable
from vdtrain.weights.folder import open_weights_folder, write_weights_folder

ROOT = Path(__file__).parents[1]
PROMPTS = [
    "a red circle, on white",
    "it's",
    'a "red" circle',
    "'",
    '"',
    '"it\'s" (a circle)',
    "a = b",
    "E=mc2",
    "$5",
    "${x}",
    "${",
    "\\${seed} and \\\\${",
    "$(date) `date`",
    "[a, b",
    "[art] a circle [hd]",
    "a] [b",
    "{a: b}",
    "{",
    "a: b, c:d",
    "C:\\images\\new",
    "ends with \\",
    "  spaces  before and after  ",
    "-5 degrees",
    "#1!",
    "!!",
    "* ? ~ | & ; < > %",
    "~",
    "~root is no folder",
    "+1 circle",
    "a\ncircle\tof two lines",
    "",
    "1984",
    "1e3",
    "true",
    "null",
    "nan",
    "ein Kreis, 一个红色的圆, دائرة حمراء",
    "🔴 on ⬜",
    "choice(a,b)",
    "job",
    "a/b=c",
]
# Those that a person may mean as a setting or a flag.
BEHIND_THE_DASHES = ["seed=3", "sede=3", "--help", "-v", "--", "inputs=[a]", "~start_from"]
SMALL = ["resolution=16", "steps=1", "guidance_scale=1", "batch_size=64"]
RAW = re.compile(
    r"LexerNoViableAlt|mismatched|no viable|extraneous|token recognition|missing EQUAL|full_key|object_type|in struct|"
    r"Traceback|hydra\.cc|Hydra|OmegaConf|ConfigAttributeError|ValidationError|NoneType|ListConfig|DictConfig|Sweep|"
    r"Interpolation|<class|could not be converted|subclass|Could not|HYDRA_FULL_ERROR"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of the tiny model, under a name that needs quotes everywhere."""
    folder = tmp_path_factory.mktemp("my models") / "lr=1e-4, it's $5 (é)"
    write_weights_folder(folder, weights(), compose_model())
    return folder


def compose_model():
    from vdtrain.config.command_schema import WeightsConfig
    from vdtrain.config.compose import to_object

    return to_object(compose("weights", ["model=tiny"]), WeightsConfig).model


def made_with(folder: Path) -> dict[str, object]:
    """The settings that an image there keeps."""
    with Image.open(folder / "0000.png") as image:
        return json.loads(image.text["vdtrain"])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command line gets."""
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert not RAW.search(shown.err), shown.err
    return shown.err


def printed(capsys: pytest.CaptureFixture[str], command: str, *words: str) -> dict[str, object]:
    """The configuration that a command line composes, as `--cfg job --resolve` prints it."""
    assert main([command, "--cfg", "job", "--resolve", *words]) == 0, capsys.readouterr().err
    container = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(container, dict)
    return container


def test_prompts_are_plain_arguments_and_kept_to_the_letter(model: Path, tmp_path: Path) -> None:
    out = f"output_dir={tmp_path}/made, [here]"
    assert main(["sample", str(model), *PROMPTS, out, *SMALL, "--", *BEHIND_THE_DASHES]) == 0
    made = made_with(tmp_path / "made, [here]")
    assert made["inputs"] == [*PROMPTS, *BEHIND_THE_DASHES]
    assert made["checkpoint"] == model.name
    assert len(list((tmp_path / "made, [here]").glob("*.png"))) == len(PROMPTS) + len(BEHIND_THE_DASHES)


def test_as_typed_into_bash(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first in a process of its own, the others as bash splits them."""
    here, small = shlex.quote(model.name), " ".join(SMALL)
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs.folder()}:{os.environ['PATH']}")
    line = f"vdtrain sample {here} \"a red circle, on white\" 'it is $5' output_dir=~/made {small}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert made_with(tmp_path / "made")["inputs"] == ["a red circle, on white", "it is $5"]
    for line in (
        f"vdtrain sample ./{here} inputs=a\\ red\\ circle output_dir=one {small}",
        f"vdtrain edit ./{here} one/0000.png remove=it\\'s add='a circle, red' output_dir=edit {small}",
        f"vdtrain blend ./{here} 'text:a \"round\", thing: ${{x}}' image:~/made/0001.png output_dir=blend {small}",
        f"vdtrain blend checkpoint={here} contexts='[{{text: \"a, ${{x}}\", weight: 2}}]' output_dir=table {small}",
        f'vdtrain blend ./{here} "contexts=[{{text: it\'s (red), weight: 2}}]" output_dir=plain {small}',
    ):
        assert main(bash_words(line)[1:]) == 0
    assert made_with(Path("one"))["inputs"] == ["a red circle"]
    edited = made_with(Path("edit"))
    assert (edited["inputs"], edited["remove"], edited["add"]) == (["one/0000.png"], "it's", "a circle, red")
    contexts = made_with(Path("blend"))["contexts"]
    assert contexts == [{"text": 'a "round", thing: ${x}'}, {"image": "~/made/0001.png"}]
    assert made_with(Path("table"))["contexts"] == [{"text": "a, ${x}", "weight": 2}]
    assert made_with(Path("plain"))["contexts"] == [{"text": "it's (red)", "weight": 2}]


def bash_words(line: str) -> list[str]:
    """The words of a command line as bash reads it."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, timeout=60)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt_as_a_setting(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole value in quotes is the one thing that has a meaning of its own, and that text goes into quotes itself."""
    expected = prompt
    assert printed(capsys, "sample", f"inputs={prompt}")["inputs"] == [expected]
    edit = printed(capsys, "edit", f"add={prompt}", f"remove={prompt}")
    assert (edit["add"], edit["remove"]) == (expected, expected)


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ('["a red circle, on white","b"]', ["a red circle, on white", "b"]),
        ("['it''s']", None),
        ("[a red circle, a blue star]", ["a red circle", "a blue star"]),
        ("[it's red, a dog]", ["it's red", "a dog"]),
        ("['it\\'s', \"\"]", ["it's", ""]),
        ("[my (1).png, b=3.png, C:\\x]", ["my (1).png", "b=3.png", "C:\\x"]),
        ("[1984, true, null, 1e-3]", ["1984", "true", "null", "1e-3"]),
        ("[a\\, b, c,]", ["a, b", "c"]),
        ("[ ]", []),
        ('"a red circle"', ["a red circle"]),
        ("'it\\'s'", ["it's"]),
        ("[a, [b]]", None),
        ("[a] [b]", None),
        ("[,]", None),
        ("", [""]),
    ],
)
def test_a_list_of_texts_is_a_list_or_else_one_text(
    value: str, items: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(capsys, "sample", f"inputs={value}")["inputs"] == ([value] if items is None else items)


def test_what_hydra_takes_is_still_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "stage=stage2_dual_flow",
        "stage=stage3_four_flow",
        "model=tiny",
        "data=shapes",
        "hardware=cpu",
        "seed=1",
        "seed=2",
        "++seed=3",
        "run_dir=${runs_dir}/x${oc.env:VDTRAIN_TEST_SUFFIX,-y}",
        "runs_dir='my runs'",
        "stage.init_from=null",
        "stage.phases=[{resolution:32,samples:64},{resolution:64,samples:${seed}}]",
        "stage.phases.0.samples=5",
        "hardware.micro_batch_size={32:4}",
        "+hardware.micro_batch_size.48=2",
        "~data.stream.cache",
        "+objective.flow_weights.image-to-image=2",
        "stage={learning_rate: 0.5}",
        "ema.enabled=no",
        "model.modalities.image.vae.weights=null",
        "++data.stream.cache={folder: ~/x, gigabytes: 3}",
        "data.stream.shard_root=https://example.org/a=b?c=d,e",
        "stage.flows=[image-to-image]",
        "hydra.run.dir=elsewhere",
        f"hydra.searchpath=[{ROOT}/tests/third_modality/conf]",
    ]
    config = printed(capsys, "train", *words)
    assert (config["seed"], config["runs_dir"], config["run_dir"]) == (3, "my runs", "my runs/x-y")
    stage = config["stage"]
    assert (stage["name"], stage["init_from"], stage["learning_rate"]) == ("stage3_four_flow", None, 0.5)
    assert stage["phases"] == [{"resolution": 32, "samples": 5}, {"resolution": 64, "samples": 3}]
    assert stage["flows"] == ["image-to-image"]
    assert {32: 4, 48: 2}.items() <= config["hardware"]["micro_batch_size"].items()
    assert config["data"]["stream"]["cache"] == {"folder": os.path.expanduser("~/x"), "gigabytes": 3}
    assert config["data"]["stream"]["shard_root"] == "https://example.org/a=b?..."
    assert config["ema"]["enabled"] is False
    assert config["model"]["modalities"]["image"]["vae"]["weights"] is None


MISTAKES = [
    ("train", "seed=abc", "seed=abc: must be an integer"),
    ("train", "seed=1.5", "must be an integer"),
    ("train", "seed=1,2", "must be an integer"),
    ("train", "seed=range(1,3)", "must be an integer"),
    ("train", "seed=", "must be an integer"),
    ("train", "seed=null", "must be an integer"),
    ("train", "seed=99999999999999999999", "too large"),
    ("train", "seed=" + "9" * 5000, "must be an integer"),
    ("train", "seed=???", "stands for a missing value"),
    ("train", "stage.learning_rate=fast", "must be a number"),
    ("train", "ema.decay=nan", "must be a finite number"),
    ("train", "ema.enabled=maybe", "must be true or false"),
    ("train", "watchdog_seconds=soon", "must be a number, or null"),
    ("train", "ema=3", "must be a table {enabled: ..., length: ..., decay: ...}"),
    (
        "train",
        "stage.phases=[{resolution:",
        "must be a list [...], each entry a table {resolution: ..., samples: ...}",
    ),
    ("train", "stage.phases=[{resolution:abc,samples:1}]", "must be"),
    ("train", "stage.phases=" + "[" * 2000, "must be a list"),
    ("train", "stage.phases=[1]", "must be a table {resolution: ..., samples: ...}"),
    ("train", "stage.phases.7.samples=3", "stage.phases has no '7', only 0, 1"),
    ("train", "stage.phases.x.samples=3", "no such setting"),
    ("train", "hardware.micro_batch_size={a: 1}", "must be a table"),
    ("train", "hardware.micro_batch_size.99=1", "has no '99', only 256, 512; write + before it to add an entry"),
    ("train", "objective.flow_weights.x=1", "write + before it to add an entry"),
    ("train", "stage=stage4", "stage=stage4: no such option; choose from finetune_four_flow, stage1_single_flow"),
    ("train", "stage=", "stage=: no such option"),
    ("train", "stage=stage1_single_flow,stage2_dual_flow", "no such option"),
    ("train", "stage=[stage1_single_flow]", "no such option"),
    ("train", "stage=it's", "no such option"),
    ("train", "tracking=null", "no such option; choose from none, offline, tensorboard, wandb"),
    ("train", "model=${x}", "no such option"),
    ("train", "+stage=stage2_dual_flow", "write stage=OPTION"),
    ("train", "~tracking", "write tracking=OPTION"),
    ("train", "tracking@x=none", "no such setting"),
    ("train", "~seed", "this setting cannot be removed"),
    ("train", "~nope", "nope: no such setting"),
    ("train", "~data.stream.nope", "no such entry to remove"),
    ("train", "~data.stream.lanes=3", "its value is 64; leave out the value to remove it"),
    ("train", "+seed=1", "seed exists already; leave out the +"),
    ("train", "+ema.dcay=1", "did you mean 'ema.decay'"),
    ("train", "learning_rate=1", "did you mean 'stage.learning_rate'"),
    ("train", "stage3_four_flow", "did you mean stage=stage3_four_flow"),
    ("train", "stage3_fourflow", "did you mean stage=stage3_four_flow"),
    ("train", "--learning-rate=1", "write stage.learning_rate=1"),
    ("train", "lr=1", "did you mean 'stage.learning_rate'?"),
    ("train", "batch_size=8", "did you mean 'stage.global_batch_size'?"),
    ("train", "min_side=8", "did you mean 'data.stream.min_side'?"),
    ("train", "data.manifst=x", "did you mean 'data.manifest'?"),
    ("train", "validation_share=0.1", "did you mean 'data.validation.share'?"),
    ("train", "lora_rank=8", "did you mean 'lora.rank'?"),
    ("train", "vae.weight=x", "'model.modalities.image.vae.weights'?"),
    ("train", "stge=stage1_single_flow", "did you mean 'stage'?"),
    ("train", "hardware=h10", "choose from a100_40gb, a100_80gb, b200, cpu, h100, h200, l40s; did you mean h100?"),
    ("train", "hardware.precision=bfloat16", "choose from bf16, fp32; did you mean bf16?"),
    ("train", "stage.flows=[text-to-imag]", "has image, text; did you mean image?"),
    ("plan", "checkpointing=blocks", "did you mean 'hardware.activation_checkpointing'?"),
    ("bench", "zero_stge=1", "did you mean 'hardware.zero_stage'?"),
    ("preflight", "wandb=none", "did you mean 'tracking'?"),
    ("evaluate", "manifest=x", "did you mean 'data.manifest'?; put a plain"),
    ("report", "megabytes=3", "did you mean 'image_megabytes'?"),
    ("compare", "vote=x", "did you mean 'votes'?"),
    ("sample", "num_inference_steps=3", "did you mean 'steps'?"),
    ("sample", "device=gpu", "did you mean cuda?"),
    ("sample", "solver=dim", "choose from ddim, dpm-solver++, unipc; did you mean ddim?"),
    ("data", "indx", "did you mean index?"),
    ("train", "a b=1", "write settings as SETTING=VALUE"),
    ("train", "=x", "write settings as SETTING=VALUE"),
    ("train", "", "write settings as SETTING=VALUE"),
    ("train", "seed", "has no value"),
    ("train", "--seed=3", "write seed=3"),
    ("train", "--fast", "unknown flag --fast: write settings as"),
    # Flags of Hydra, Lightning, accelerate and diffusers.
    ("train", "--multirun", "a command makes one run; type it once for each value"),
    ("train", "-m", "unknown flag -m: a command makes one run"),
    ("train", "--config-name=mine", "add a folder of options with hydra.searchpath=[FOLDER]"),
    ("train", "--resolve", "--resolve: goes with --cfg job"),
    ("train", "--learning-rate=1e-5", "write stage.learning_rate=1e-5\n"),
    ("train", "--run-dir=runs/a-b", "write run_dir=runs/a-b\n"),
    ("train", "--num_processes=8", "write gpus=VALUE"),
    ("train", "--max_train_steps=1000", "write stage.samples_scale=VALUE"),
    ("train", "trainer.max_epochs=10", "did you mean 'stage.phases'?"),
    ("train", "optimizer.lr=1e-4", "did you mean 'stage.learning_rate'?"),
    ("train", "hardware=a100", "did you mean a100_40gb or a100_80gb?"),
    ("train", "stage=conf/stage/stage1_single_flow.yaml", "stage=conf/stage/stage1_single_flow.yaml: no such option"),
    ("train", "stage.phases[0].samples=4", "write stage.phases.0.samples=4"),
    ("train", "hardware.micro_batch_size[512]=4", "write hardware.micro_batch_size.512=4"),
    ("train", "stage.phases=[{resolution: 256, sample: 1}]", "no such setting 'sample', only resolution, samples; did"),
    ("train", "model.modalities={image: {foo: 1}}", "no such setting 'foo', only data_layers, context_layers, vae"),
    ("train", 'hardware.micro_batch_size={"512": 4}', "4}: must be a table whose names are integers, without quotes"),
    ("train", "hardware.micro_batch_size={48: 2}", "no such entry, only 256, 512; write + before it"),
    ("train", "--cfg=hydra", "write --cfg job"),
    ("train", "run_dir=", "run_dir=: empty; give a file or folder"),
    ("train", "run_dir=''", "empty"),
    ("train", "run_dir= ", "empty"),
    ("train", "runs_dir=", "runs_dir=: empty"),
    ("train", "data.root=", "data.root=: empty"),
    ("train", "run_dir=" + "x" * 300, "too long"),
    ("train", "run_dir=~nosuchuser/x", "no such user 'nosuchuser'; write ./~nosuchuser"),
    ("train", "run_dir=${x}", "run_dir=${x}: its ${...} names no setting"),
    ("train", "run_dir=a${b", "run_dir=a${b: not a valid reference"),
    ("train", "run_dir=${foo:1}", "names no setting"),
    ("train", "run_dir=${run_dir}/x", "run_dir"),
    ("train", "stage.flows=${runs_dir}", "must be a list"),
    ("train", "hydra.searchpath=[nowhere]", "hydra.searchpath=nowhere: no such folder"),
    ("train", "hydra.nope=[", "below hydra, only hydra.searchpath can be set"),
    ("train", "hardware=nan", "hardware=nan: no such option"),
    ("train", "data.shapes.port=1", "data.shapes is null; set the whole table"),
    ("train", "+data.shapes.port=1", "data.shapes is null; set the whole table"),
    ("sample", "checkpoint=a red circle", "checkpoint=a red circle: does not exist; give a run"),
    ("sample", "sede=3", "did you mean 'seed'?; put a plain argument with = in it last, after --"),
    ("sample", "hardware=h100", "hardware: no such setting"),
    ("sample", "-v", "put a plain argument that begins with - last, after --"),
    ("sample", "output_dir=", "output_dir=: empty"),
    ("sample", "flow=a\nb", "does not exist"),
    ("sample", "inputs=???", "stands for a missing value"),
    ("blend", "contexts=[{text: 'red}]", "put the texts in quotes"),
    ("blend", "contexts=a red circle", "must be a list"),
    ("edit", "text_share=", "must be a number"),
    ("status", "run_dir=", "empty"),
    ("evaluate", "samples=many", "must be an integer"),
    ("weights", "overwrite=perhaps", "choose import, export or push"),
    ("plan", "gpus=eight", "gpus=eight: must be an integer"),
    ("preflight", "ranks=-", "must be an integer, or null"),
]


@pytest.mark.parametrize(("command", "word", "expected"), MISTAKES)
def test_a_mistake_is_one_line(command: str, word: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refusal(capsys, command, word)


def test_mistakes_of_several_words(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (("sample", str(model), "a", "inputs=b"), "inputs: given as plain arguments and as inputs="),
        (("data", "select", "filters.min_side=3"), "did you mean 'data.select.filters.side_min'?"),
        (("data", "latents", "micro_batch=3"), "did you mean 'hardware.micro_batch_size'?"),
        (("weights", "import", "clp", "x"), "no such source; choose from"),
        (("weights", "import", "clp", "x"), "; did you mean clip?"),
        (("train", "--cfg", "all"), "--cfg all: write --cfg job"),
        (("sample", "--cfg", "hydra"), "--cfg hydra: write --cfg job"),
        (("sample", "a red circle"), "checkpoint=a red circle: does not exist; give a run"),
        (("sample", "x" * 5000), "too long"),
        (("sample", ""), "checkpoint=: empty"),
        (("sample", str(model), "???"), "stands for a missing value"),
        (("sample", str(model), "a\udcff"), "a\\udcff: not UTF-8"),
        (("status", "a", "b"), "'b': too many plain arguments; write RUN_DIR, then SETTING=VALUE"),
        (("evaluate", str(model), "b"), "write CHECKPOINT, then SETTING=VALUE"),
        (("weights", "export", "safetensors", "a", str(model), "b"), "too many plain arguments"),
        (("blend", str(model), "a red circle"), "write text:a red circle or image:a red circle"),
    ):
        assert expected in refusal(capsys, *words)
    assert data_pipeline(["index", "stage3"]) == 2
    assert "write settings as" in capsys.readouterr().err


def test_mistakes_in_a_users_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my conf, é=1"
    (folder / "tracking").mkdir(parents=True)
    for content, expected in (
        (b"mode: [", "mine.yaml: invalid YAML in line 1"),
        (b"mode: \xff", "mine"),
        (b"mdoe: online", "mdoe: no such setting; did you mean"),
        (b"mode: [1]", "tracking/mine.yaml: "),
        (b"- a", "tracking/mine.yaml: "),
        (
            b"name: ${nope}\nmode: offline\nproject: x\nentity: null",
            "tracking.name=${nope}: its ${...} names no setting",
        ),
    ):
        (folder / "tracking" / "mine.yaml").write_bytes(content)
        assert expected in refusal(capsys, "train", f"hydra.searchpath={folder}", "tracking=mine")


KEYS = [
    "seed",
    "inputs",
    "checkpoint",
    "focus",
    "join",
    "sede",
    "hydra.searchpath",
    "hydra.x",
    "stage",
    "data.manifest",
]
SIGNS = "' \" [ ] { } ( ) , = : $ ${ ${x} ${seed} \\ ~ + - -- # @ ! null true 1 1e400 nan ??? a é 🔴 seed range("
PIECES = st.sampled_from([*SIGNS.split(), " ", "\n", "\x1b[31m", "\x00"])
TEXTS = st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=12))


@pytest.mark.parametrize("tries", [25, pytest.param(150, marks=pytest.mark.slow)])
def test_whatever_is_typed_no_text_of_hydras_is_shown(tries: int) -> None:
    key = st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), st.sampled_from(KEYS), st.just("="), TEXTS)
    words = st.lists(st.one_of(key.map("".join), TEXTS), max_size=3)
    commands = st.sampled_from(["sample", "status", "blend", "edit"])
    settings(max_examples=tries, deadline=None)(given(words, commands)(no_text_of_hydras_is_shown))()


def no_text_of_hydras_is_shown(words: list[str], command: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([command, "--cfg", "job", "--resolve", *words])
    if status == 0:
        assert err.getvalue() == ""
    else:
        assert status == 2
        assert err.getvalue().startswith("error: ")
        assert err.getvalue().count("\n") == 1
        assert err.getvalue()[:-1].isprintable()
        assert not RAW.search(re.sub(re.escape(printable(" ".join(words))), "", err.getvalue())), err.getvalue()


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_quoting_is_undone_as_hydra_does_it(text: str) -> None:
    word = word_for("run_dir", text)
    value = word.partition("=")[2]
    read = unquoted(value) if QUOTED.fullmatch(value) else value
    if read != text and "${" not in text:
        assert read == f"./{text}"
    config = OmegaConf.create({"path": read, "x": 1, "seed": 2})
    if read != "???":
        assert config.path in (text, f"./{text}")
    config = OmegaConf.create({"prompt": escaped(text)})
    if text != "???":
        assert config.prompt == text
    if QUOTED.fullmatch(text):
        assert OverridesParser.create().parse_override(f"key={text}").value() == unquoted(text)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), max_size=40))
@settings(max_examples=20, deadline=None)
def test_bash_gives_the_words_back(words: list[str]) -> None:
    """And in an interactive shell none of them begins a search in its history."""
    words = [*PROMPTS, *words]
    line = shell(words)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().split("\0")[:-1] == words


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_tilde_is_the_home_folder_in_every_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    schema = SCHEMAS[name]
    paths = [key for key in keys(schema) if (found := look_up(schema, key)).mark is Mark.PATH and found.is_text]
    choices = [word for word in ("data=shapes", "model=tiny") if word.partition("=")[0] in keys(schema)]
    config = compose(name, [*choices, *(f"{key}=~/{key} a=1" for key in paths)])
    for key in paths:
        assert OmegaConf.select(config, key) == f"{tmp_path}/{key} a=1"
    if "model" in keys(schema):
        part = "model.modalities.image.vae.weights"
        assert OmegaConf.select(compose(name, ["model=tiny", f"{part}=~/epoch=3-step=1000.ckpt"]), part) == (
            f"{tmp_path}/epoch=3-step=1000.ckpt"
        )


def test_weights_under_names_as_lightning_gives_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["weights", "export", "versatile_diffusion", "./epoch=3-step=1000.ckpt", str(model)]) == 0
    assert (
        main(["weights", "import", "versatile_diffusion", "epoch=3-step=1000.ckpt", "output=~/a, b", "model=tiny"]) == 0
    )
    assert open_weights_folder(tmp_path / "a, b").keys() == weights().keys()
    assert main(["weights", "export", "safetensors", "~/c", "checkpoint=a, b"]) == 0
    assert open_weights_folder(tmp_path / "c").keys() == weights().keys()
    capsys.readouterr()
    # The remedy, pasted.
    line = refusal(capsys, "sample", "checkpoint=epoch=3-step=1000.ckpt")
    command = re.search(r"`vdtrain (weights import \w+ .*?)`", line)
    assert command is not None
    assert shlex.split(command[1])[3] in ("epoch=3-step=1000.ckpt", "./epoch=3-step=1000.ckpt")
    assert "after --" in refusal(capsys, "weights", "import", "versatile_diffusion", "epoch=4-step=1000.ckpt")


def test_images_under_names_as_people_give_them(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["it's a (red), circle.png", "a=1.png", "[b].png", "#2 $x ${y}.png"]
    for name in names:
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    words = ["flow=image-to-text", f"output_dir={tmp_path}/out", *SMALL]
    assert main(["sample", str(model), *(str(tmp_path / name) for name in names), f"~/{names[0]}", *words]) == 0
    assert len((tmp_path / "out" / "captions.txt").read_text().splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(model), *names, *words]) == 0
    assert main(["sample", str(model), "a red circle", f"start_from={names[0]}", "fidelity=0.5", *SMALL]) == 0


def test_help_tells_the_plain_form(capsys: pytest.CaptureFixture[str]) -> None:
    for command, form in (
        ("sample", "vdtrain sample CHECKPOINT INPUT ..."),
        ("blend", "vdtrain blend CHECKPOINT MODALITY:INPUT ..."),
        ("edit", "vdtrain edit CHECKPOINT IMAGE ..."),
        ("evaluate", "vdtrain evaluate CHECKPOINT"),
        ("status", "vdtrain status [RUN_DIR]"),
        ("report", "vdtrain report [RUN_DIR ...]"),
        ("compare", "vdtrain compare A B"),
        ("weights", "vdtrain weights export FORMAT OUTPUT [CHECKPOINT]"),
    ):
        assert main([command, "anything", "--help"]) == 0
        assert form in capsys.readouterr().out
    for command in COMMANDS:
        assert main([command, "-h"]) == 0
        shown = capsys.readouterr().out
        assert all(
            f"\n  {group.replace('/', '.')}=" in shown
            for group in groups()
            if command in ("train", "plan", "preflight") and "_" not in group
        )


def test_help_lists_the_settings_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its default, its meaning and its limits; a command on data shows its own part alone."""
    for words, lines in (
        (["train"], ["stage.learning_rate=0.0001", "hardware.zero_stage=1", "[0, 1, 2]", "checkpoint.keep=3"]),
        (["train", "hardware=cpu"], ["hardware.threads=1 ", "CPU threads of each process"]),
        (["plan"], ["gpus=8", "format=table", "[table, json]"]),
        (["preflight"], ["ranks=null"]),
        (["status"], ["watch=null", "null prints once [above 0]"]),
        (["report"], ["image_megabytes=16", "[above 0]"]),
        (["compare"], ["pairs=100", "null for all [at least"]),
        (["sample"], ["solver=ddim", "[ddim, dpm-solver++, unipc]", "focus=0.5"]),
        (["weights"], ["overwrite=false", "[fp32, fp16, bf16, keep]"]),
        (["data", "select"], ["data.select.filters.nsfw_max=0.3", "data.sources.NAME.metadata"]),
        (["data", "download"], ["data.download.threads=64"]),
        (["data", "index"], ["data.index.decode=false"]),
        (["data", "latents"], ["data.latent_cache.batch_size=64", "hardware.precision=bf16"]),
        (["data", "inspect"], ["data.inspect.images=48"]),
    ):
        assert main([*words, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(line in shown for line in lines), words
        parts = set(re.findall(r"^  data\.(select|download|index|inspect|shapes)\.", shown, re.MULTILINE))
        assert parts == ({words[1]} if words[1:] and words[1] != "latents" and words[0] == "data" else set()), words
    assert miniature(["draw", "--help"]) == 0
    assert "data.shapes.images=6000" in capsys.readouterr().out


def test_help_needs_no_heavy_library() -> None:
    script = (
        "import sys; from vdtrain.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'diffusers', 'wandb'} & set(sys.modules)))"
    )
    for words in (
        ["--help"],
        ["train", "--help"],
        ["data", "--help"],
        ["data", "index", "--help"],
    ):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
        assert done.stdout.endswith("\n[]\n"), words


def test_commands_on_data_are_commands_of_vdtrain_too(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for call in (lambda words: main(["data", *words]), data_pipeline):
        for words in (["--help"], ["select", "--help"], ["index", "data=shapes", "--cfg", "job"], ["slect"]):
            status = call(words)
            shown.append((status, capsys.readouterr()))
    assert shown[:4] == shown[4:]
    assert [status for status, _ in shown[:4]] == [0, 0, 0, 2]


def test_a_stage_and_the_next_under_names_that_need_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained for real from a shell; bash reads the "next:" line that it prints, and preflight takes its words."""
    write_pairs(tmp_path / "data")
    run_dir = tmp_path / "runs, mine" / "lr=1e-4 it's $5 ${x} (é) stage1_single_flow"
    words = [
        "stage=stage1_single_flow",
        "model=tiny",
        "data=shapes",
        "hardware=cpu",
        "tracking=offline",
        "tracking.project=it's (mine), [1]",
        "stage.global_batch_size=2",
        "hardware.micro_batch_size={32:2}",
        "stage.phases=[{resolution:32,samples:2}]",
        f"data.manifest={tmp_path}/data/manifest",
        word_for("run_dir", str(run_dir)),
    ]
    environment = {**os.environ, "PATH": f"{programs.folder()}:{os.environ['PATH']}"}
    line = shell(["vdtrain", "train", *words])
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"^stage1_single_flow is complete; next: (.*)$", done.stdout, flags=re.MULTILINE)
    assert shown is not None
    following = bash_words(shown[1])
    assert following[:3] == ["vdtrain", "train", "stage=stage2_dual_flow"]
    assert main(["preflight", *following[2:]]) == 0
    told = capsys.readouterr().out
    assert f"from step 1 of {run_dir}" in told or f"{run_dir}/checkpoints" in told
    sync = re.search(r"`wandb sync (.*?)/wandb/offline-run-\*`", told)
    assert sync is not None
    assert bash_words(sync[1]) == [str(run_dir).replace("stage1_single_flow", "stage2_dual_flow")]
    assert main(["status", plain_path(str(run_dir))]) == 0
    told = capsys.readouterr().out
    assert "complete" in told
    pasted = re.search(r"wandb sync (.*)", told)
    assert pasted is not None
    (found,) = bash_words(pasted[1])
    assert Path(found).is_dir()
