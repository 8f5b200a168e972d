"""Every documented command typed into a shell, one after another, in a clone where all is small.

What a command stands for is found here by its form: what is put in its place where this machine cannot do it
(`STAND_INS`), what runs in another test (`ELSEWHERE`), what cannot run at all (`OUT_OF_REACH`), and what the user gets
(`GETS`, `SAYS`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.documents.checkout import make_checkout
from tests.documents.commands import PAGES, Command, of_helps, of_page, yaml_of_page
from tests.documents.published import (
    published_hub,
    write_data,
    write_downloads,
    write_hub,
    write_judges,
    write_metadata,
)
from tests.pairs import write_shard
from tests.programs import install, program, server, wait_until_ready

SECONDS = 300
# Data come first, as for a user. Fine-tuning begins with commands of docs/weights.md. The log repeats what others show.
FIRST, LAST = ("docs/data.md", "README.md"), ("docs/finetune.md", "docs/log.md")
ORDER = (*FIRST, *(page for page in PAGES if page not in (*FIRST, *LAST)), *LAST)
SCRIPTS = (Command("examples/gallery.sh", 1, "bash examples/gallery.sh"),)
GPU = "GPU"


@dataclass(frozen=True)
class StandIn:
    """Something else in a command, and what the mark of such a command must name."""

    pattern: str
    instead: str
    needs: str | None = None


STAND_INS = (
    # The walk's weights are made up, and their activations overflow in half precision.
    StandIn(r"\bdevice=cuda precision=fp16\b", "device=cpu precision=bf16", GPU),
    StandIn(r"\bdevice=cuda\b", "device=cpu", GPU),
    StandIn(r"--device cuda\b", "--device cpu", GPU),
    StandIn(r"--nproc-per-node=8\b", "--nproc-per-node=2", GPU),
    # Sizes.
    StandIn(r"\bsamples=(200|5000)\b", "samples=4"),
    StandIn(r"\bsteps=25\b", "steps=2"),
    StandIn(r"\b(ranks|gpus)=\d+", r"\1=2"),
    StandIn(r"\bprocesses=32\b", "processes=2"),
    # Several pages draw the sheet of one manifest.
    StandIn(r"^(python -m data_pipeline inspect\b[^#]*?)(?= *(#.*)?$)", r"\1 data.inspect.overwrite=true"),
    # A file system of the site's; an end that is a Ctrl-C.
    StandIn(r"(?<![\w.])/scratch/", "scratch/"),
    StandIn(r"^tail -f ", "tail "),
)

JOBS = "tests/slurm/test_jobs.py::"
CURRICULUM = f"{JOBS}test_the_curriculum_runs_to_its_end"
AUDIO = "tests/training/test_audio_example.py::test_every_step_of_the_page"
# Form of a command -> the test that runs it.
ELSEWHERE = {
    r"make test": ".ci/run",
    r"python -m data_pipeline select 'data\.sources\.\w+\.columns=.*": "tests/data_pipeline/test_metadata_files.py::"
    "test_columns_are_named_by_a_setting",
    r"pip install 'vdtrain\[\w+\]'": "tests/test_packaging.py::test_messages_name_extras_that_have_the_package",
    r"source \.venv/bin/activate": "tests/test_packaging.py::test_the_environment_is_activated",
    r"vdtrain app( .*)?": "tests/app/test_app.py::test_a_text_becomes_an_image_that_the_command_line_makes_again",
    r"make (lint|test-slow)": ".github/workflows/ci.yml",
    r"make counts": "tests/training/test_plan.py::test_every_count_is_that_of_a_dry_run",
    r"vdtrain weights push .*private=true": "tests/weights/test_push.py::test_a_push_sends_the_export_and_nothing_else",
    r"make golden": "tests/golden_losses/test_golden_losses.py::test_losses_are_those_recorded",
    r"make rehearsal|python benchmarks/rehearsal\.py .*": "tests/test_rehearsal.py::"
    "test_the_whole_road_with_the_tiny_model",
    r"make drill|python -m tests\.drill.*": "tests/drill/test_drill.py::test_twenty_random_kills_lose_nothing",
    r"python benchmarks/train_step\.py( .*)?": "tests/benchmarks/test_train_step.py::test_contestants_do_the_same_work",
    r"(DEVICE=cpu PARTS=all )?bash benchmarks/gpu(_wheels)?\.sh": "tests/benchmarks/test_gpu.py::test_all_parts",
    r"slurm/all\.sh.*|sbatch slurm/(select_metadata|index_shards)\.sh": "tests/slurm/test_chain.py::"
    "test_a_chain_leads_from_metadata_to_a_picture",
    r"(sbatch .*)?slurm/(curriculum|stage\d_\w+)\.sh.*": CURRICULUM,
    r"sbatch .*slurm/download_shards\.sh.*": f"{JOBS}test_an_array_downloads_every_part_once",
    r"sbatch .*slurm/(evaluate|precompute_latents)\.sh.*": f"{JOBS}test_latents_and_measures_are_made_on_every_node",
    r"(scontrol update|scancel) .*": f"{JOBS}test_a_job_out_of_the_queues_hands_saves_and_stays_ended",
    r"python examples/(evaluate_stable_diffusion|paper_table)\.py .*": "tests/evaluation/test_examples.py::"
    "test_a_rival_from_prompts_to_the_table",
    r"vdtrain weights import all.*": "tests/weights/test_import_all.py::"
    "test_all_come_from_one_folder_and_are_skipped_when_they_are_there",
    r"vdtrain evaluate (images|captions)=.*": "tests/evaluation/test_given.py::"
    "test_images_of_another_program_with_prompts_of_their_own",
    r"vdtrain status .*watch=\d+": "tests/test_status.py::test_watching_looks_again_until_interrupted",
    r"vdtrain train .*nnodes=.*": "tests/training/test_own_processes.py::test_two_nodes_meet",
    r"vdtrain train .*lora\.rank=.*": "tests/training/test_training_choices.py::"
    "test_a_stopped_run_with_adapters_and_every_choice_ends_with_the_bits_of_one_that_was_not_stopped",
    r"python examples/finetune_lora\.py .*": "tests/test_finetune_lora.py::"
    "test_the_example_trains_exports_and_measures",
    r"vdtrain train .*data\.stream=webdataset .*": "tests/training/test_webdataset.py::"
    "test_a_stage_from_a_web_server_on_two_ranks_from_start_over_resume_to_end",
    r"vdtrain train .*(samples|validation)\.every=.*": "tests/training/test_watching.py::"
    "test_a_run_as_typed_its_status_and_its_evaluation",
    r"vdtrain compare .*": "tests/report/test_compare.py::test_samples_are_compared_from_the_command_to_the_result",
    r"(python -m examples\.audio\.\w+|vdtrain|python -m data_pipeline) .*demo/audio/.*|"
    r"python -m data_pipeline index data=tones .*|from vdtrain\.pipeline import [\s\S]*demo/audio/[\s\S]*": AUDIO,
    r"MODALITY_FIGURES\[.*": "tests/training/test_audio_example.py::test_the_page_shows_the_example_as_it_is",
    r"class SoundStream\(PairStream\):[\s\S]*": "tests/training/test_third_modality.py::"
    "test_the_page_shows_the_example_as_it_is",
}

# Two walks share the commands. `make test` has the pages that a user reads first, and one command of every other kind.
# `make test-slow` has what repeats those kinds in other words, and what computes for long.
SLOW_PAGES = ("docs/benchmarks.md", "docs/budget.md", "docs/evaluation.md", "docs/log.md", "examples/gallery.sh")
SLOW = (
    r"make demo DEMO_LENGTH=long",
    r"python -m data_pipeline download data\.download\.processes=.*",
    r"python -m data_pipeline select data=mine 'hydra\.searchpath=\[my/conf\]'",
    r"python -m data_pipeline pack pairs\.csv .*",
    r"python -m data_pipeline inspect data/manifest.*",
    # Each is a dry run of its stages, whose sizes are others than those that were counted before.
    r"vdtrain plan (curriculum|stage=finetune_four_flow) .*",
    r"vdtrain preflight stage=finetune_four_flow .*",
    r"vdtrain evaluate runs/stage3_four_flow data\.manifest=data/coco/manifest",
    r"vdtrain weights export diffusers .*",
    r"vdtrain weights import \w+ downloads/.*",
    r"vdtrain train stage=finetune_four_flow .*run_dir=runs/mine",
    r"python -m data_pipeline latents data=own .*",
    r"vdtrain sample runs/finetune_four_flow samples/0000\.png flow=image-to-image .*",
)
# A help repeats what pages show, but for these examples.
QUICK_EXAMPLES = (
    r"vdtrain train .*--cfg job",
    r"vdtrain status",
    r"vdtrain sample .* -- .*",
    r"vdtrain blend .*=text .*",
)
# What commands of both walks go on from: data, weights, runs.
BOTH = (
    r"hf download .*",
    r"python -m data_pipeline select data\.select\.processes=.*",
    r"python -m data_pipeline download",
    r"python -m data_pipeline pack (photos|coco/annotations/\S+ data\.root=data/coco)",
    r"python -m data_pipeline index data=own data\.(shards=data/own/packed|root=data/coco .*)",
    r"python -m data_pipeline index data\.index\.processes=32",
    r"vdtrain train stage=stage\d_\w+ hardware=h100 gpus=8",
    r"vdtrain sample runs/stage3_four_flow \"a lighthouse at dusk, in oil\"",
    r"vdtrain weights import versatile_diffusion",
    r"vdtrain train stage=finetune_four_flow data=own hardware=h100 gpus=8",
)

# What a mark may say a command needs -> the form that such a command has. It is not run.
OUT_OF_REACH = {
    "the internet": r"https?://|\buv (venv|pip|lock)\b|^pip install|^(docker|apptainer) ",
    "a cluster": r"cluster=\S+:\d+",
    "root": r"^apt-get ",
}

# Form of a command -> the files that the user gets. {NAME} is the setting of that name, with these defaults.
DEFAULTS = {
    "stage": "stage1_single_flow",
    "output_dir": "",
    "output": "",
    "runs_dir": "runs",
    "run_dir": "{runs_dir}/{stage}",
    "data.root": "data/own",
}
GETS: Mapping[str, tuple[str, ...]] = {
    r"make demo( DEMO_LENGTH=short)?": tuple(
        f"demo/runs-short/{name}" for name in ("losses.png", "samples.png", "report.html")
    ),
    r"make demo DEMO_LENGTH=long": ("demo/runs-long/losses.png", "demo/runs-long/samples.png"),
    r"bash examples/gallery\.sh": tuple(
        f"demo/gallery/{name}"
        for name in ("edit/2/0000.png", "image-to-text/captions.txt", "multi-context/0003.png", "focus/1/0000.png")
    ),
    r"hf download laion/.*": ("data/metadata/laion2b_en/part-*.parquet",),
    r"hf download kakaobrain/.*": ("data/metadata/coyo700m/data/part-*.parquet",),
    r".*data_pipeline select .*data=mine.*": ("data/selected/mine/selection.json",),
    r".*data_pipeline select.*": ("data/selected/laion2b_en/00000.parquet", "data/selected/coyo700m/selection.json"),
    r".*data_pipeline download.*": ("data/shards/laion2b_en/00000/*.tar", "data/shards/coyo700m/00000.plan.json"),
    r".*data_pipeline pack .*data=coco2017": (
        "data/coco2017/manifest/shards.parquet",
        "data/coco2017/packed/references.jsonl",
    ),
    r".*data_pipeline pack .*": ("{data.root}/packed/000000.tar", "{data.root}/packed/plan.parquet"),
    r".*data_pipeline index data=own .*": ("{data.root}/manifest/shards.parquet",),
    r".*data_pipeline index data=shapes": ("demo/data/manifest/shards.parquet",),
    r".*data_pipeline index.*": ("data/manifest/shards.parquet", "data/manifest/samples-00000.parquet"),
    r".*data_pipeline inspect data/own/manifest": ("data/own/inspect.png",),
    r".*data_pipeline inspect.*": ("data/inspect.png",),
    r".*data_pipeline latents .*data=own.*": ("data/own/latents/512/latents.json",),
    r".*data_pipeline latents .*data=shapes.*": ("demo/data/latents/64/latents.json",),
    r".*data_pipeline latents .*latent_cache\.folder=.*": ("{data.latent_cache.folder}/256/latents.json",),
    r".*data_pipeline latents.*": ("data/latents/256/latents.json", "data/latents/256/*.safetensors"),
    r"(vdtrain sample|vdtrain blend) .*(to-text|output=text)\b.*": ("{output_dir}/captions.txt",),
    r"(\.venv/bin/)?(vdtrain sample|vdtrain blend|vdtrain edit) .*": ("{output_dir}/0000.png",),
    r".*vdtrain evaluate.*": ("{output_dir}/metrics.json",),
    r"(torchrun .*-m vdtrain[. ]train|vdtrain train) (?!.*--cfg).*": (
        "{run_dir}/checkpoints/latest",
        "{run_dir}/*.jsonl",
    ),
    r"vdtrain (bench|report) .*output=.*": ("{output}",),
    r"vdtrain report demo/runs-short": ("demo/runs-short/report.html",),
    r"vdtrain report .*": ("runs/*/report.html",),
    r"vdtrain weights import stable_diffusion.*": ("weights/stable_diffusion_v1/weights.json",),
    r"vdtrain weights import image_vae.*": ("weights/kl-f8.safetensors",),
    r"vdtrain weights import text_vae.*": ("weights/optimus-vae.safetensors",),
    r"vdtrain weights import clip.*": ("weights/clip-vit-l-14.safetensors",),
    r"vdtrain weights import bert_tokenizer.*": ("weights/bert-base-cased.json",),
    r"vdtrain weights import gpt2_tokenizer.*": ("weights/gpt2.json",),
    r"vdtrain weights import versatile_diffusion.*output=.*": ("{output}/weights.json",),
    r"vdtrain weights import versatile_diffusion.*": ("weights/versatile_diffusion/weights.json",),
    r"vdtrain weights export versatile_diffusion .*": ("{made}",),
    r"vdtrain weights export safetensors .*": ("{made}/weights.json",),
    r"vdtrain weights export diffusers .*": ("{made}/model_index.json",),
}

# Form of a command -> what it prints.
SAYS = {
    r"make install": r"^$|Nothing to be done",
    r"make help": r"(?m)^demo +the whole curriculum",
    r"vdtrain (train|latents) .*--cfg job": r"(?m)^stage:$",
    r"vdtrain plan .*format=json": r"^\s*[\[{]",
    r"vdtrain plan curriculum.*": r"all stages",
    r"vdtrain plan.*": r"micro.batch",
    r"vdtrain weights push .*dry_run=true": r"nothing was sent",
    r"vdtrain preflight.*": r"(?m)^ok|can be trained|ready",
    r"vdtrain status.*": r"stage1_single_flow|stage3_four_flow",
    r"tail .*": r"started",
    r"vdtrain weights --help": r"hf:",
    r"(\.venv/bin/vdtrain|vdtrain|python -m data_pipeline) --help": r"Commands:",
    r"vdtrain --version": r"^vdtrain \d",
    r"(export )?\w+=.*": r"^$",
    r"from vdtrain[\s\S]*": r"^$",
}
# Form of a help's example -> what other pages made, and it does not go on from.
ASIDE = {
    r"python -m data_pipeline select .*filters.*": ("data/shards", "data/selected"),
    r".* model=tiny data=shapes .*": ("runs",),
}
ASSIGNMENT = re.compile(r"(export )?\w+=(\"[^\"]*\"|\S*)$")


FIRST_IMPORTS = re.compile(r"vdtrain weights import \w+$")


def setting_words(text: str) -> dict[str, str]:
    """Settings of a command line, with the defaults of those that `GETS` uses."""
    found = {**DEFAULTS, **dict(re.findall(r"(?<![\w.])([\w.]+)=([^\s'\"]+)", text))}
    found["run_dir"] = found["run_dir"].format(**found)
    found["output_dir"] = found["output_dir"] or ("evaluation" if "evaluate" in text else "samples")
    if made := re.match(r"vdtrain weights export \w+ (\S+)", text):
        found["made"] = made[1]
    return found


def expected_files(command: Command, words: Mapping[str, str]) -> tuple[str, ...]:
    """Patterns of files that a command leaves; the first form that fits counts."""
    patterns = next((files for form, files in GETS.items() if re.fullmatch(form, command.text, re.DOTALL)), ())
    filled = (re.sub(r"\{([\w.]+)\}", lambda match: words[match[1]], pattern) for pattern in patterns)
    # A shell's variable in a path is every value that it takes.
    return tuple(re.sub(r"\$\w+", "*", pattern) for pattern in filled)


def with_stand_ins(command: Command) -> str:
    """What is typed here in a command's place."""
    text = command.text
    for stand_in in STAND_INS:
        text = re.sub(stand_in.pattern, stand_in.instead, text)
    return text


def elsewhere(command: Command) -> str | None:
    """The test that runs it, or the file that does."""
    return next((test for form, test in ELSEWHERE.items() if re.fullmatch(form, command.text, re.DOTALL)), None)


def out_of_reach(command: Command) -> str | None:
    """What a command needs that no test can have."""
    return next((what for what, form in OUT_OF_REACH.items() if re.search(form, command.text)), None)


def needs(command: Command) -> str | None:
    """What a command needs that not every machine has, whoever runs it here."""
    if (beyond := out_of_reach(command)) is not None:
        return beyond
    if any(stand_in.needs and re.search(stand_in.pattern, command.text) for stand_in in STAND_INS):
        return GPU
    trains = re.search(r"vdtrain[. ](train|bench)\b|data_pipeline latents", command.text)
    return GPU if trains and not re.search(r"hardware=cpu|--cfg", command.text) else None


def runs_here(command: Command) -> bool:
    return elsewhere(command) is None and out_of_reach(command) is None


def of_form(command: Command, forms: Sequence[str]) -> bool:
    return any(re.fullmatch(form, command.text, re.DOTALL) for form in forms)


def slow(command: Command) -> bool:
    """Whether `make test-slow` tells how it ended, and not `make test`."""
    if command.page in SLOW_PAGES or of_form(command, SLOW):
        return True
    return not command.page.endswith(".md") and not of_form(command, QUICK_EXAMPLES)


def commands() -> list[Command]:
    """All of them once, in the order in which they are walked."""
    shown = [*(command for page in ORDER for command in of_page(page) if not command.mention), *SCRIPTS, *of_helps()]
    first: dict[str, Command] = {}
    for command in shown:
        first.setdefault(command.text, command)
    return list(first.values())


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it left missing."""

    status: int
    output: str
    missing: tuple[str, ...]
    seconds: float


class Walk:
    """A clone in which commands are run, each once, after all that stand before it.

    Args:
        folder: for everything.
        address: a short path for a socket.
    """

    def __init__(self, folder: Path, address: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.root = folder, folder / "clone"
        web = stack.enter_context(published_hub(folder))
        make_checkout(self.root, web.port)
        write_hub(folder / "hub")
        write_downloads(self.root / "downloads")
        for file in (self.root / "downloads").iterdir():
            (self.root / file.name).hardlink_to(file)
        write_data(self.root, folder / "images", web.port)
        write_metadata(folder / "hub", folder / "images")
        (self.root / "my/conf/data").mkdir(parents=True)
        (options,) = yaml_of_page("docs/data.md")
        (self.root / "my/conf/data/mine.yaml").write_text(options)
        (self.root / "my/shards").mkdir()
        write_shard(self.root / "my/shards/000000.tar", 8, seed=0)
        install(self.root / ".venv" / "bin", address)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")},
            "PATH": f"{self.root}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": f"http://127.0.0.1:{web.port}",
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            # A command with two threads does not spin where other tests have the cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            "WANDB_MODE": "offline",
        }
        here = {**self.environment, "PYTHONPATH": str(self.root)}
        stack.enter_context(server(program("python"), address, self.root, here))
        wait_until_ready(address)
        self._all = commands()
        self._done: dict[str, Outcome] = {}
        self._page = ""
        self._kept: list[str] = []

    def outcome(self, command: Command) -> Outcome:
        """How it ended; those before it in its walk are run first."""
        for earlier in self._all:
            if command.text in self._done:
                break
            along = slow(earlier) == slow(command) or of_form(earlier, BOTH)
            if along and runs_here(earlier) and earlier.text not in self._done:
                self._done[earlier.text] = self._run(earlier)
        return self._done[command.text]

    def _run(self, command: Command) -> Outcome:
        # Examples of a help are alternatives.
        if command.page != self._page or not command.page.endswith(".md"):
            self._page, self._kept = command.page, []
            self.prepare(command)
        text = with_stand_ins(command)
        self._bring_judges(text)
        words = setting_words(text)
        files = expected_files(command, words)
        if re.match(r"vdtrain (sample|blend|edit|weights) ", text):
            # Samples would be numbered on, and a model card would not be replaced.
            numbered = [file.replace("/0000.", "/[0-9]*.") for file in files if "/0000." in file]
            cards = [file.replace(".pth", ".README.md") for file in files if file.endswith(".pth")]
            self._remove(*files, *numbered, *cards)
        began = time.monotonic()
        if command.language == "python":
            typed = [str(self.root / ".venv/bin/python"), "-c", text]
        else:
            typed = ["bash", "-c", "\n".join(["set -e", *self._kept, text])]
        with self._aside(command):
            done = subprocess.run(
                typed, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=SECONDS
            )
            missing = tuple(pattern for pattern in files if not any(self.root.glob(pattern)))
        if ASSIGNMENT.match(text):
            self._kept.append(text)
        said = next((says for form, says in SAYS.items() if re.fullmatch(form, command.text)), None)
        if said is not None and not re.search(said, done.stdout):
            missing = (*missing, f"in what it prints: {said}")
        return Outcome(done.returncode, done.stdout + done.stderr, missing, time.monotonic() - began)

    def prepare(self, command: Command) -> None:
        """What the reader of a page has, and what an earlier page left that this one makes anew.

        Args:
            command: the first of the page in this walk.
        """
        page = command.page
        shutil.rmtree(self.root / "evaluation", ignore_errors=True)
        if page == "docs/data.md":
            # README says that these are imported first; docs/weights.md, whose commands they are, does it again.
            imports = [command.text for command in of_page("docs/weights.md") if FIRST_IMPORTS.match(command.text)]
            self._type(imports[:6])
        if page == "docs/finetune.md":
            # Its own index was run with docs/data.md, which then indexes other shards.
            self._type([command.text for command in of_page(page) if "data_pipeline index" in command.text])
        if page == "docs/settings.md":
            shutil.copytree(self.root / "runs" / "stage1_single_flow", self.root / "runs" / "lr=1e-4", symlinks=True)
        if page == "docs/weights.md" and not of_form(command, BOTH):
            for made in ("weights", "runs/stage1_single_flow", "runs/stage3_four_flow"):
                shutil.rmtree(self.root / made)

    def _bring_judges(self, text: str) -> None:
        """Have Inception and another CLIP, half a gigabyte, where a command asks for them."""
        if not re.search(r"weights/(inception|pt_inception|clip-vit-b-32)", text):
            return
        if not (judges := self.folder / "judges").exists():
            write_judges(judges)
        for file in judges.iterdir():
            (self.root / "weights" / file.name).unlink(missing_ok=True)
            (self.root / "weights" / file.name).hardlink_to(file)

    def _type(self, lines: Sequence[str]) -> None:
        """Run commands again that have been tested already."""
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -e", *lines])],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _remove(self, *patterns: str) -> None:
        """Take away what a command makes, the whole folder that a pattern's first file is in if it is a model's."""
        for path in [path for pattern in patterns for path in self.root.glob(pattern)]:
            if path.name in ("weights.json", "model_index.json"):
                shutil.rmtree(path.parent)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _aside(self, command: Command) -> Iterator[None]:
        """Put away what another page made, where a help begins with nothing."""
        forms = () if command.page.endswith(".md") else ASIDE.items()
        folders = [self.root / name for form, names in forms if re.fullmatch(form, command.text) for name in names]
        for folder in folders:
            folder.rename(folder.with_name(f"{folder.name}.aside"))
        yield
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(f"{folder.name}.aside").rename(folder)
