"""A small server that answers as Hugging Face's hub does, and has files beside it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Serves `folder`/ORG/REPO for every repository at its one commit, between `with` and its end.

    Args:
        commits: by repository, ORG/REPO or datasets/ORG/REPO. The branch main is that commit, too.
        images: a folder that is served as it is, beside the repositories; None if there is none.
    """

    def __init__(self, folder: Path, commits: Mapping[str, str], images: Path | None = None) -> None:
        self.folder, self.commits, self.images = folder, commits, images
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.port = int(self._server.server_port)
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers."""
        if self.images is not None and (self.images / path[1:]).is_file():
            return 200, (self.images / path[1:]).read_bytes(), {"Content-Type": "image/jpeg"}
        for repository, commit in self.commits.items():
            root, revision = self.folder / repository, f"(?:main|{commit})"
            place = repository if repository.startswith("datasets/") else f"models/{repository}"
            if match := re.fullmatch(f"/{repository}/resolve/{revision}/(.+)", path):
                if not (root / match[1]).is_file():
                    return 404, b"", {"X-Error-Code": "EntryNotFound"}
                content = (root / match[1]).read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                return 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}
            files = [file for file in sorted(root.rglob("*")) if file.is_file()]
            names = [str(file.relative_to(root)) for file in files]
            if re.match(f"/api/{place}/revision/{revision}", path):
                found = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                return 200, json.dumps(found).encode(), {}
            if re.match(f"/api/{place}/tree/{revision}", path):
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                    for name, file in zip(names, files, strict=True)
                ]
                return 200, json.dumps(entries).encode(), {}
        return 404, b"", {"X-Error-Code": "RepoNotFound"}


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        status, content, headers = self.hub.answer(self.path.split("?")[0])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass
