"""The options of `heartbeat serve igtl|web`; nothing heavy loads for --help."""

import argparse
import time
from typing import Any

IGTL_PORT, WEB_PORT = 18944, 8137


def add(commands: Any) -> None:
    """Adds `serve` with its two kinds to the command line's subparsers."""
    serve = commands.add_parser("serve", help="frames of a warm session to other programs")
    kinds = serve.add_subparsers(dest="kind", required=True, metavar="igtl|web")
    igtl = kinds.add_parser("igtl", help="an OpenIGTLink scanner: 3D Slicer, PLUS, simulators")
    igtl.set_defaults(run=_igtl)
    _common(igtl, IGTL_PORT)
    igtl.add_argument("--rate", type=float, default=25.0, help="frames/s, default: %(default)g")
    start = igtl.add_argument_group("what it starts with (clients change it)")
    start.add_argument("--anatomy", type=int, default=7, metavar="SEED", help="default: 7")
    start.add_argument("--ef", type=float, default=55.0, metavar="PERCENT", help="default: 55")
    start.add_argument("--heart-rate", type=float, default=60.0, metavar="BPM", help="default: 60")
    start.add_argument("--text", default="An ECHO with 4-chamber view.", help="the prompt")
    start.add_argument("--seed", type=int, default=0, help="of all noise, default: 0")
    how = igtl.add_argument_group("how")
    how.add_argument("--steps", type=int, help="default: what suits the bundle")
    how.add_argument("--sampler", help="default: what suits the bundle")
    how.add_argument("--carry", type=float, default=0.5, help="share of steps a change takes over")
    how.add_argument("--vary", action="store_true", help="another noise for every beat")
    web = kinds.add_parser("web", help="clips over HTTP, frames over a WebSocket, and a page")
    web.set_defaults(run=_web)
    _common(web, WEB_PORT)


def _common(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=port, help="default: %(default)s")
    parser.add_argument("--engine", default="auto", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--bundle", metavar="DIR|NAME", default="tiny-fast", help="default: %(default)s"
    )


def _igtl(options: argparse.Namespace) -> int:
    from heartbeat_fast.controls import Settings
    from heartbeat_fast.generator import Generator
    from heartbeat_fast.serve.igtl import IgtlServer
    from heartbeat_fast.stream import Session

    generator = Generator.open(options.bundle, options.engine, options.device)
    settings = Settings(
        steps=options.steps, sampler=options.sampler, carry=options.carry, vary=options.vary
    )
    start = {n: getattr(options, n) for n in ("anatomy", "ef", "heart_rate", "text", "seed")}
    with (
        Session(generator, settings, **start) as session,
        IgtlServer(session, options.host, options.port, options.rate) as server,
    ):
        print(f"igtl://{server.host}:{server.port} (synthetic, not for diagnosis)", flush=True)
        # Short sleeps: Ctrl-C between Python's look for signals and the system call, or taken by
        # another thread, does not end a sleep (2 of 60 hung when it came with the first line).
        while True:
            time.sleep(0.2)


def _web(options: argparse.Namespace) -> int:
    from heartbeat_fast.serve import web

    return web.run(options)
