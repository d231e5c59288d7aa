"""`heartbeat-bench peers` as a table; needs no torch."""

from typing import Any

from heartbeat_benchmarks import results
from heartbeat_benchmarks.latency_report import peaks, verdict


def markdown(result: dict[str, Any]) -> str:
    """One table, and what each row rests on."""
    head = ["system", "run by", "parameters", "frames", "pixels", "conditions", "evaluations"]
    head += ["GFLOP/clip", "s/clip", "frames/s"]
    rows = []
    for row in result["rows"]:
        seconds, flop = row["seconds"], row["flop"]
        rate = None if seconds is None else row["frames"] / seconds
        rows.append(
            [
                *(row["name"], row["how"], f"{row['parameters'] / 1e6:.1f} M"),
                *(str(row["frames"]), f"{row['size']}²", row["conditions"]),
                *(str(row["evaluations"]), "–" if flop is None else f"{flop / 1e9:,.0f}"),
                *(results.number(seconds, 2), results.number(rate, 2)),
            ]
        )
    notes = [
        f"{row['name']}: {row['source']}; {row['assumed']}"
        for row in result["rows"]
        if row["assumed"]
    ]
    notes += [
        f"{row['name']}, {row['how']}: not run ({row['why_not']})"
        for row in result["rows"]
        if row.get("why_not")
    ]
    about = f"matrix products: {peaks(result)}; {verdict(result)}"
    return f"{results.markdown(head, rows)}\n\n{'. '.join([*notes, about])}."
