"""Results for the eye: tables of figures with their doubt, and what must be said beside them."""

from typing import Any

from rich.table import Table

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


def number(value: float) -> str:
    """Four significant digits at most; a dash for NaN."""
    return "–" if value != value else f"{value:.4g}"
