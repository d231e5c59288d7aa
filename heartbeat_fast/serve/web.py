"""`heartbeat serve web`: where it listens, for whom, and with what limits."""

import argparse
import os
import socket
from typing import TYPE_CHECKING, Any

from heartbeat_fast.errors import ServeError, optional
from heartbeat_fast.generator import Generator
from heartbeat_fast.serve.application import Settings, application

if TYPE_CHECKING:
    from fastapi import FastAPI

LARGEST_MESSAGE = 2**20  # bytes of a WebSocket message: a painted frame in base64 is 2**17


def run(options: argparse.Namespace) -> int:
    """Serves until interrupted.

    Raises:
        ServeError: the port is in use, or the address is open to the network without a token.
        HeartBeatError: the bundle or engine cannot be opened.
    """
    uvicorn = optional("uvicorn", "web")
    optional("websockets", "web")
    settings = Settings(options.host, options.port, os.environ.get("HEARTBEAT_TOKEN") or None)
    listening = _bound(settings)
    generator = Generator.open(options.bundle, options.engine, options.device)
    app = application(generator, settings)
    port = listening.getsockname()[1]
    print(f"http://{settings.host}:{port}/ (synthetic, not for diagnosis)", flush=True)
    server(uvicorn, app).run(sockets=[listening])
    return 0


def server(uvicorn: Any, app: "FastAPI") -> Any:
    """A uvicorn server with our limits."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        ws_max_size=LARGEST_MESSAGE,
        ws_max_queue=8,
        ws_per_message_deflate=False,  # frames of speckle hardly shrink, and wait for it
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
        limit_concurrency=64,
        server_header=False,
    )
    return uvicorn.Server(config)


def _bound(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServeError(
            f"{settings.host}:{settings.port}: cannot listen ({reason}): choose another --port"
        ) from error
