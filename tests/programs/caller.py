"""`vdtrain`, `python` and `torchrun` as `tests.programs` installs them.

Sends arguments, variables and open files to the server, passes signals on, and ends as the fork does. Imports little.
"""

import contextlib
import json
import os
import signal
import socket
import sys

arguments = sys.argv[1:]
name = os.path.basename(sys.argv[0])
if name == "python" and arguments[:1] == ["-u"]:
    os.environ["PYTHONUNBUFFERED"], arguments = "1", arguments[1:]
if name == "python" and (not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-m", "-c"))):
    os.execv(sys.executable, [sys.executable, *arguments])

files = [int(number) for number in os.listdir("/proc/self/fd")]
link = socket.socket(socket.AF_UNIX)
link.connect(os.path.realpath(os.path.join(os.path.dirname(sys.argv[0]), "socket")))


def inherited(number):
    try:
        return os.get_inheritable(number)
    except OSError:
        return False  # that of the listing


files = [number for number in files if inherited(number)]
request = {
    "name": name,
    "program": os.path.abspath(sys.argv[0]),
    "arguments": arguments,
    "folder": os.getcwd(),
    "variables": dict(os.environ),
    "files": files,
    "umask": os.umask(0o22),
    "ignored": [int(number) for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN],
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "leads": os.getpgrp() == os.getpid(),
}
content = json.dumps(request).encode("utf-8", "surrogateescape")


def pass_on(number, frame):
    # It may have ended.
    with contextlib.suppress(OSError):
        # SIGKILL cannot be caught, so that another one stands for it.
        link.sendall(bytes([number if number != signal.SIGRTMIN else signal.SIGKILL]))


signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}:
    if number != signal.SIGRTMIN and signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler):
        continue
    if number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT, signal.SIGWINCH, signal.SIGURG):
        continue
    signal.signal(number, pass_on)

socket.send_fds(link, [len(content).to_bytes(4, "big")], files)
link.sendall(content)
# Those that are blocked are passed on all the same, and wait in the fork.
signal.pthread_sigmask(signal.SIG_SETMASK, [])
# Its ends of pipes are the fork's now.
null = os.open(os.devnull, os.O_RDWR)
for number in files:
    os.dup2(null, number)
answer = b""
while len(answer) < 4:
    try:
        part = link.recv(4 - len(answer))
    except ConnectionError:
        part = b""
    if not part:
        os._exit(70)
    answer += part
status = int(answer)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
    os.kill(os.getpid(), -status)
os._exit(status)
