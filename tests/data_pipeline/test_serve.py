"""The demo's server is stopped as any other program, and says when its port is taken (two seconds)."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from tests.programs import free_port, program


def test_serving_ends_well_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    command = [program("python"), "-m", "miniature", "serve", "data=shapes", f"data.shapes.port={port}"]
    (tmp_path / "images").mkdir()
    process = subprocess.Popen([*command, f"data.root={tmp_path}"])

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    deadline = time.monotonic() + 120
    while not answers():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = subprocess.run([*command, f"data.root={tmp_path}"], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"data.shapes.port={port}: Address already in use; give another port" in second.stderr
    process.terminate()
    assert process.wait(timeout=120) == 0
