"""`heartbeat-export rebuild`: new weights into a bundle, by the cheapest road that is right."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heartbeat_export.rebuild import Report

HELP = "bring a bundle to new weights"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a model folder")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE_DIR")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and why")
    parser.add_argument("--explain", action="store_true", help="name tensors and compiled graphs")
    parser.add_argument("--warm", action="store_true", help="compile for the engines used here")
    parser.add_argument("--json", action="store_true", help="the whole report, for programs")
    parser.add_argument("--no-wait", action="store_true", help="refuse where one is under way")
    for name, choices in (
        ("precision", ("fp32", "fp16", "bf16")),
        ("opset", (21, 22, 23)),
        ("flavour", ("standard", "plugin")),
    ):
        parser.add_argument(
            f"--{name}", type=type(choices[0]), choices=choices, help="by default the bundle's"
        )
    parser.add_argument("--revision", default="", help="of the source (default: ask git)")


def run(options: argparse.Namespace) -> int:
    """Decides between swap, rebuild and full export, says why, compares with torch, switches."""
    from heartbeat_export.commands.write_onnx import source_revision
    from heartbeat_export.decide import recipe_of
    from heartbeat_export.rebuild import rebuild
    from heartbeat_fast.bundle import Bundle

    asked = {name: getattr(options, name) for name in ("precision", "opset", "flavour")}
    asked = {name: value for name, value in asked.items() if value is not None}
    report = rebuild(
        options.bundle,
        options.checkpoint,
        recipe=replace(recipe_of(Bundle.open(options.bundle)), **asked),
        dry_run=options.dry_run,
        wait=not options.no_wait,
        warm=options.warm,
        revision=options.revision or source_revision(),
        say=lambda line: None if options.json else print(line, file=sys.stderr),
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _print(report, options.explain)
    return 0


def _print(report: "Report", explain: bool) -> None:
    if report.dry_run:
        print("\n".join(report.reasons))
    for graph, tensors in report.changed.items() if explain else ():
        print(f"{graph}: {', '.join(tensors)}")
    for line in _engines(report.engines, explain):
        print(line)
    done = ", nothing written" if report.dry_run else ""
    stages = ", ".join(f"{name} {s:.2f}" for name, s in report.seconds.items() if name != "all")
    line = f"{report.bundle}: road {report.road}{done}; {report.seconds['all']:.2f} s ({stages})"
    if report.parity:
        worst = max(report.parity["relative_l2"].values())
        line += f"; from torch {worst:.1e}"
    if "clip_psnr_db" in report.parity:
        line += f", clip {report.parity['clip_psnr_db']} dB"
    print(line)


def _engines(rows: list[dict[str, Any]], explain: bool) -> list[str]:
    """A line for each engine, what was done and why; with explain the graphs by name."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row["engine"], row["action"], row["why"]), []).append(row["graph"])
    return [
        f"engine {engine}: {', '.join(graphs) if explain else f'{len(graphs)} graphs'} "
        f"{action}: {why}"
        for (engine, action, why), graphs in groups.items()
    ]
