"""heartbeat-train data check: everything in a data set read once, and all that is wrong named."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from heartbeat_training.datasets.check import Report

HELP = "check a data set: counts, odd files, duplicates, leaks"
SHOWN = 20  # odd files in the table; --json has all
# what a layout offers beside its default, so that all its files are read
VARIANTS = {"camus": ("sequences", "stills"), "echonet": ("windows", "traced")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("action", choices=["check"])
    parser.add_argument("folder", type=Path, help="of the release, or of any clips")
    parser.add_argument(
        "--kind",
        help="camus, echonet, mnms or folder (default: recognised); or one kind of clip of it: "
        "sequences, stills, windows, traced, videos",
    )
    parser.add_argument("--view", help="one view only: 2CH, 4CH (CAMUS); A4C, PSAX (EchoNet)")
    parser.add_argument("--json", action="store_true", help="the whole report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; 1 when something is wrong."""
    import json

    from rich.console import Console

    reports = _reports(arguments.folder, arguments.kind, arguments.view)
    if arguments.json:
        print(json.dumps([report.as_json() for report in reports], indent=1))
    else:
        console = Console()
        for report in reports:
            console.print(_table(report))
    return int(not all(report.ok for report in reports))


def _reports(folder: Path, kind: str | None, view: str | None) -> list["Report"]:
    from heartbeat_training.datasets import LAYOUTS, layout_of, open_dataset

    layout = kind if kind in LAYOUTS else layout_of(folder)
    options = {"view": view} if view else {}
    variants = VARIANTS.get(layout, ()) if kind in (None, layout) else ()
    if not variants:
        return [open_dataset(folder, kind, **options).check()]
    reports = [LAYOUTS[layout](folder, kind=variant, **options).check() for variant in variants]
    # a release may hold only one kind of clip: an empty report beside a full one is no fault
    return [report for report in reports if report.clips or report.odd or report.leaks] or reports


def _table(report: "Report") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    title = f"{report.name}, split: {report.split_source}"
    table = Table("", "", title=title, show_header=False, title_justify="left")
    for split, views in report.clips.items():
        clips = ", ".join(f"{count} {view}" for view, count in views.items())
        table.add_row(f"{split}: clips", f"{clips} of {report.patients[split]} patients")
    for name in ("frames", "height", "width", "spacing_mm", "fps", "ef"):
        found = getattr(report, name)
        table.add_row(name, "none" if found is None else f"{found[0]:.5g} to {found[1]:.5g}")
    table.add_row("labels", f"{report.labels or 'none'}, {report.unlabelled} clips without")
    for note, count in report.notes.items():
        if count:
            table.add_row(note, str(count))
    for name, reason in list(report.odd.items())[:SHOWN]:
        table.add_row(f"[red]odd[/] {escape(name)}", escape(reason))
    if len(report.odd) > SHOWN:
        table.add_row("[red]odd[/]", f"and {len(report.odd) - SHOWN} more: --json")
    for names in report.duplicates[:SHOWN]:
        table.add_row("[red]same frames[/]", escape(", ".join(names)))
    for patient, splits in list(report.leaks.items())[:SHOWN]:
        table.add_row("[red]leak[/]", f"{escape(patient)} is in {' and '.join(splits)}")
    table.add_row("[green]ok[/]" if report.ok else "[red]not ok[/]", _verdict(report))
    return table


def _verdict(report: "Report") -> str:
    if not report.clips and not report.odd:
        return "no clips"
    counts = {"odd": report.odd, "doubled": report.duplicates, "leaks": report.leaks}
    return ", ".join(f"{len(found)} {name}" for name, found in counts.items())
