"""`heartbeat-export onnx`: a trained model folder becomes the bundle that is shipped."""

import argparse
import subprocess
import sys
from pathlib import Path

HELP = "write a bundle of ONNX graphs"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a HeartBeat model folder")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE_DIR")
    parser.add_argument("--name", default="", help="of the bundle (default: the preset's)")
    parser.add_argument(
        "--licence", default="Apache-2.0", help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="what the graphs compute in; inputs and outputs stay float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=(21, 22, 23),
        help="ONNX's; 22 has bfloat16, 23 Attention nodes (default: 21; 23 for bf16)",
    )
    parser.add_argument(
        "--flavour",
        choices=("standard", "plugin"),
        default="standard",
        help="plugin: nodes of the domain hb, for TensorRT with our plugins (default: %(default)s)",
    )
    parser.add_argument("--revision", default="", help="of the source (default: ask git)")


def run(options: argparse.Namespace) -> int:
    """Writes a bundle, past the parity gate against torch, or nothing."""
    from heartbeat_export.build import build_bundle, load_folder  # torch: only when work is to do
    from heartbeat_export.to_onnx import Recipe

    opset = options.opset or (23 if options.precision == "bf16" else 21)
    model, tokenizer, provenance, card = load_folder(options.model)
    manifest = build_bundle(
        model,
        tokenizer,
        options.out,
        name=options.name,
        revision=options.revision or source_revision(),
        licence=options.licence,
        provenance=provenance,
        card=card,
        recipe=Recipe(options.precision, opset, options.flavour),
        say=lambda line: print(line, file=sys.stderr),
    )
    size = sum(graph.bytes for graph in manifest.graphs.values()) / 1e6
    worst = max(manifest.parity["relative_l2"].values())
    print(
        f"{options.out}: {len(manifest.graphs)} graphs, {size:.1f} MB; from torch {worst:.1e}, "
        f"clip {manifest.parity['clip_psnr_db']} dB"
    )
    return 0


def source_revision() -> str:
    """This source's git revision, marked where it was changed; "unknown" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
