"""heartbeat: makes, extracts and explains. Errors are one line and exit code 2."""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from heartbeat_fast.errors import FileError, HeartBeatError
from heartbeat_fast.serve.commands import add as add_serve

if TYPE_CHECKING:  # numpy and all that is ours load when a command runs, not for --help
    from heartbeat_fast.generator import Progress
    from heartbeat_fast.record import Record

FILES = {
    "image": "image prior: first frame of any picture, video, DICOM, NIfTI or npy",
    "sketch": "edge map 0-1: likewise",
    "mask": "labels 0 background, 1 LV cavity, 2 myocardium, 3 left atrium: png, NIfTI, npy",
    "skeleton": "mitral-valve line: picture, gif, video, npy",
    "flow": "pixels per frame (F,2,H,W): npy, npz",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `heartbeat`; returns the exit code: 0, or 2 for errors the user can mend."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _warn
    try:
        code: int = options.run(options)
    except HeartBeatError as error:
        print(f"heartbeat {options.command}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"heartbeat {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help explains)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="heartbeat", description=__doc__)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    make = commands.add_parser("sample", help="make a clip from any subset of the conditions")
    make.set_defaults(run=_sample)
    _add_record(make)
    given = make.add_argument_group("conditions (each replaces what --from gives)")
    given.add_argument("--text", help='the prompt, e.g. "An ECHO with 4-chamber view."')
    given.add_argument("--ef", type=float, metavar="PERCENT", help="ejection fraction, 0-100")
    for name, what in FILES.items():
        given.add_argument(f"--{name}", metavar="FILE", help=what)
    how = make.add_argument_group("how")
    how.add_argument("--steps", type=int, help="default: what suits the bundle; 10, tiny-fast 4")
    how.add_argument("--guidance", type=float, default=1.0, help="default: %(default)s (none)")
    how.add_argument(
        "--temperature", type=float, default=0.8, help="variety: scale of the initial noise, 0-2"
    )
    how.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    how.add_argument("--sampler", help="default: the bundle's; dpmpp_2m, unipc, ddim, euler")
    how.add_argument(
        "--engine", default="auto", help="default: %(default)s; onnxruntime, torch:MODEL_DIR"
    )
    how.add_argument("--device", default="cpu", help="default: %(default)s; cuda, … by engine")
    how.add_argument("--bundle", metavar="DIR|NAME", help="default: tiny; tiny-fast, or a folder")
    out = make.add_argument_group("output")
    out.add_argument(
        "--out", required=True, metavar="PATH", help=".dcm .nii.gz .mp4 .gif .webp .png .npz"
    )
    out.add_argument(
        "--preview",
        nargs="?",
        const="",
        metavar="PATH",
        help="also the clip with its conditions beside it (default: OUT.preview.*)",
    )
    out.add_argument("--no-mark", action="store_true", help="no visible SYNTHETIC in pictures")
    _add_json(out)

    extract = commands.add_parser("extract", help="read the conditions off a clip into an npz")
    extract.set_defaults(run=_extract)
    _add_record(extract)
    extract.add_argument("--out", required=True, metavar="PATH", help=".npz, which --from reads")
    _add_json(extract)

    doctor = commands.add_parser("doctor", help="what this machine can run, and why not")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--bundle", metavar="DIR", help="default: the embedded one")
    _add_json(doctor)
    add_serve(commands)
    return parser


def _add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE|NAME:SEED",
        help="a NIfTI, DICOM, video, picture or npz file, or phantom:SEED",
    )
    parser.add_argument("--window", metavar="START:STOP", help="these frames of a long clip")
    parser.add_argument(
        "--conditions",
        metavar="NAMES",
        help="only these, e.g. mask,sketch,text (default: all that are given)",
    )


def _add_json(parser: Any) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="the facts as JSON, into a file or instead of the words",
    )


def _sample(options: argparse.Namespace) -> int:
    from heartbeat_fast.bundle import Bundle
    from heartbeat_fast.clip import writable
    from heartbeat_fast.generator import Generator
    from heartbeat_fast.inputs import gather

    # Everything that can be wrong is asked before the work, not after it.
    out, preview = writable(options.out), _preview_path(options)
    start = time.perf_counter()
    bundle = Bundle.open(options.bundle)
    frames, size = bundle.manifest.frames, bundle.manifest.size
    record = _record(options, frames, size)
    given = {name: getattr(options, name) for name in ("text", "ef", *FILES)}
    conditions = gather(given, record, _names(options), frames, size)
    generator = Generator.open(bundle, options.engine, options.device)
    ready = time.perf_counter()
    with _bar("denoise") as progress:
        clip = generator(
            conditions,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            sampler=options.sampler,
            temperature=options.temperature,
            spacing_mm=record.spacing_mm if record else (1.0, 1.0),
            fps=record.fps if record else 30.0,
            progress=progress,
        )
    made = time.perf_counter()
    clip.save(out, mark=not options.no_mark)
    facts = {"out": str(out), **clip.provenance, "source": options.source}
    facts["seconds"] = {"prepare": round(ready - start, 3), "generate": round(made - ready, 3)}
    if preview is not None:
        from heartbeat_fast.preview import save_preview

        save_preview(preview, conditions, clip, mark=not options.no_mark)
        facts["preview"] = str(preview)
    _report(options, facts, _said(clip.frames.shape, facts))
    return 0


def _extract(options: argparse.Namespace) -> int:
    import numpy as np

    from heartbeat_fast.conditions import FRAMES, SIZE
    from heartbeat_fast.files import atomic

    if Path(options.out).suffix.lower() != ".npz":
        raise FileError(f"{options.out}: unknown suffix; wanted .npz")
    record = _record(options, FRAMES, SIZE)
    if record is None:
        raise FileError("from: nothing came; wanted --from FILE or --from phantom:SEED")
    conditions = record.conditions(_names(options))
    arrays: dict[str, Any] = {
        "frames": record.frames,
        "spacing_mm": record.spacing_mm,
        "fps": record.fps,
        **{name: getattr(conditions, name) for name in conditions.present},
    }
    with atomic(options.out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    facts = {
        "out": options.out,
        "source": options.source,
        "conditions": list(conditions.present),
        "spacing_mm": record.spacing_mm,
        "fps": record.fps,
        "text": conditions.text,
        "ef": conditions.ef,
    }
    _report(options, facts, f"{options.out}: {', '.join(conditions.present)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from heartbeat_fast.doctor import describe, examine

    facts = examine(options.bundle)
    _report(options, facts, describe(facts))
    return 0 if facts["ready"] else 1


def _record(options: argparse.Namespace, frames: int, size: int) -> "Record | None":
    from heartbeat_fast.inputs import open_source

    if options.source is None:
        if options.window:
            raise FileError("window: nothing to cut; wanted --from FILE with it")
        return None
    return open_source(options.source, options.window, frames, size)


def _names(options: argparse.Namespace) -> tuple[str, ...] | None:
    from heartbeat_fast.conditions import check_names

    if options.conditions is None:
        return None
    return check_names(name.strip() for name in options.conditions.split(",") if name.strip())


def _preview_path(options: argparse.Namespace) -> Path | None:
    from heartbeat_fast.clip import PICTURES, writable

    if options.preview is None:
        return None
    out = Path(options.out)
    suffix = out.suffix if out.suffix.lower() in PICTURES else ".gif"
    path = writable(options.preview or out.with_name(f"{out.stem}.preview{suffix}"))
    if path.suffix.lower() not in PICTURES:
        raise FileError(f"{path}: a preview is a picture; wanted .gif, .mp4, .webp or .png")
    return path


@contextmanager
def _bar(what: str) -> "Iterator[Progress | None]":
    """A progress bar on stderr, where somebody looks at it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _said(shape: tuple[int, ...], facts: dict[str, Any]) -> str:
    frames, rows, columns = shape
    seconds, stages = facts["seconds"], facts["timings_ms"]
    parts = ", ".join(f"{stage} {ms:.0f}" for stage, ms in stages.items() if ms >= 1)
    return (
        f"{facts['out']}: {frames} frames of {rows}×{columns} in {seconds['generate']:.2f} s "
        f"(ms: {parts}; prepared in {seconds['prepare']:.2f} s), {facts['engine']}, "
        f"conditions {', '.join(facts['conditions']) or 'none'}"
    )


def _report(options: argparse.Namespace, facts: dict[str, Any], words: str) -> None:
    """Words on stdout; with --json the facts there instead, or in a file beside the words."""
    text = json.dumps(facts, indent=1, default=str)
    if options.json == "-":
        print(text)
        return
    if options.json:
        from heartbeat_fast.files import atomic

        with atomic(options.json) as temporary:
            temporary.write_text(text + "\n", "utf-8")
    print(words)


def _warn(message: Warning | str, *rest: Any, **named: Any) -> None:
    print(f"heartbeat: warning: {message}", file=sys.stderr)


def _version() -> str:
    from heartbeat_fast import __version__

    return f"heartbeat_fast {__version__}"


if __name__ == "__main__":
    sys.exit(main())
