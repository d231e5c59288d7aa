"""`heartbeat-export triton-repository`: a bundle as a model repository for NVIDIA's server."""

import argparse
from pathlib import Path

HELP = "write a model repository for NVIDIA Triton Inference Server"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("bundle", help="a bundle's folder, or the name of an embedded one")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty")
    parser.add_argument("--name", default="", help="of the models (default: the bundle's)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="(default: cpu)")


def run(options: argparse.Namespace) -> int:
    """Writes one model a graph and an ensemble of the encoders; its README says how to start."""
    from heartbeat_export.triton_repository import write_repository
    from heartbeat_fast.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    models = write_repository(bundle, options.out, name=options.name, device=options.device)
    print(f"{options.out}: {len(models)} models; {options.out / 'README.md'} says how to start it")
    return 0
