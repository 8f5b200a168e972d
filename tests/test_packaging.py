"""What is installed: declared packages, the extras and what a command prints without them, the wheel, the version.

Also the files beside the code that other programs read: changelog, citation, hooks, workflows.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Collection, Iterator
from importlib.metadata import files, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.world import DATA, IMAGES, SAMPLER, TRAIN, World
from vdtrain.errors import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRODUCT = ("vdtrain", "data_pipeline")
AROUND = ("tests", "benchmarks", "examples", "miniature", "tools")
# Declared, and imported by other packages alone: by img2dataset, and by fsspec.
FOR_OTHERS = {"standard-imghdr", "gcsfs", "s3fs"}
# In an environment of its own (benchmarks/loader_requirements.txt); what img2dataset brings.
NOT_OURS = {"streaming", "pandas", "cv2"}


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements: Collection[str]) -> set[str]:
    """Distributions that requirements name."""
    return {normal(Requirement(requirement).name) for requirement in requirements}


CORE = named(PROJECT["project"]["dependencies"])
OPTIONAL = {name: named(found) for name, found in PROJECT["project"]["optional-dependencies"].items()}
DEV = named(PROJECT["dependency-groups"]["dev"])
INSTALLED = packages_distributions()


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """(file and line, first part of a module) of every import below a folder, also those by importlib."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                modules = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                modules = [each.value for each in node.args if isinstance(each, ast.Constant)]
            for module in modules:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", module.partition(".")[0]


def distributions(module: str) -> set[str]:
    """Distributions that have a module; its own name where none is installed."""
    return {normal(name) for name in INSTALLED.get(module, [module])}


def foreign(folder: str) -> dict[str, str]:
    """Modules from outside the project and the standard library that a folder imports, each with one of its places."""
    around = {path.stem for name in AROUND for path in (ROOT / name).rglob("*.py")} | {*AROUND}
    own = {*PRODUCT, *(around if folder in AROUND else ()), *sys.stdlib_module_names}
    return {module: place for place, module in imports(folder) if module not in own}


@pytest.mark.parametrize("folder", PRODUCT)
def test_every_import_of_the_product_is_declared(folder: str) -> None:
    declared = CORE.union(*OPTIONAL.values())
    found = foreign(folder)
    assert found.keys() >= {"numpy", "omegaconf", "torch"}
    assert {module: place for module, place in found.items() if not distributions(module) & declared} == {}


@pytest.mark.parametrize("folder", AROUND)
def test_every_import_around_the_product_is_declared(folder: str) -> None:
    declared = CORE.union(DEV, *OPTIONAL.values())
    found = {module: place for module, place in foreign(folder).items() if module not in NOT_OURS}
    assert {module: place for module, place in found.items() if not distributions(module) & declared} == {}


def test_nothing_is_declared_that_the_product_does_not_import() -> None:
    imported = {name for folder in PRODUCT for module in foreign(folder) for name in distributions(module)}
    assert CORE.union(*OPTIONAL.values()) - imported == FOR_OTHERS


def test_messages_name_extras_that_have_the_package() -> None:
    for package, extra in EXTRAS.items():
        assert normal(package) in OPTIONAL[extra]
    assert set(EXTRAS.values()) == OPTIONAL.keys()


# --- commands without the extras -------------------------------------------------------------------------------------


def with_all_that_they_need(requirements: Collection[str]) -> set[str]:
    """Distributions that an installer takes for requirements here."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            key = normal(requirement.name), extra
            if key not in found:
                found.add(key)
                needs = map(Requirement, requires(requirement.name) or ())
                waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def environment(folder: Path, distributions: Collection[str]) -> Path:
    """An environment with some of the distributions of this one; its folder of programs."""
    venv.create(folder, with_pip=False, symlinks=True)
    (place,) = folder.glob("lib/python*/site-packages")
    entries = {file.parts[0] for name in distributions for file in files(name) or ()} - {"..", "__pycache__"}
    for entry in entries:
        (place / entry).symlink_to(Path(sysconfig.get_path("purelib")) / entry)
    program = folder / "bin" / "vdtrain"
    program.write_text(f"#!{folder}/bin/python\nimport sys\nfrom vdtrain.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return program.parent


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment without any extra."""
    return environment(tmp_path_factory.mktemp("lean"), with_all_that_they_need(["vdtrain"]))


def typed(programs: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as typed in a folder, with the programs of another environment."""
    return subprocess.run(
        [str(programs / words[0]), *(word.replace("FOLDER", str(folder)) for word in words[1:])],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_machine_without_extras_trains_and_samples(lean: Path, world: World) -> None:
    sizes = ["stage.global_batch_size=4", "hardware.micro_batch_size={32:4}"]
    run = ["stage.phases=[{resolution:32,samples:4}]", "tracking=offline", "run_dir=run"]
    done = typed(lean, world.folder, "vdtrain", "train", *TRAIN, *sizes, *run)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "vdtrain[" in line]
    assert "W&B does not take this run (wandb is not installed; run `pip install 'vdtrain[tracking]'`)" in line
    assert len((world / "run/metrics.jsonl").read_text().splitlines()) == 1
    done = typed(lean, world.folder, "vdtrain", "sample", *SAMPLER, "flow=text-to-image", "inputs=[a]")
    assert done.returncode == 0, done.stderr
    assert (world / "samples/0000.png").exists()


@pytest.mark.slow
def test_an_evaluation_without_its_extra_is_one_line_before_work(lean: Path, world: World) -> None:
    done = typed(lean, world.folder, "vdtrain", "evaluate", *SAMPLER, *DATA, "samples=2", "tracking=none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: contact sheets: matplotlib is not installed; run `pip install 'vdtrain[evaluation]'`\n"
    )
    assert not (world / "evaluation").exists()


def test_votes_without_their_extra_are_one_line(lean: Path, world: World) -> None:
    done = typed(lean, world.folder, "vdtrain", "compare", "model", "model", "votes=[votes.json]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: votes: scipy is not installed; run `pip install 'vdtrain[evaluation]'`\n"


@pytest.mark.slow
def test_preflight_names_the_extras_that_a_stage_needs(lean: Path, world: World) -> None:
    words = [*TRAIN, "tracking=offline", "hardware.device=cuda", "hardware.attention=xformers"]
    done = typed(lean, world.folder, "vdtrain", "preflight", *words)
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "vdtrain[" in line]
    assert lines == [
        "error: hardware.attention=xformers: xformers is not installed; run `pip install 'vdtrain[xformers]'`, or "
        "choose sdpa",
        "error: tracking.mode=offline: wandb is not installed; run `pip install 'vdtrain[tracking]'`, or choose "
        "tracking=none",
    ]


@pytest.mark.parametrize(
    ("distributor", "lacking", "extras"),
    [
        ("multiprocessing", "img2dataset", "data"),
        pytest.param("ray", "img2dataset ray", "data,distributed", marks=pytest.mark.slow),
    ],
)
def test_a_download_without_its_extra_is_one_line(
    lean: Path, world: World, distributor: str, lacking: str, extras: str
) -> None:
    for command in (["miniature", "draw"], ["data_pipeline", "select"]):
        assert world.type("python", "-m", *command, *DATA, *IMAGES)[0] == 0
    words = ["-m", "data_pipeline", "download", *DATA, f"data.download.distributor={distributor}"]
    done = typed(lean, world.folder, "python", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: data.download.distributor={distributor}: {lean}/python lacks {lacking}; run `pip install "
        f"'vdtrain[{extras}]'`, or name another interpreter by data.download.python\n"
    )


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_the_product_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = PROJECT["project"]["version"]
    assert {name.partition("/")[0] for name in names} == {*PRODUCT, f"vdtrain-{version}.dist-info"}
    options = {f"vdtrain/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    code = {str(path.relative_to(ROOT)) for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "vdtrain/report/pages").iterdir()}
    assert {*options, *code, *pages, "vdtrain/py.typed", "data_pipeline/py.typed"} <= set(names)
    assert any(name.startswith("vdtrain/assets/tiny/") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_commands_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "environment", with_all_that_they_need(PROJECT["project"]["dependencies"]))
    (place,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(place)
    done = typed(programs, tmp_path, "vdtrain", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vdtrain {PROJECT['project']['version']}\n", "")
    for words in (["vdtrain", "train"], ["python", "-m", "data_pipeline", "select"]):
        done = typed(programs, tmp_path, *words, "--cfg", "job")
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["data"]["name"] == "laion2b_en_coyo700m"


def test_the_environment_is_activated() -> None:
    activate = Path(sys.prefix) / "bin" / "activate"
    words = ["bash", "-c", f'. "{activate}" && vdtrain --version']
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert done.stdout.startswith("vdtrain "), done.stderr


def test_the_guide_names_every_folder_of_the_code() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (pipeline,) = re.findall(r"^\| `(data_pipeline/.*) \|.*$", guide, re.MULTILINE)
    named = {*re.findall(r"^\| `vdtrain/(\w+)/`", guide, re.MULTILINE), *re.findall(r"(\w+)/`", pipeline)}
    there = {path.name for folder in PRODUCT for path in (ROOT / folder).iterdir() if any(path.glob("*.py"))}
    assert named == there


# --- what other programs read ----------------------------------------------------------------------------------------


def releases() -> list[tuple[str, str]]:
    """(version, date) of the changelog, newest first."""
    return re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_changelog_begins_with_this_version() -> None:
    versions = [version for version, _ in releases()]
    assert versions[0] == PROJECT["project"]["version"]
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    kinds = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "type", "preferred-citation"}
    assert (citation["version"], citation["date-released"]) == releases()[0]
    assert citation["license"] == PROJECT["project"]["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Xu", "Wang", "Zhang", "Wang", "Shi"]
    assert (paper["year"], paper["url"]) == (2023, PROJECT["project"]["urls"]["Paper"])


def test_hooks_and_workflows_call_what_there_is() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"].split() for hook in hooks]
    programs = {Path(program).name for program, *_ in entries if program.startswith(".venv/bin/")}
    assert programs == {"ruff", "mypy", "python"}
    assert [words[1:] for program, *words in entries if program.endswith("python")] == [["tools.prose"]]
    assert all((Path(sys.executable).parent / program).exists() for program in programs)
    assert {words[0] for program, *words in entries if program == "make"} == {"shellcheck"} <= targets
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"make lint", ".ci/run"} <= {step.get("run") for job in jobs.values() for step in job["steps"]}
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
