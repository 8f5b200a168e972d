"""The process behind the programs: `python -m tests.programs.server SOCKET`. It forks for every call.

It imports everything at the first call, before there is a thread or a process group, and forks afterwards. A fork
gets what its caller has: arguments, folder, variables, open files, limits, ignored and blocked signals, and the
namespaces of a container. It is killed if its caller is, or if this process ends.
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import importlib.machinery
import json
import os
import random
import resource
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Modules that commands import when they are first used.
WARM = (
    "cv2",
    "diffusers",
    "huggingface_hub",
    "img2dataset",
    "matplotlib.pyplot",
    "pandas",
    "torch.distributed.run",
    "wandb",
    "webdataset",
)
OWN = (
    "data_pipeline.__main__",
    "data_pipeline.download.download",
    "data_pipeline.download.img2dataset_run",
    "data_pipeline.index.index",
    "data_pipeline.inspection",
    "data_pipeline.inspection",
    "data_pipeline.latents.latents",
    "data_pipeline.select.select",
    "miniature.__main__",
    "miniature.image_set",
    "vdtrain.cli",
    "vdtrain.commands.plan",
    "vdtrain.commands.preflight",
    "vdtrain.commands.run_folder",
    "vdtrain.inference.sampler",
    "vdtrain.commands.status",
    "vdtrain.commands.weights",
    "vdtrain.diffusion.editing",
    "vdtrain.evaluation.parts",
    "vdtrain.planning.dry_run",
    "vdtrain.run.restarts",
    "vdtrain.training.session",
    "vdtrain.training.start",
    "vdtrain.weights.published.diffusers_folder",
    "vdtrain.weights.exports",
    "vdtrain.weights.imports",
)
OWN_PACKAGES = ("vdtrain", "data_pipeline", "miniature")
FAULTS = "VDTRAIN_FAULTS"
HUB, HUB_VARIABLES = "huggingface_hub", "HF_"
NAMESPACES = {"net": 0x40000000, "uts": 0x04000000, "mnt": 0x00020000, "pid": 0x20000000}
LIMITS = tuple(value for name, value in vars(resource).items() if name.startswith("RLIMIT_"))
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Call:
    """What a caller sends."""

    name: str
    program: str
    arguments: list[str]
    folder: str
    variables: dict[str, str]
    files: list[int]
    umask: int
    ignored: list[int]
    blocked: list[int]
    leads: bool  # its process group is killed with it


@dataclass(frozen=True)
class Fork:
    """A fork that runs, and the link to its caller."""

    pid: int
    ended: int
    link: socket.socket
    leads: bool

    def signal(self, number: int, group: bool = False) -> None:
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)


class Server:
    """Listens at `address` until SIGTERM, or the end of the process that started it."""

    def __init__(self, address: str) -> None:
        self.variables = dict(os.environ)
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.running: dict[int, Fork] = {}
        self.warm = False

    def serve(self) -> NoReturn:
        signal.signal(signal.SIGTERM, self.stop)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self.accept()
                elif (fork := self.running.get(key.data)) is not None:
                    if key.fileobj is fork.link:
                        self.hear(fork)
                    else:
                        self.end(fork)

    def stop(self, *_: object) -> NoReturn:
        for fork in self.running.values():
            fork.signal(signal.SIGKILL, group=True)
        os._exit(0)

    def accept(self) -> None:
        link, _ = self.listener.accept()
        if not self.warm:
            warm_up()
            self.imported = {name: value for name, value in os.environ.items() if name not in self.variables}
            self.warm = True
        head, files, _, _ = socket.recv_fds(link, 4, 250)
        if not head:
            with suppress(OSError):
                link.sendall(b"ready")
            link.close()
            return
        call = Call(**json.loads(_exactly(link, int.from_bytes(head, "big"))))
        pid = os.fork()
        if pid == 0:
            self.be(call, files, link)
        for file in files:
            os.close(file)
        fork = Fork(pid, os.pidfd_open(pid), link, call.leads)
        self.running[pid] = fork
        self.selector.register(fork.ended, selectors.EVENT_READ, pid)
        self.selector.register(link, selectors.EVENT_READ, pid)

    def hear(self, fork: Fork) -> None:
        """Pass signals on; the end of the link is the caller's."""
        try:
            numbers = fork.link.recv(64)
        except ConnectionError:
            numbers = b""
        for number in numbers:
            fork.signal(number)
        if not numbers:
            self.selector.unregister(fork.link)
            fork.signal(signal.SIGKILL, group=fork.leads)

    def end(self, fork: Fork) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
        with suppress(OSError):
            fork.link.sendall(f"{status:4d}".encode())
        self.selector.unregister(fork.ended)
        os.close(fork.ended)
        with suppress(KeyError):
            self.selector.unregister(fork.link)
        fork.link.close()
        del self.running[fork.pid]

    def be(self, call: Call, files: list[int], link: socket.socket) -> NoReturn:
        """What the fork does."""
        status = 70
        try:
            end_with_parent()
            os.setsid()
            caller = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            _take_files(files, call.files)
            _take_limits(caller)
            _enter_namespaces(caller)
            _take_signals(call)
            take_streams(call.variables)
            os.umask(call.umask)
            os.chdir(call.folder)
            self.take_variables(call)
            begin_libraries_anew(call.variables)
            status = run(call)
        except BaseException:
            traceback.print_exc()
        finally:
            leave(status)

    def take_variables(self, call: Call) -> None:
        """The caller's, with what imports added."""
        os.environ.clear()
        os.environ.update({**self.imported, **call.variables})
        sys.executable = str(Path(call.program).with_name("python"))
        paths = call.variables.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [*(os.path.abspath(path) for path in paths if path), *sys.path[1:]]
        if _of_hub(call.variables) != _of_hub(self.variables):
            _forget(HUB)
        if FAULTS in call.variables and hasattr(library := ctypes.CDLL(None), "read_faults"):
            library.read_faults()
        if "PYTHONFAULTHANDLER" in call.variables:
            faulthandler.enable()


def warm_up() -> None:
    """Import everything, and do once what else takes time in a first use."""
    import torch

    torch.set_num_threads(1)
    from vdtrain.engine.deepspeed import import_deepspeed

    import_deepspeed("cpu")
    for module in (*WARM, *OWN):
        importlib.import_module(module)
    from diffusers import VersatileDiffusionPipeline  # noqa: F401

    from vdtrain.config.compose import compose, to_object
    from vdtrain.config.schema import TrainConfig
    from vdtrain.models.frozen import build_frozen

    build_frozen(to_object(compose("train", ["model=tiny", "data=shapes"]), TrainConfig).model)
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    # The allocator begins its thread anew in a fork.
    assert threads <= {"python", "jemalloc_bg_thd"}, f"a fork would lack threads: {threads}"
    gc.collect()
    gc.freeze()


def run(call: Call) -> int:
    """What the interpreter or an installed program would do with these arguments; the exit status."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    how, *rest = call.arguments or [""]
    try:
        if call.name == "vdtrain":
            _prepare(os.path.dirname(call.program), [call.program, *call.arguments])
            sys.exit(importlib.import_module("vdtrain.cli").main())
        elif call.name == "torchrun":
            _prepare(os.path.dirname(call.program), [call.program, *call.arguments])
            sys.exit(importlib.import_module("torch.distributed.run").main())
        elif how == "-m":
            _prepare(os.getcwd(), ["-m", *rest[1:]])
            for name in (rest[0], f"{rest[0]}.__main__"):
                if "__path__" not in vars(sys.modules.get(name, main)):
                    sys.modules.pop(name, None)
            runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        elif how == "-c":
            _prepare("", ["-c", *rest[1:]])
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            _prepare(os.path.dirname(os.path.abspath(how)), [how, *rest])
            main.__dict__["__file__"] = how
            exec(compile(Path(how).read_bytes(), how, "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        # But for the frames of this file.
        frames = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(status: int) -> NoReturn:
    """End as an interpreter does, but for the objects of the process that was forked; by a signal if negative."""
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, *_old_streams):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if status < 0:
        _die_of(-status)
    os._exit(status)


_old_streams: list[Any] = []


def _prepare(path: str, argv: list[str]) -> None:
    sys.path.insert(0, path)
    sys.argv[:] = argv
    if (spec := importlib.machinery.PathFinder.find_spec("vdtrain")) is None or spec.origin is None:
        return
    if os.path.realpath(spec.origin) != os.path.realpath(str(sys.modules["vdtrain"].__file__)):
        _forget(*OWN_PACKAGES)


def _forget(*packages: str) -> None:
    """Let modules be imported anew where a call's variables or paths lead elsewhere."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def _of_hub(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(HUB_VARIABLES)}


def _exactly(link: socket.socket, length: int) -> bytes:
    content = b""
    while len(content) < length:
        part = link.recv(length - len(content))
        if not part:
            raise ConnectionError("a caller ended amid its call")
        content += part
    return content


def begin_libraries_anew(variables: dict[str, str]) -> None:
    """Bring about what an import would have: seeds from the system, and as many threads as the variables want."""
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].seed()
    threads = variables.get("OMP_NUM_THREADS", "")
    # It is also what makes PyTorch begin its pool of threads anew, which threads of autograd must not do at once.
    sys.modules["torch"].set_num_threads(int(threads) if threads.isdigit() else len(os.sched_getaffinity(0)))


def end_with_parent() -> None:
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _take_files(files: list[int], numbers: list[int]) -> None:
    """Have the caller's files under its numbers, and no others."""
    above = max(600, *numbers, *files) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    os.closerange(0, above)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _take_limits(caller: int) -> None:
    for limit in LIMITS:
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, resource.prlimit(caller, limit))


def _take_signals(call: Call) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in call.ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, call.blocked)


def take_streams(variables: dict[str, str]) -> None:
    """Begin text streams anew, which buffer by what is behind them."""
    _old_streams[:] = [sys.stdout, sys.stderr]
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream: Any = None
        with suppress(OSError):
            lines = name == "stderr" or os.isatty(number)
            stream = open(number, mode, 1 if lines else -1, closefd=False)  # noqa: SIM115
            stream.reconfigure(write_through="PYTHONUNBUFFERED" in variables)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if sys.stderr is not None:
        sys.stderr.reconfigure(errors="backslashreplace")


def _enter_namespaces(caller: int) -> None:
    """Be where the caller is, if that is another node of a test's cluster."""
    own, its = ({kind: os.stat(f"/proc/{who}/ns/{kind}").st_ino for kind in NAMESPACES} for who in ("self", caller))
    kinds = [kind for kind in NAMESPACES if own[kind] != its[kind]]
    if not kinds:
        return
    process = os.pidfd_open(caller)
    if libc.setns(process, sum(NAMESPACES[kind] for kind in kinds)) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(process)
    if "pid" not in kinds:
        return
    # Only children are in another namespace of process numbers.
    child = os.fork()
    if child != 0:
        _stand_for(child)
    end_with_parent()
    os.setsid()


def _stand_for(child: int) -> NoReturn:
    """Pass signals on, and end as the child does."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(number, lambda number, _: os.kill(child, number))
    os.closerange(0, 1000)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        _die_of(-status)
    os._exit(status)


def _die_of(number: int) -> NoReturn:
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    end_with_parent()
    if Path.cwd() != Path(__file__).parents[2]:
        # Another one forked this one for a clone, whose own they are.
        _forget("tests")
    Server(sys.argv[1]).serve()
