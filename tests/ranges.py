"""A web server of a folder that answers requests for byte ranges."""

from __future__ import annotations

import re
from http.server import SimpleHTTPRequestHandler
from pathlib import Path


class Ranges(SimpleHTTPRequestHandler):
    """Serves `directory`."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        asked, path = self.asked(), Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
        else:
            self.answer(path.read_bytes(), *asked)

    def asked(self) -> tuple[int, int] | None:
        """First byte of the range that is asked for, and the byte after its last."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return None if found is None else (int(found[1]), int(found[2]) + 1)

    def answer(self, content: bytes, start: int, end: int) -> None:
        part = content[start:end]
        if not part:
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
