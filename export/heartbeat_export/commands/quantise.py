"""`heartbeat-export quantise`: int8 for OpenVINO on this machine, behind the parity gate."""

import argparse
import json
from pathlib import Path

HELP = "make the int8 graphs that --engine openvino:int8 runs"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--bundle", metavar="BUNDLE", help="folder or name; the embedded default")
    parser.add_argument("--source", default="phantom", help="of calibration records (phantom)")
    parser.add_argument("--steps", type=int, help="of the sampler; default the bundle's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(options: argparse.Namespace) -> int:
    """Calibrates on generated latents, quantises denoise and decode, and keeps the result in the
    user's cache if its clips are near enough to fp32's."""
    from heartbeat_export.quantise import quantise
    from heartbeat_fast.bundle import Bundle
    from heartbeat_fast.files import atomic

    bundle = Bundle.open(options.bundle)
    figures = quantise(bundle, source=options.source, steps=options.steps, say=print)
    if options.json:
        with atomic(options.json) as file:
            file.write_text(json.dumps(figures, indent=1), "utf-8")
    clips = ", ".join(f"{value} dB" for value in figures["psnr_db"])
    print(
        f"bundle {bundle.manifest.name}: openvino:int8 is ready; held-out clips at {clips} of fp32"
    )
    return 0
