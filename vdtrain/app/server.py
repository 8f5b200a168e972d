"""Serving the page: to whom, where, and that nothing comes from or goes to another machine."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
import tempfile
import threading
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from vdtrain.app.desk import Desk
from vdtrain.config.command_schema import AppConfig
from vdtrain.errors import ConfigError
from vdtrain.files import check_output
from vdtrain.inference.checkpoint import describe
from vdtrain.inference.sampler import check_sampler, load_model, notes, settled

# Uploads above it are refused before they are stored.
MAX_UPLOAD_BYTES = 100_000_000
# Whatever a part of the page would load or send, it comes from this server and stays with it.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'"


def serve(config: AppConfig) -> int:
    """Load the model and serve its page until a signal.

    Raises:
        ConfigError: a setting that cannot work, or no complete checkpoint.
    """
    check_output(Path(config.output_dir), f"output_dir={config.output_dir}")
    with listening(config.host, config.port) as place:
        if not is_loopback(config.host):
            print(
                f"warning: host={config.host}: everyone who can reach this machine can use the page, without a "
                "password",
                file=sys.stderr,
            )
        found = describe(config)
        config = settled(config, found.model)
        check_sampler(config, found.model)
        for note in notes(config, found):
            print(f"note: {note}", file=sys.stderr)
        model = load_model(config, found)
        with tempfile.TemporaryDirectory(prefix="vdtrain-app-") as cache:
            # Read when Gradio is imported, and when a component is made.
            os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": cache}
            _serve(Desk(config, found, model), Path(cache), place)
    return 0


def _serve(desk: Desk, cache: Path, place: socket.socket) -> None:
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from vdtrain.app.page import CSS, THEME, Page

    config = desk.config
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        Page(desk, cache).blocks().queue(api_open=False),
        path="/",
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
        max_file_size=MAX_UPLOAD_BYTES,
        allowed_paths=[str(Path(config.output_dir).absolute())],
    )
    app.add_middleware(KeptHere)
    # Not by Gradio's launch, which asks the page of itself by way of the user's proxy and gives up on a busy machine.
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"http://{host}:{place.getsockname()[1]}", flush=True)
    try:
        thread.join()
    finally:
        server.should_exit = True
        thread.join(2)


def is_loopback(host: str) -> bool:
    """Whether an address is served to this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound to the port, or for 0 to one that is free.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        if isinstance(error, PermissionError):
            raise ConfigError(f"port={port}: needs more rights; choose one above 1023") from error
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ConfigError(f"port={port}: in use; choose another, or 0 for any that is free") from error
        raise ConfigError(f"host={host}: not an address of this machine; choose 127.0.0.1 or 0.0.0.0") from error


class KeptHere:
    """Adds the page's policy to every answer (ASGI middleware)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, answer)
