"""What W&B's own client is_main to in tests: a server on this machine that keeps runs as W&B's keeps them."""

from __future__ import annotations

import gzip
import json
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENTITY = "team"
KEY = "k" * 40


@dataclass
class Run:
    """A run as the server has it: config by name, history by line, how often it was opened, whether it ended.

    Attributes:
        names: what the client called it: displayName, groupName, tags, notes, jobType.
        alerts: title and text of each.
        files: names of those that the client sent.
    """

    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    summary: str = "{}"
    opened: int = 0
    ended: bool = False

    @property
    def steps(self) -> list[int]:
        """Of all records, in the order in which the page shows them."""
        return [self.history[line]["step"] for line in sorted(self.history)]


class WandbServer(ThreadingHTTPServer):
    """Answers W&B's client as `mood` says: well, denied (401), silent (never) or broken (500).

    Attributes:
        runs: by id.
        deleted: ids of runs that were deleted in the web page.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.runs: dict[str, Run] = {}
        self.deleted: set[str] = set()
        self.mood = "well"
        self.woken = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, folder: Path) -> dict[str, str]:
        """Of a process whose W&B is this server, with its settings and credentials in `folder`."""
        # Where the W&B process of this one listens is among them.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        own = {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": KEY, "NETRC": str(folder / "netrc")}
        return clean | own | {"WANDB_CONFIG_DIR": str(folder), "WANDB_CACHE_DIR": str(folder), "HOME": str(folder)}

    def close(self) -> None:
        self.woken.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed leaves its connections."""


class Answer(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.mood == "silent":
            self.server.woken.wait(600)
        if self.server.mood != "well":
            self._say({"errors": [{"message": "not now"}]}, {"denied": 401}.get(self.server.mood, 500))
            return
        text = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path.endswith("/file_stream"):
            self._say(self._stream(self.server.runs[self.path.split("/")[-2]], json.loads(text)))
        elif self.path.startswith("/graphql"):
            asked = json.loads(text)
            known = {
                "Viewer": self._viewer,
                "RunResumeStatus": self._resume_status,
                "UpsertBucket": self._upsert,
                "CreateRunFiles": self._create_files,
                "NotifyScriptableRunAlert": self._alert,
            }
            answer = known.get(asked.get("operationName"), self._unknown)
            self._say(*answer(asked.get("variables") or {}))
        else:
            self._say({})

    do_PUT = do_GET = do_POST  # noqa: N815

    def _say(self, answer: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, run: Run, sent: dict[str, Any]) -> dict[str, Any]:
        for name, chunk in sent.get("files", {}).items():
            if name == "wandb-history.jsonl":
                for line, text in enumerate(chunk["content"], start=chunk["offset"]):
                    run.history[line] = json.loads(text)
            elif name == "wandb-summary.json":
                run.summary = chunk["content"][-1]
        run.ended = run.ended or bool(sent.get("complete"))
        return {"limits": {}}

    def _unknown(self, variables: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return {"data": {}}, 200

    def _alert(self, variables: dict[str, Any]) -> tuple[dict[str, Any], int]:
        self.server.runs[variables["runName"]].alerts.append((variables["title"], variables["text"]))
        return {"data": {"notifyScriptableRunAlert": {"success": True}}}, 200

    def _viewer(self, variables: dict[str, Any]) -> tuple[dict[str, Any], int]:
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer, "serverInfo": {}}}, 200

    def _resume_status(self, variables: dict[str, Any]) -> tuple[dict[str, Any], int]:
        name, bucket = variables["name"], None
        if name in self.server.runs and name not in self.server.deleted:
            run = self.server.runs[name]
            bucket = {
                "id": name,
                "name": name,
                "displayName": name,
                "summaryMetrics": run.summary,
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(run.history[max(run.history)])] if run.history else []),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        entity = {"id": "1", "name": ENTITY}
        model = {"id": "1", "name": variables["project"], "entity": entity, "bucket": bucket}
        return {"data": {"model": model}}, 200

    def _upsert(self, variables: dict[str, Any]) -> tuple[dict[str, Any], int]:
        name = variables["name"]
        if name in self.server.deleted:
            message = f"run {ENTITY}/x/{name} was previously created and deleted; try a new run name"
            return {"errors": [{"message": message}], "data": {"upsertBucket": None}}, 409
        inserted = name not in self.server.runs
        run = self.server.runs.setdefault(name, Run())
        if variables.get("host"):
            run.opened, run.ended = run.opened + 1, False
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        for key in ("displayName", "groupName", "tags", "notes", "jobType"):
            if variables.get(key):
                run.names[key] = variables[key]
        project = {"id": "1", "name": variables["project"], "entity": {"id": "1", "name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": variables.get("displayName") or name, "description": ""}
        bucket |= {"config": json.dumps(run.config), "sweepName": None, "project": project}
        bucket |= {"historyLineCount": len(run.history)}
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": inserted}}}, 200

    def _create_files(self, variables: dict[str, Any]) -> tuple[dict[str, Any], int]:
        self.server.runs[variables["run"]].files |= set(variables["files"])
        files = [{"name": name, "uploadUrl": f"{self.server.address}/upload/{name}"} for name in variables["files"]]
        return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}}, 200

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
