"""`heartbeat-train table`: the paper's ablation for one model, beside the paper's figures."""

import argparse
from pathlib import Path
from typing import Any

from heartbeat_training.evaluation import options

HELP = "the rows of the paper's Table 1 for one bundle or model, beside the paper's"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    options.add_model(parser)
    options.add_data(parser)
    options.add_measures(parser)
    parser.add_argument(
        "--plot", type=Path, default=Path("out/table.png"), metavar="FILE.png", help="(%(default)s)"
    )
    options.add_out(parser)


def run(arguments: argparse.Namespace) -> None:
    """Generate every row, print the table, draw it, write the result file."""
    from rich.console import Console

    from heartbeat_training.evaluation import paper, report

    console = Console()
    opened = options.open_all(arguments)
    sets = {name: (row.conditions, opened.sampling) for name, row in paper.TABLE.items()}
    found = options.scored(opened, sets, console)
    content = options.content_of(opened, arguments, found)
    views = {case.record.view for case in opened.scorer.cases}
    content["paper"] = compared(found, "A2C" if views == {"A2C"} else "A4C")
    path = options.save("table", content, arguments.out)
    console.print(report.paper_table(content))
    for line in report.paper_notes(content):
        console.print(line, highlight=False)
    _draw(content, arguments.plot)
    console.print(f"plot: {arguments.plot}\nraw rows: {path}", highlight=False)


def compared(found: dict[str, Any], view: str) -> dict[str, Any]:
    """The paper's rows of a view, and how far ours come in the same order (Spearman's rank r).

    A rank correlation is all that compares where features are a stand-in's.
    """
    import numpy as np
    from scipy.stats import spearmanr

    from heartbeat_training.evaluation import paper

    rows = {
        name: dict(zip(("fid", "fvd_16", "ssim"), getattr(row, view), strict=True))
        for name, row in paper.TABLE.items()
    }
    ours = {
        "fid": [one["distances"]["fid"]["value"] for one in found.values()],
        "fvd_16": [one["distances"]["fvd_16"]["value"] for one in found.values()],
        "ssim": [one["summary"]["ssim"]["mean"] for one in found.values()],
    }
    order = {
        key: float(np.asarray(spearmanr(values, [rows[name][key] for name in found]))[0])
        for key, values in ours.items()
    }
    return {"view": view, "rows": rows, "rank_r": order}


def _draw(content: dict[str, Any], out: Path) -> None:
    from heartbeat_training.evaluation import plots, report

    work, found = content["workload"], content["sets"]
    keys = ("fid", "fvd_16")
    titles = {key: report.distance_title(key, work) for key in keys} | {"ssim": "SSIM"}
    rows = {}
    for name, one in found.items():
        ssim = one["summary"]["ssim"]
        rows[name] = {key: one["distances"][key] for key in keys}
        rows[name]["ssim"] = {"value": ssim["mean"], "low": ssim["low"], "high": ssim["high"]}
    first = next(iter(found.values()))["distances"]
    floors = {key: first[key]["floor"] for key in keys}
    plots.table(rows, content["paper"]["rows"], titles, floors, out)
