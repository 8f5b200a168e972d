"""Programs that a shell calls as ever, run by forks of one process that has imported everything already.

`install` puts `vdtrain`, `python` and `torchrun` into a folder for the PATH; `Programs` is the process behind them.
What they run is the real thing with its own folder, variables, output and exit status; only the imports, ten seconds
of a core for every command, are paid once.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("vdtrain", "python", "torchrun")
START_SECONDS = 180.0
# What calls the process: sends arguments, variables and its own three files, and ends as the fork does.
CALLER = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect({address!r})
    request = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(link, [len(request).to_bytes(4, "big")], [0, 1, 2])
    link.sendall(request)
    sys.exit(int(link.recv(16) or b"70"))
"""
# Modules that commands import when they are first used.
WARM = (
    "matplotlib.pyplot",
    "pandas",
    "wandb",
    "data_pipeline.latents.latents",
    "data_pipeline.select.select",
    "data_pipeline.download.download",
    "data_pipeline.index.index",
    "data_pipeline.inspect.inspection",
    "vdtrain.cli",
    "vdtrain.diffusion.editing",
    "vdtrain.evaluation.processes",
    "vdtrain.commands.plan",
    "vdtrain.commands.preflight",
    "vdtrain.commands.sampler",
    "vdtrain.commands.status",
    "vdtrain.training.start",
    "vdtrain.planning.dry_run",
    "vdtrain.run.session",
    "vdtrain.commands.weights",
    "vdtrain.weights.exports",
    "vdtrain.weights.imports",
    "diffusers",
    "huggingface_hub",
)


def install(folder: Path, address: Path) -> None:
    """Put the programs into a folder."""
    folder.mkdir(parents=True)
    for name in NAMES:
        program = folder / name
        program.write_text(CALLER.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)


class Programs:
    """The process behind the programs, between `with` and its end; what it started ends with it.

    Args:
        root: the folder whose `vdtrain` and `data_pipeline` are run.
        address: of its socket, a short path.
        environment: its variables.
    """

    def __init__(self, root: Path, address: Path, environment: dict[str, str]) -> None:
        self.root, self.address, self.environment = root, address, environment

    def __enter__(self) -> Programs:
        self.log = (self.root / "programs.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.address)],
            cwd=self.root,
            env={**self.environment, "PYTHONPATH": str(self.root)},
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        ready = threading.Timer(START_SECONDS, self.process.kill)
        ready.start()
        line = self.process.stdout.readline()
        ready.cancel()
        assert line == b"ready\n", (self.root / "programs.log").read_text()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def serve(address: str) -> None:
    """Fork for every call until SIGTERM, or the end of the process that wanted it."""
    _end_with_parent()
    _warm_up()
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    selector.register(listener, selectors.EVENT_READ, None)
    running: dict[int, socket.socket] = {}

    def stop(*_: object) -> None:
        for child in running:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                link, _ = listener.accept()
                child, watch = _start(link)
                running[child] = link
                selector.register(watch, selectors.EVENT_READ, ("ended", child))
                selector.register(link, selectors.EVENT_READ, ("caller", child))
                continue
            event, child = key.data
            if event == "ended":
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                link = running.pop(child)
                with suppress(OSError):
                    link.sendall(str(code if code >= 0 else 128 - code).encode())
                selector.unregister(key.fileobj)
                os.close(key.fd)
                with suppress(KeyError):
                    selector.unregister(link)
                link.close()
            else:
                # The caller was killed, and what it stood for is told so.
                selector.unregister(key.fileobj)
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGTERM)


def _warm_up() -> None:
    import torch

    torch.set_num_threads(1)
    from vdtrain.engine.deepspeed import import_deepspeed

    import_deepspeed("cpu")
    for module in WARM:
        importlib.import_module(module)
    from diffusers import VersatileDiffusionPipeline  # noqa: F401

    from vdtrain.config.compose import compose, to_object
    from vdtrain.config.schema import TrainConfig
    from vdtrain.models.frozen import build_frozen

    build_frozen(to_object(compose("train", ["model=tiny", "data=shapes"]), TrainConfig).model)


def _start(link: socket.socket) -> tuple[int, int]:
    """The fork that a caller asked for, and a file that can be read when it has ended."""
    head, files, _, _ = socket.recv_fds(link, 4, 3)
    length = int.from_bytes(head, "big")
    request = b""
    while len(request) < length:
        request += link.recv(length - len(request))
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files):
            os.dup2(file, number)
        _be(*json.loads(request))
    for file in files:
        os.close(file)
    with suppress(OSError):
        os.setpgid(child, child)
    return child, os.pidfd_open(child)


def _be(name: str, arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    status = 70
    try:
        os.setpgid(0, 0)
        _end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:0] = [os.path.abspath(path) for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
        status = _torchrun(arguments) if name == "torchrun" else _run(name, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


def _run(name: str, arguments: list[str]) -> int:
    """What the interpreter would do with these arguments, or the entry point of the package; the exit status."""
    how, what, rest = ("-m", "vdtrain.cli", arguments) if name == "vdtrain" else (*[*arguments, ""][:2], arguments[2:])
    try:
        if how == "-m":
            # Imported by the warm-up under its own name; a package runs its `__main__`.
            if "__path__" not in vars(sys.modules.get(what, runpy)):
                sys.modules.pop(what, None)
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.argv, sys.path[:0] = ["-c", *rest], [""]
            exec(compile(what, "<command>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[:0] = list(arguments), [os.path.dirname(os.path.abspath(how))]
            runpy.run_path(how, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _torchrun(arguments: list[str]) -> int:
    """Start the ranks on this machine; the first status that is not 0 ends the others."""
    options = dict(word.lstrip("-").split("=") for word in arguments[: arguments.index("-m")] if "=" in word)
    count = int(options["nproc-per-node"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                _end_with_parent()
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
                os.environ.update(LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                status = _run("python", arguments[arguments.index("-m") :])
            except BaseException:
                traceback.print_exc()
            finally:
                _leave(status)
        ranks[child] = rank
    first = 0
    while ranks:
        child, ended = os.wait()
        ranks.pop(child, None)
        status = os.waitstatus_to_exitcode(ended)
        if status and not first:
            first = status if status > 0 else 128 - status
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return first


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _leave(status: int) -> Any:
    """End as an interpreter does, but for the objects of the process that was forked."""
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
