"""A web server of the shards that resets, refuses and stalls."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.drill.starts import fork, helpers, wait_for
from tests.programs.server import end_with_parent
from tests.ranges import Ranges

STALL_SECONDS = 30.0


@dataclass(frozen=True)
class Trouble:
    """Parts of the answers that fail: with a status, by a reset amid their bytes, or by silence there."""

    failing: float = 0.0
    status: int = 503
    reset: float = 0.0
    stall: float = 0.0


class _Handler(Ranges):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, trouble: Trouble, generator: random.Random, **settings: Any) -> None:
        self.trouble, self.generator = trouble, generator
        super().__init__(*arguments, **settings)

    def answer(self, content: bytes, start: int, end: int) -> None:
        chance = self.generator.random()
        if chance < self.trouble.failing:
            self.send_error(self.trouble.status)
        elif chance < self.trouble.reset + self.trouble.stall:
            part = content[start:end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            if chance < self.trouble.stall:
                time.sleep(STALL_SECONDS)
            # A close that waits for nothing is a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            super().answer(content, start, end)


@contextlib.contextmanager
def served(place: Path, trouble: Trouble | None) -> Iterator[list[str]]:
    """Settings of a run whose shards come from such a server while the block lasts; none without trouble."""
    if trouble is None:
        yield []
        return
    handler = partial(_Handler, directory=str(place / "data"), trouble=trouble, generator=random.Random(0))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True

        def serve() -> int:
            end_with_parent()
            server.serve_forever()
            return 0

        pid = fork(serve)
        helpers.add(pid)
    try:
        yield [f"+data.stream.shard_root=http://127.0.0.1:{server.server_address[1]}/manifest"]
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_for([pid])
        helpers.discard(pid)
