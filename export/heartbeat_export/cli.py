"""heartbeat-export: from a trained model folder to the bundle that is shipped."""

import argparse
import subprocess
import sys
from pathlib import Path

from heartbeat_fast.errors import HeartBeatError


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `heartbeat-export`; returns the exit code, 2 for errors the user can mend."""
    parser = argparse.ArgumentParser(prog="heartbeat-export", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    onnx = commands.add_parser(
        "onnx",
        help="write a bundle of ONNX graphs",
        description="Writes a bundle, past the parity gate against torch, or nothing.",
    )
    onnx.add_argument("model", type=Path, metavar="MODEL_DIR", help="a HeartBeat model folder")
    onnx.add_argument("--out", type=Path, required=True, metavar="BUNDLE_DIR")
    onnx.add_argument("--name", default="", help="of the bundle (default: the preset's)")
    onnx.add_argument(
        "--licence", default="Apache-2.0", help="of the weights (default: %(default)s)"
    )
    onnx.add_argument("--revision", default="", help="of the source (default: ask git)")
    options = parser.parse_args(arguments)
    try:
        return _onnx(options)
    except HeartBeatError as error:
        print(f"heartbeat-export: error: {error}", file=sys.stderr)
        return 2


def _onnx(options: argparse.Namespace) -> int:
    from heartbeat_export.build import build_bundle, load_folder  # torch: only when work is to do

    model, tokenizer, provenance, card = load_folder(options.model)
    manifest = build_bundle(
        model,
        tokenizer,
        options.out,
        name=options.name,
        revision=options.revision or _revision(),
        licence=options.licence,
        provenance=provenance,
        card=card,
        say=lambda line: print(line, file=sys.stderr),
    )
    size = sum(graph.bytes for graph in manifest.graphs.values()) / 1e6
    worst = max(manifest.parity["relative_l2"].values())
    print(
        f"{options.out}: {len(manifest.graphs)} graphs, {size:.1f} MB; from torch {worst:.1e}, "
        f"clip {manifest.parity['clip_psnr_db']} dB"
    )
    return 0


def _revision() -> str:
    """This source's git revision, marked where it was changed; "unknown" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
