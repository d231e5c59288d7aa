"""`heartbeat-bench soak` for documents: the endurance run, and what readers wait for."""

from typing import Any

from heartbeat_benchmarks import results


def is_endurance(result: dict[str, Any]) -> bool:
    """Whether conditions changed and clients misbehaved throughout."""
    plan = result["plan"]
    return bool(plan["bad"] and plan["every"] < 60 * plan["minutes"])


def markdown(result: dict[str, Any]) -> str:
    """An endurance run, figure by figure."""
    plan, session, memory = result["plan"], result["session"], result["memory"]
    rows = [
        ["frames due", str(session["frames_due"])],
        ["of them late", str(session["missed_deadlines"])],
        ["clips, changes", f"{session['clips']}, {session['changes']}"],
        ["faults", str(session["faults"])],
        ["change to first frame (s), p50 / p90", _two(session["change_to_first_frame_s"], "p90")],
    ]
    for kind in ("blocking", "pyigtl"):
        for one in result[kind]:
            rows.append([f"age at a {kind} client (ms), p50 / p99", _two(one["age_ms"], "p99")])
    if memory["interval"]:
        low, high = memory["interval"]
        rows.append(
            [
                "memory (MiB a minute), 95 %",
                f"{memory['slope_mb_min']:+.2f} ({low:+.2f} to {high:+.2f})",
            ]
        )
    rows.append(["memory at the end (MiB)", f"{memory['last_mb']:.0f}"])
    if steps := result["flicker"]:
        rows += [
            [f"largest step {what} (grey levels)", f"{max(one[key] for one in steps):.1f}"]
            for key, what in (("within", "within a clip"), ("joint", "where it begins anew"),
                              ("change", "where conditions change"))
        ]  # fmt: skip
    deeds = ", ".join(f"{count} {deed}" for deed, count in result["deeds"].items())
    bundle = result["fingerprint"]["bundle"]["name"]
    engine = f"{result['engine']['name']} {result['engine']['precision']}"
    table = results.markdown(["figure", "came"], rows)
    return (
        f"{table}\n\n{bundle} on {engine}, {plan['minutes']:g} minutes, {plan['rate']:g} frames/s, "
        f"EF and heart rate changed every {plan['every']:g} s; meanwhile clients: {deeds}. All "
        f"processes share {result['fingerprint']['machine']['cores']} cores."
    )


def readers(result: dict[str, Any]) -> str:
    """Ages of frames at clients that do nothing but read."""
    rows = [
        [
            f"{kind} {i + 1}",
            *(results.number(one["age_ms"].get(p), 2) for p in ("p50", "p90", "p99")),
        ]
        for kind in ("blocking", "pyigtl")
        for i, one in enumerate(result[kind])
    ]
    table = results.markdown(["client", "p50", "p90", "p99"], rows)
    return (
        f"{table}\n\nms from the frame composed to the frame read, {result['plan']['rate']:g} "
        f"frames/s for {60 * result['plan']['minutes']:g} s, 256×256; the clients are one process."
    )


def _two(found: dict[str, Any], high: str) -> str:
    return f"{results.number(found.get('p50'), 2)} / {results.number(found.get(high), 2)}"
