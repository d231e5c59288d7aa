"""Tables of models trained on patients, for documents: the paper's ablation, quality against steps,
and one set of conditions in full. The figures are heartbeat-train's; here they only get columns.
"""

from typing import Any

from heartbeat_benchmarks.results import markdown, number


def table(result: dict[str, Any]) -> str:
    """`heartbeat-train table`: the rows of the paper's Table 1, ours beside the paper's."""
    header = ["conditions", "FID*", "FVD/16*", "SSIM ↑", "LV Dice ↑", "flow error ↓"]
    header += ["paper: FID", "FVD", "SSIM"]
    rows = []
    for name, one in result["sets"].items():
        mine, far = one["summary"], one["distances"]
        cells = [number(far["fid"]["value"], 1), number(far["fvd_16"]["value"], 2)]
        cells += [number(mine[key]["mean"], 3) for key in ("ssim", "dice_lv", "flow_error")]
        theirs = result["paper"]["rows"][name]
        cells += [number(theirs[key], 2) for key in ("fid", "fvd_16", "ssim")]
        rows.append([name, *cells])
    floor = next(iter(result["sets"].values()))["distances"]
    cells = [number(floor[key]["floor"], d) for key, d in (("fid", 1), ("fvd_16", 2))]
    ceiling = number(result["ceiling"]["dice_lv"]["mean"], 3)
    rows.append(["*real against real*", *cells, "1", ceiling, "0", "", "", ""])
    return f"{markdown(header, rows)}\n\n{_about(result)}"


def steps(result: dict[str, Any]) -> str:
    """`heartbeat-train steps`: quality and seconds by sampler and count."""
    header = ["sampler", "steps", "SSIM ↑", "LV Dice ↑", "spectrum gap (dB) ↓", "FID*", "s/clip"]
    rows = []
    for name, one in result["sets"].items():
        keys = (("ssim", 3), ("dice_lv", 3), ("spectrum_worst", 2))
        cells = [number(one["summary"][key]["mean"], digits) for key, digits in keys]
        cells += [number(one["distances"]["fid"]["value"], 1)]
        rows.append([*name.split(" "), *cells, number(one["summary"]["seconds"]["mean"], 2)])
    return f"{markdown(header, rows)}\n\n{_about(result)}"


def _about(result: dict[str, Any]) -> str:
    work, sampling = result["workload"], result["workload"]["sampling"]
    kept = work["image_features"]["comparable"] and work["video_features"]["comparable"]
    star = "" if kept else " *Features of a stand-in: they compare among these rows only."
    return (
        f"{work['clips']} held-out clips of {work['patients']} patients, {sampling['sampler']}, "
        f"{sampling['steps']} steps; seconds on the machine of the raw file.{star}"
    )
