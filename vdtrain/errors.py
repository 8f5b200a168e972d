"""One line with a remedy for every error: a user's mistake, the operating system's, or a missing extra."""

from __future__ import annotations

import errno
import os
import pwd
import re
import resource
import shlex
import tempfile
from importlib.util import find_spec
from pathlib import Path

# The packages of each extra (pyproject.toml), and the extra of each package.
PACKAGES = {
    "app": ("fastapi", "gradio", "uvicorn"),
    "data": ("img2dataset", "pillow_heif", "webdataset"),
    "distributed": ("pyspark", "ray"),
    "evaluation": ("matplotlib", "nltk", "sacrebleu", "scipy"),
    "stores": ("gcsfs", "s3fs"),
    "tracking": ("tensorboardX", "wandb"),
    "xformers": ("xformers",),
}
EXTRAS = {package: extra for extra, packages in PACKAGES.items() for package in packages}


def install(*packages: str) -> str:
    """The command that installs the extras of `packages`, marked as a command of a message."""
    extras = ",".join(sorted({EXTRAS[package] for package in packages}))
    return f"`pip install 'vdtrain[{extras}]'`"


def missing(package: str) -> str | None:
    """A line that names the extra of a package; None if the package is installed. Imports nothing."""
    return None if find_spec(package) else f"{package} is not installed; run {install(package)}"


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the setting, its value and the remedy.

    Attributes:
        status: the exit status of a command.
    """

    status = 2


class NothingError(ConfigError):
    """The settings work, and what they name holds nothing that can be used."""

    status = 1


def printable(text: str) -> str:
    r"""The text on one line: a line break in a value is shown as \n, and so on for every control character."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


# How libraries in Rust and Arrow write the number of an error that they wrap.
WRAPPED = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
PROBE_BYTES = 4096

DISK = {errno.EIO, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.EUCLEAN, errno.EBADMSG}
SERVER = {errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ESHUTDOWN}
SERVER |= {errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH}
# Errors that another place does not fix.
OF_THE_PROCESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Causes and remedies that are the same for every path; an empty cause means the text of the operating system.
KNOWN = {
    errno.EDQUOT: ("", "remove files, or ask for a larger quota"),
    errno.EFBIG: ("", "raise the limit (`ulimit -f unlimited`)"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.ENFILE: ("too many open files on this machine", "raise the limit (`sysctl fs.file-max`)"),
    errno.ENOMEM: ("", "free memory on this machine"),
}
# What the operating system may no longer say a moment later.
PASSING = DISK | SERVER | {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENFILE, errno.ENOMEM}
PASSING |= {errno.ECONNABORTED, errno.ECONNRESET, errno.ENETRESET}


def unwritable(error: OSError, path: Path, another: str = "choose another place") -> str:
    """ "cannot be written (CAUSE); REMEDY": the end of a message that begins with the setting or the file.

    Args:
        path: the file or folder that was not written.
        another: the remedy if the place is the problem; empty if another place does not help.
    """
    cause, remedy = _explained(error, path)
    remedies = [each for each in (remedy, "" if error.errno in OF_THE_PROCESS else another) if each]
    return f"cannot be written ({cause}); {', or '.join(remedies) or f'check {path}'}"


def unreadable(error: OSError, path: Path, another: str = "give another file") -> str:
    """ "cannot be read (CAUSE); REMEDY", like `unwritable`.

    Args:
        another: the remedy if none is known for the cause.
    """
    cause, remedy = _explained(error, path)
    # Moving a folder away, which helps a writer, gives nothing to read.
    return f"cannot be read ({cause}); {(remedy if not isinstance(error, IsADirectoryError) else '') or another}"


def described(error: OSError) -> str:
    """ "FILE: CAUSE; REMEDY" for an error without a message of its own."""
    path = Path(str(error.filename)) if isinstance(error.filename, str | os.PathLike) else None
    cause, remedy = _explained(error, path or Path())
    return f"{f'{path}: ' if path else ''}{cause}; {remedy or 'check that it can be read and written'}"


def unlockable(error: OSError, path: Path) -> str:
    """ "cannot be locked (CAUSE); REMEDY", like `unwritable`."""
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        return f"cannot be locked ({os.strerror(error.errno)}); choose a file system with locks"
    return unwritable(error, path).replace("written", "locked", 1)


def not_utf8(error: UnicodeDecodeError, path: Path) -> str:
    """ "is not UTF-8 ...; REMEDY" for a text file, which is often in a code page of Windows.

    A parquet file is binary: a name in it that is not UTF-8 means damage, and no conversion helps.
    """
    if path.suffix.lower() == ".parquet":
        return f"cannot be read ({one_line(error)}); give another file"
    quoted, draft = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    if path.suffix.lower() == ".gz":
        packed = shlex.quote(f"{path}.utf8.gz")
        command = f"gzip -t {quoted} && gzip -dc {quoted} | iconv -f WINDOWS-1252 -t UTF-8 -o {draft}"
        command += f" && gzip {draft} && mv {packed} {quoted}"
    else:
        command = f"iconv -f WINDOWS-1252 -t UTF-8 {quoted} -o {draft} && mv {draft} {quoted}"
    byte = error.object[error.start]
    return f"is not UTF-8 (byte {byte:#04x}); convert it, e.g. from Windows' code page by `{command}`"


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that an exception is, or that a library wrapped in an exception of its own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    # A ValueError is our own message, which may quote such a text.
    wrapped = None if isinstance(error, ValueError) else WRAPPED.search(str(error))
    if wrapped is None:
        return error if isinstance(error, OSError) else None
    number = int(wrapped[1] or wrapped[2])
    return OSError(number, os.strerror(number))


# What PyTorch and CUDA's libraries say, beside torch.OutOfMemoryError, when memory is out.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory of the GPU or of the machine is out; PyTorch need not be imported."""
    names = {each.__name__ for each in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def passes(error: BaseException | None) -> bool:
    """Whether the same action may succeed later: by the error's own word, or by the system's error behind it."""
    while error is not None:
        said = getattr(error, "passes", None)
        if said is not None:
            return bool(said)
        found = system_error(error)
        if found is not None and found.errno in PASSING:
            return True
        error = error.__cause__
    return False


def output_problem(folder: Path) -> str | None:
    """Why nothing can be written into a folder, in the words of `unwritable`; None if it can be.

    If the folder does not exist yet, its nearest existing parent is tried, with a temporary file without a name.
    """
    for place in (folder, *folder.absolute().parents):
        try:
            place.stat()
        except FileNotFoundError as error:
            if place.is_symlink():
                return unwritable(error, place)
            continue
        except OSError as error:
            return unwritable(error, folder)
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(PROBE_BYTES))
        except OSError as error:
            return unwritable(error, place)
        break
    return None


def _explained(error: OSError, path: Path) -> tuple[str, str]:
    """Cause and remedy of an error of an action on `path`; an empty remedy if none is known."""
    if error.errno is None:
        return one_line(error), ""
    cause, remedy = _of_number(error.errno, path)
    return cause or os.strerror(error.errno), remedy


def _of_number(number: int, path: Path) -> tuple[str, str]:
    """Cause and remedy, as in `KNOWN`."""
    quoted = shlex.quote(str(path))
    if number == errno.ENOSPC:
        return _full(path)
    if number == errno.EACCES:
        return f"permission denied to {_user()}", f"give that user access (`ls -ld {shlex.quote(str(_nearest(path)))}`)"
    if number == errno.EPERM:
        place = shlex.quote(str(_nearest(path)))
        return f"{_nearest(path)} is protected", f"remove the protection (`lsattr -d {place}`, `chattr -ia {place}`)"
    if number == errno.EROFS:
        mounted = shlex.quote(str(_mount_point(path)))
        return "its file system is read-only", f"mount it for writing (`mount -o remount,rw {mounted}`)"
    if number in (errno.ENOTDIR, errno.EEXIST):
        file = next((each for each in (path, *path.absolute().parents) if _is_file(each)), None)
        if file is not None:
            return f"{file} is a file, not a folder", f"move {file} away"
    if number in (errno.ENOENT, errno.EEXIST):
        return _absent(path)
    if number == errno.EISDIR:
        return f"{path} is a folder, not a file", f"move {path} away"
    if number == errno.ELOOP:
        return "its links form a circle", f"fix the links (`namei -l {quoted}`)"
    if number in DISK:
        return f"{os.strerror(number)}, the disk is failing", "check the disk (`dmesg` shows its errors)"
    if number in SERVER:
        return f"{os.strerror(number)}, its file server does not answer", "check the server, or mount it again"
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too many open files, the limit is {soft}", f"raise the limit (`ulimit -n {hard}`)"
    if number in (errno.EBUSY, errno.ETXTBSY):
        return "", f"end what uses it (`fuser -v {quoted}`)"
    return KNOWN.get(number, ("", ""))


def _full(path: Path) -> tuple[str, str]:
    place = _nearest(path)
    try:
        disk = os.statvfs(place)
    except OSError:
        return "", "make room"
    if disk.f_files and disk.f_favail == 0 and disk.f_bavail:
        return "no more files fit on its disk, whatever their size", f"remove files there (`df -i {place}`)"
    return "", "make room"


def _absent(path: Path) -> tuple[str, str]:
    link = next((each for each in (path, *path.absolute().parents) if each.is_symlink() and not each.exists()), None)
    if link is not None:
        return f"{link} leads to {os.readlink(link)}, which does not exist", "mount its disk, or remove the link"
    nearest = _nearest(path)
    if path.is_absolute() and nearest in (path.parent, path):
        return "", ""
    first = next((each for each in (path, *path.absolute().parents) if each.parent == nearest), path)
    if first == path:
        return "", ""
    return f"folder {first} does not exist", "mount its disk, or restore the folder"


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except OSError:
        return False


def _nearest(path: Path) -> Path:
    """The path itself, or its nearest existing parent."""
    for place in (path, *path.absolute().parents):
        try:
            if place.exists():
                return place
        except OSError:
            continue
    return Path("/")


def _mount_point(path: Path) -> Path:
    place = _nearest(path).absolute()
    return next((each for each in (place, *place.parents) if each.is_mount()), Path("/"))


def _user() -> str:
    try:
        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    except KeyError:
        return f"user {os.geteuid()}"
