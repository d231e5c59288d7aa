"""The web application: health, clips over HTTP, frames over a WebSocket, and a page to steer them.

Everything runs from one process and one set of loaded graphs; the page needs no network.
docs/serve.md says how to talk to it.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heartbeat_fast import __version__
from heartbeat_fast.conditions import NAMES
from heartbeat_fast.errors import (
    ConditionError,
    EngineError,
    FileError,
    HeartBeatError,
    ServeError,
    optional,
)
from heartbeat_fast.generator import Generator
from heartbeat_fast.record import VIEWS
from heartbeat_fast.sampler import SamplerError, choose
from heartbeat_fast.serve.guard import LOOPBACK, Guard
from heartbeat_fast.serve.messages import accepted, clip_request, encoded, parsed
from heartbeat_fast.serve.scene import FARTHEST, Controls
from heartbeat_fast.serve.viewer import Viewer, serve_viewer
from heartbeat_fast.serve.worker import Busy, Cancelled, Late, Worker

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response, WebSocket

PAGE = Path(__file__).parent / "page"
LARGEST_BODY = 48 * 2**20  # bytes: all seven conditions of a clip at 256, in float32 and base64
BODY_SECONDS = 60  # within which a body must have come
MOST_VIEWERS = 4
LEAVING = 0.5  # seconds for a viewer who has gone to be let go, a step of its clip included


@dataclass(frozen=True)
class Settings:
    """Where to listen, and the token that a wider address than loopback demands.

    Raises:
        ServeError: bound wider without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8137
    token: str | None = None

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.token:
            raise ServeError(
                f"host: {self.host} is open to the network; wanted a token too: set "
                "HEARTBEAT_TOKEN, or stay on 127.0.0.1"
            )

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Host names a request may be for; None for any."""
        return LOOPBACK if self.host in LOOPBACK else None


def application(generator: Generator, settings: Settings | None = None) -> "FastAPI":
    """The ASGI application; its lifespan starts and stops the worker.

    Raises:
        MissingDependency: FastAPI is not installed.
    """
    fastapi = optional("fastapi", "web")
    staticfiles = optional("fastapi.staticfiles", "web")
    settings = settings or Settings()
    worker = Worker(generator)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    # Its documentation pages would load scripts from elsewhere.
    app: FastAPI = fastapi.FastAPI(
        title="heartbeat_fast",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.worker = worker
    app.add_middleware(Guard, hosts=settings.hosts, token=settings.token)
    app.mount("/page", staticfiles.StaticFiles(directory=PAGE), name="page")
    _add_health(app, worker)
    _add_clips(app, worker)
    _add_stream(app, worker)
    return app


def _add_health(app: "FastAPI", worker: Worker) -> None:
    responses = optional("fastapi.responses", "web")

    @app.get("/")
    async def page() -> Any:
        return responses.FileResponse(PAGE / "index.html")

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> Any:
        if worker.ready.is_set():
            return {"status": "ready", "waiting": worker.waiting}
        why = worker.failure or "warming up"
        return responses.JSONResponse({"error": why}, 503)

    @app.get("/v1/info")
    async def info() -> Any:
        try:
            return facts(worker.generator)
        except HeartBeatError as error:  # its folder went away: clips go on from memory
            return _answer(error)


def facts(generator: Generator) -> dict[str, Any]:
    """What the page and other clients need to know of the bundle and its engine."""
    manifest, engine = generator.bundle.manifest, generator.engine
    tables = generator.bundle.samplers()
    start, samplers = choose(tables, None, None), dict[str, list[int]]()
    for name, steps in sorted(tables):
        samplers.setdefault(name, []).append(steps)
    return {
        "version": __version__,
        "bundle": manifest.name,
        "weights": manifest.fingerprints.get("weights", ""),
        "frames": manifest.frames,
        "size": manifest.size,
        "engine": engine.name,
        "precision": engine.precision,
        "device": engine.device,
        "samplers": samplers,
        "start": {"sampler": start.name, "steps": start.steps},
        "conditions": list(NAMES),
        "views": list(VIEWS),
        "farthest_valve": round(FARTHEST * manifest.size, 2),
        "notice": "synthetic, not for diagnosis",
    }


def _add_clips(app: "FastAPI", worker: Worker) -> None:
    fastapi = optional("fastapi", "web")
    manifest = worker.generator.bundle.manifest

    async def clips(request: "Request") -> "Response":
        kind = accepted(request.headers.get("accept", ""))
        if kind is None:
            return _error(406, "accept: none of the kinds that a clip can be written as")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(415, "content-type: wanted application/json")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(request)
        except TimeoutError:
            return _error(408, f"body: not there after {BODY_SECONDS} s")
        if body is None:
            # Closed, or what is left of it would be read to its end.
            sentence = f"body: too long; wanted at most {LARGEST_BODY} bytes"
            return _error(413, sentence, Connection="close")
        asked = await asyncio.to_thread(clip_request, body, manifest.frames, manifest.size)
        prepare = lambda: asked.prepared(manifest.frames, manifest.size)  # noqa: E731
        ticket = worker.ask(prepare, asked.seconds)
        gone = asyncio.create_task(_watch(request, ticket.cancel))
        try:
            clip = await asyncio.wrap_future(ticket.future)
        finally:
            gone.cancel()
        content = await asyncio.to_thread(encoded, clip, kind[1], mark=asked.mark)
        headers = {
            "X-Synthetic": "true",
            "X-Generate-Ms": str(round(sum(clip.provenance["timings_ms"].values()), 1)),
            "Content-Disposition": f'attachment; filename="synthetic{kind[1]}"',
        }
        return fastapi.Response(content, media_type=kind[0], headers=headers)

    async def answered(request: "Request") -> "Response":
        try:
            return await clips(request)
        except Exception as error:
            return _answer(error)

    # FastAPI reads annotations from module scope, where its names must not be: routes by hand.
    app.router.add_route("/v1/clips", answered, methods=["POST"])


async def _body(request: "Request") -> bytes | None:
    """The body; None if it is too long.

    The rest of a body that is somewhat too long is read and thrown away: a client that is cut off
    while it sends never sees the answer.
    """
    body, came = bytearray(), 0
    async for piece in request.stream():
        came += len(piece)
        if came <= LARGEST_BODY:
            body += piece
        elif came > 4 * LARGEST_BODY:
            break
    return bytes(body) if came <= LARGEST_BODY else None


async def _watch(request: "Request", give_up: Any) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
    give_up()


def _error(status: int, sentence: str, **headers: str) -> "Response":
    responses = optional("fastapi.responses", "web")
    response: Response = responses.JSONResponse({"error": sentence}, status, headers)
    return response


def _answer(error: Exception) -> "Response":
    """An error as status and sentence."""
    match error:
        case Busy():
            return _error(429, str(error), **{"Retry-After": str(max(1, round(error.seconds)))})
        case Late():
            return _error(504, str(error))
        case Cancelled():
            return _error(499, str(error))
        case ConditionError() | SamplerError():
            return _error(422, str(error))
        case EngineError() if "wanted" in str(error):
            return _error(422, str(error))
        case FileError():  # the clip was made, and found no room on its way out
            return _error(507, str(error))
        case HeartBeatError():
            return _error(503, str(error))
    print(f"heartbeat serve: error: {type(error).__name__}: {error}", file=sys.stderr)
    return _error(500, "internal error: the server's log says more")


def _add_stream(app: "FastAPI", worker: Worker) -> None:
    start = Controls(**facts(worker.generator)["start"])
    viewers: set[Viewer] = set()
    gone = optional("fastapi", "web").WebSocketDisconnect

    async def stream(socket: "WebSocket") -> None:
        nonlocal start
        await socket.accept()
        with suppress(TimeoutError):  # one who has just gone is still being let go
            async with asyncio.timeout(LEAVING):
                while len(viewers) >= MOST_VIEWERS:
                    await asyncio.sleep(0.02)
        if len(viewers) >= MOST_VIEWERS:
            await socket.close(1013, f"{MOST_VIEWERS} viewers already: try again later")
            return
        with suppress(HeartBeatError):  # new weights may come with other samplers
            start = Controls(**facts(worker.generator)["start"])
        viewer = Viewer(worker.generator, start, socket.send_json, socket.send_bytes)
        viewers.add(viewer)
        try:
            for error in await serve_viewer(viewer, _listen(socket, viewer)):
                if not _is_farewell(error):
                    print(f"heartbeat serve: stream: {error!r}", file=sys.stderr)
        finally:
            viewers.discard(viewer)
            with suppress(RuntimeError, OSError, gone):  # the other side closed first
                await socket.close()

    app.router.add_websocket_route("/v1/stream", stream)


def _is_farewell(error: BaseException) -> bool:
    """Whether an error only says that the viewer has gone."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_farewell, error.exceptions))
    if isinstance(error, RuntimeError):
        return "close message has been sent" in str(error)
    gone = optional("fastapi", "web").WebSocketDisconnect
    return isinstance(error, (gone, OSError))


async def _listen(socket: "WebSocket", viewer: Viewer) -> None:
    """A viewer's messages, until it goes. What cannot be understood is answered, not obeyed."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        try:
            viewer.tell(parsed(message.get("text") or message.get("bytes") or b""))
        except HeartBeatError as error:
            await socket.send_json({"kind": "error", "error": str(error)})
