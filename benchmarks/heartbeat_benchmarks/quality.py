"""`heartbeat-bench quality`: evaluation of a bundle as a result file and as tables."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from heartbeat_benchmarks import results
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_fast.generator import Generator
from heartbeat_training.evaluate import (
    ALL,
    FRAME,
    HELD_OUT,
    LADDER,
    SETS,
    SWAPPED,
    TARGETS,
    Judge,
    evaluate,
    summarise,
)


@dataclass(frozen=True)
class Plan:
    """What is evaluated; `sets` are names of evaluate.SETS."""

    engine: str = "auto"
    sets: tuple[str, ...] = tuple(SETS)
    clips: int = len(HELD_OUT)
    first_seed: int = HELD_OUT.start
    steps: int = 10
    guidance: float = 1.0


# Columns of the terminal's table, short enough for 80 characters.
SHOWN = {
    "ssim": "SSIM",
    "ssim_share": "of twin",
    "dice": "Dice",
    "ef_r": "EF r",
    "spectrum_gap": "dB",
    "speckle_ratio": "grain",
    "travel_share": "travel",
    "flicker_share": "flicker",
    "flow_error": "flow",
}


def judge_of(run: Path) -> Judge:
    """The segmenter of a run folder, trained first (minutes) where there is none."""
    import torch

    from heartbeat_training.segmenter import segment, train_segmenter

    if not (run / "segmenter.safetensors").exists():
        print(f"{run}: no segmenter yet; training one, about five minutes", file=sys.stderr)
    torch.manual_seed(0)
    model = train_segmenter(run)
    return lambda frames: segment(model, frames)


def run(bundle: str | Path | None, judge: Judge, plan: Plan) -> dict[str, Any]:
    """Evaluate a bundle. Returns the result that `results.save` stores: raw rows and summary.

    Raises: BundleError, EngineError, SamplerError as the generator does.
    """
    generator = Generator.open(bundle, plan.engine)
    seeds = range(plan.first_seed, plan.first_seed + plan.clips)
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("clips", total=len(seeds) * (len(plan.sets) + 2))
        for row in evaluate(
            generator,
            judge,
            seeds=seeds,
            sets=plan.sets,
            steps=plan.steps,
            guidance=plan.guidance,
        ):
            rows.append(row)
            progress.advance(task)
    summary = summarise(rows)
    promises = [asdict(t) | {"value": summary[ALL][t.figure]} for t in TARGETS if ALL in summary]
    kept = [t.kept(summary[ALL]) for t in TARGETS if ALL in summary]
    return {
        "fingerprint": fingerprint(generator.bundle),
        "workload": asdict(plan) | {"seeds": [seeds.start, seeds.stop], "sampler": "dpmpp_2m"},
        "engine": {"name": generator.engine.name, "precision": generator.engine.precision},
        "summary": summary,
        "targets": [p | {"kept": k} for p, k in zip(promises, kept, strict=True)],
        "rows": rows,
    }


def table(result: dict[str, Any]) -> Table:
    """Figures of every set; the last columns against the source's (`summarise` explains them)."""
    shown = Table(title=f"{result['fingerprint']['bundle']['name']}: {_about(result)}")
    shown.add_column("conditions")
    for title in SHOWN.values():
        shown.add_column(title, justify="right", no_wrap=True)
    for name, summary in result["summary"].items():
        shown.add_row(name, *(results.number(summary[figure], 2) for figure in SHOWN))
    return shown


def verdicts(result: dict[str, Any]) -> list[str]:
    """One line per target: kept or missed, the figure, the bound."""
    return [
        f"{'kept  ' if t['kept'] else 'MISSED'} {t['what']}: {results.number(t['value'])} "
        f"({'≥' if t['at_least'] else '≤'} {t['bound']})"
        for t in result["targets"]
    ]


def ladder_markdown(result: dict[str, Any]) -> str:
    """The paper's table: one condition more in each row. Last rows: ceiling and floor."""
    names = {"twin": "*the same heart, other speckle*", ALL: "all, with EF"}
    rows = []
    for name in (*LADDER, FRAME, ALL, "twin"):
        if name in result["summary"]:
            s = result["summary"][name]
            cells = (
                results.number(s["ssim"]),
                results.number(s["dice"]),
                results.number(s["ef_r"], 2),
                results.number(s["flow_error"], 2),
            )
            rows.append([names.get(name, name), *cells])
    head = ["conditions", "SSIM ↑", "LV Dice ↑", "EF, r ↑", "flow error (pixels) ↓"]
    return results.markdown(head, rows) + f"\n\n{_about(result)}"


def targets_markdown(result: dict[str, Any]) -> str:
    """What was promised of clips with all conditions, what came, and the twin's figure."""
    twin = result["summary"]["twin"]
    rows = [
        [
            t["what"],
            f"{'≥' if t['at_least'] else '≤'} {t['bound']}",
            f"{results.number(t['value'])}{'' if t['kept'] else ' **missed**'}",
            results.number(twin[t["figure"]]),
        ]
        for t in result["targets"]
    ]
    head = ["figure", "wanted", "came", "same heart, other speckle"]
    text = results.markdown(head, rows) + f"\n\n{_about(result)}"
    if SWAPPED in result["summary"]:
        s = result["summary"][SWAPPED]
        text += (
            f" With another heart's masks among one heart's other conditions, LV Dice is "
            f"{results.number(s['dice_other'])} with those masks and {results.number(s['dice'])} "
            "with its own."
        )
    return text


def _about(result: dict[str, Any]) -> str:
    work = result["workload"]
    return (
        f"Means over {work['clips']} held-out phantoms, {work['steps']} steps, guidance "
        f"{work['guidance']:g}, {result['engine']['name']} {result['engine']['precision']}."
    )
