"""Results for the eye: tables of figures with their doubt, and what must be said beside them."""

from typing import Any

from rich.table import Table

from heartbeat_training.evaluation import paper
from heartbeat_training.evaluation.clips import FIGURES

# distance: its title, and whose features it is measured in
DISTANCES = {
    "fid": ("FID", "image_features"),
    "kid": ("KID", "image_features"),
    "fvd": ("FVD", "video_features"),
    "fvd_16": ("FVD/16", "video_features"),
}
MORE = {
    "diversity": "diversity (grey levels)",
    "spectrum_worst": "spectrum gap, worst band of the mean (dB)",
    "ef_bias": "EF bias (points)",
    "ef_r": "EF, r",
    "seconds": "seconds a clip",
}


def distance_title(key: str, workload: dict[str, Any]) -> str:
    """A distance's title; marked where a stand-in's features are not those of the name."""
    title, features = DISTANCES[key]
    return title if workload[features]["comparable"] else f"{title} (stand-in)"


def figures_table(
    scored: dict[str, Any], ceiling: dict[str, Any], workload: dict[str, Any]
) -> Table:
    """One set of conditions: value, 95 % interval, real clips' figure or floor, N."""
    shown = Table(title=", ".join(scored["conditions"]))
    shown.add_column("figure")
    for title in ("value", "95 %", "real clips", "N"):
        shown.add_column(title, justify="right", no_wrap=True)
    for key in DISTANCES:
        d = scored["distances"][key]
        floor = f"{number(d['floor'])} (N {d['floor_n']})"
        title = distance_title(key, workload)
        shown.add_row(title, number(d["value"]), span(d), floor, str(d["n"]))
    for key, title in {**FIGURES, **MORE}.items():
        s = scored["summary"][key]
        shown.add_row(
            title,
            number(s["mean"]),
            span(s),
            number(ceiling[key]["mean"]) if key != "seconds" else "",
            str(s.get("n", "")),
        )
    return shown


def paper_table(content: dict[str, Any]) -> Table:
    """Ours and the paper's, row by row, ± half of the 95 % interval; then floor and ceiling."""
    work, printed = content["workload"], content["paper"]
    keys = ("fid", "fvd_16")
    shown = Table(title=f"ours | the paper's, {printed['view']}   (*: stand-in features)")
    shown.add_column("conditions", no_wrap=True)
    for key in keys:
        shown.add_column(distance_title(key, work).replace(" (stand-in)", "*"), justify="right")
    for title in ("SSIM", "Dice LV", "FID", "FVD", "SSIM"):
        shown.add_column(title, justify="right")
    for name, one in content["sets"].items():
        theirs, mine = printed["rows"][name], one["summary"]
        cells = [with_span(one["distances"][key]) for key in keys]
        cells += [with_span(mine["ssim"]), number(mine["dice_lv"]["mean"])]
        cells += [f"{theirs['fid']:.2f}", f"{theirs['fvd_16']:.2f}", f"{theirs['ssim']:.2f}"]
        shown.add_row(name, *cells)
    first = next(iter(content["sets"].values()))["distances"]
    ceiling = content["ceiling"]
    shown.add_row("real halves", *(number(first[key]["floor"]) for key in keys))
    shown.add_row("real", "", "", "", "1", number(ceiling["dice_lv"]["mean"]))
    return shown


def paper_notes(content: dict[str, Any]) -> list[str]:
    """`notes`, and what compares with the paper."""
    work, rank = content["workload"], content["paper"]["rank_r"]
    lines = [
        f"{paper.SCALE_NOTE}. Its {paper.BASE} was a training of its own; ours is this model given "
        "text and mask.",
        f"Same order of rows as the paper's, Spearman's r: FID {rank['fid']:.2f}, FVD "
        f"{rank['fvd_16']:.2f}, SSIM {rank['ssim']:.2f}.",
    ]
    if not (work["image_features"]["comparable"] and work["video_features"]["comparable"]):
        lines.append(
            "Features are a stand-in: only the trend of FID and FVD compares with the paper, not "
            "their values."
        )
    return notes(work, content["sets"]) + lines


def steps_table(content: dict[str, Any]) -> Table:
    """One row a sampler and count."""
    work = content["workload"]
    shown = Table(title="the paper's six conditions")
    shown.add_column("sampler, steps", no_wrap=True)
    titles = ("SSIM", "Dice LV", "dB", "flicker", distance_title("fid", work), "seconds")
    for title in titles:
        shown.add_column(title, justify="right")
    for name, one in content["sets"].items():
        keys = ("ssim", "dice_lv", "spectrum_gap", "flicker_share")
        cells = [number(one["summary"][key]["mean"]) for key in keys]
        cells += [number(one["distances"]["fid"]["value"])]
        shown.add_row(name, *cells, number(one["summary"]["seconds"]["mean"]))
    return shown


def notes(workload: dict[str, Any], scored: dict[str, Any]) -> list[str]:
    """What the figures do not say themselves."""
    sampling = workload["sampling"]
    lines = [
        f"{workload['clips']} clips of {workload['patients']} patients, "
        f"{sampling['seeds']} seed(s) each, {sampling['sampler']} {sampling['steps']} steps.",
        f"Judge: {workload['judge']}. "
        "Real clips: the judge's ceiling; for distances the floor, random halves of the real set "
        "(smaller N raises a Fréchet distance).",
        f"Image features: {workload['image_features']['name']}.",
        f"Video features: {workload['video_features']['name']}.",
    ]
    if not workload["lpips"]:
        lines.append(f"LPIPS: none, because {workload['lpips_reason']}.")
    for name, one in scored.items():
        lacking = ", ".join(f"{key} in {count}" for key, count in one["lacking"].items())
        lines += [f"{name}: conditions some clips could not give: {lacking}."] if lacking else []
    return lines + [f"left out: {line}" for line in workload["refused"]]


def span(m: dict[str, float]) -> str:
    """ "low – high", or nothing where there is no interval."""
    low, high = m.get("low", float("nan")), m.get("high", float("nan"))
    return f"{number(low)} – {number(high)}" if low == low else ""


def with_span(m: dict[str, float]) -> str:
    """A value over half the width of its interval, for tables with many columns."""
    value = m["value"] if "value" in m else m["mean"]
    return f"{value:.4g}\n[dim]±{(m['high'] - m['low']) / 2:.2g}[/]"


def number(value: float) -> str:
    """Four significant digits at most; a dash for NaN."""
    return "–" if value != value else f"{value:.4g}"
