"""`heartbeat-export rollback`: the version before the last rebuild, to the byte."""

import argparse
from pathlib import Path

HELP = "put back the version before the last rebuild"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE_DIR")
    parser.add_argument("--no-wait", action="store_true", help="refuse where one is under way")


def run(options: argparse.Namespace) -> int:
    """Puts back the version before the last rebuild, once all its files were found whole."""
    from heartbeat_export.store import rollback

    manifest = rollback(options.bundle, wait=not options.no_wait).manifest
    weights = manifest.fingerprints.get("weights", "")[:16]
    print(f"{options.bundle}: back to {manifest.name} of {manifest.created}, weights {weights}")
    return 0
