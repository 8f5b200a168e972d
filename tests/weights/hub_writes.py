"""A small server that takes a push as Hugging Face's hub does: repositories, large files by LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "t" * 34


@dataclass
class Repository:
    """Attributes: files by name; private, as it was asked for; commits: message and names of each."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)


class WritableHub:
    """Runs between `with` and its end. The token may write to repositories of `me` alone.

    Attributes:
        repositories: by name, me/NAME.
        objects: large files by their SHA-256.
        requests: "METHOD path" of each.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WritableHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        if method == "PUT" and (match := re.fullmatch("/objects/([0-9a-f]{64})", path)):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return 400, {"error": "not these bytes"}
            self.objects[match[1]] = body
            return 200, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != "me":
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            name = f"me/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
            self.repositories[name] = Repository(asked.get("visibility") == "private")
            return 200, {"url": f"{self.address}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            ok = json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [] if ok else [{"message": "no head"}], "warnings": []}
        match = re.fullmatch(r"(?:/api/models)?/(me/[\w-]+)(?:\.git)?(/.*)?", path)
        if match is None or match[1] not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._of(self.repositories[match[1]], match[1], match[2] or "", body)

    def _of(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any]:
        if rest == "":
            return 200, {"id": name, "private": repository.private, "siblings": [], "sha": "0" * 40}
        if rest == "/preupload/main":
            files = json.loads(body)["files"]
            modes = {each["path"]: "lfs" if each["path"].endswith(".safetensors") else "regular" for each in files}
            return 200, {
                "files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            }
        if rest == "/info/lfs/objects/batch":
            objects = [
                {**each, **({} if each["oid"] in self.objects else {"actions": {"upload": self._upload(each["oid"])}})}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if rest == "/commit/main":
            lines = [json.loads(line) for line in body.decode().splitlines()]
            made = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    made[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    made[value["path"]] = self.objects[value["oid"]]
            repository.files |= made
            repository.commits.append((lines[0]["value"]["summary"], sorted(made)))
            return 200, {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{self.address}/{name}/commit/{'1' * 40}",
            }
        return 404, {"error": f"no such endpoint: {rest}"}

    def _upload(self, oid: str) -> dict[str, Any]:
        return {"href": f"{self.address}/objects/{oid}", "header": {}}


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: WritableHub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def do_PUT(self) -> None:
        self._respond()

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.command == "PUT"
        status, content = self.hub.answer(self.command, path, body) if allowed else (401, {"error": "Invalid token"})
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        pass
