"""Each kernel against what one would use without it, and against the memory roof, in one run.

At `base`'s shapes: 16 frames of 32×32 latents, bfloat16, one clip. The roof is the bytes an
operation must move, each once, at the bandwidth of a plain copy measured in the same run; caches
are flushed before every sample. Without a GPU the bytes and the times they would take are
predicted, and every measurement says "not run".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heartbeat_kernels import ops, reference
from heartbeat_kernels.reference import TemporalLayer

FRAMES, TEXT, IMAGE = 16, 77, 64
LEVELS = ((320, 8, 1024), (640, 8, 256), (1280, 8, 64), (1280, 8, 16))  # channels, heads, positions
NARROW = ((128, 4, 256), (192, 6, 64))  # `tiny`'s
# Bytes a second that a copy reaches in practice, and half-precision products a second: assumed.
ASSUMED = {"H100": (3.0e12, 790e12), "H200": (4.3e12, 788e12)}
COMPILED = "compiled"
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One operation at one shape. ways: by name, what computes it, the reference among them; a way
    that cannot be built here says why. operations: multiplications and additions."""

    op: str
    shape: str
    bytes: int
    operations: int
    make: Callable[[str], dict[str, Call]]
    goal: tuple[str, float] | None = None  # the way to beat and by how much
    absent: dict[str, str] = field(default_factory=dict)


def cases(dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Every case, without allocating anything."""
    size = dtype.itemsize
    for c, heads, n in LEVELS:
        elements = FRAMES * n * c
        yield Case(
            "temporal_attention",
            f"16 × {n} × {c}",
            4 * elements * size,
            4 * FRAMES * elements,
            partial(temporal_ways, n, c, heads, dtype),
            ("permute + SDPA", 3.0),
        )
        yield Case(
            "dual_cross_attention",
            f"{FRAMES * n} × {c}, {TEXT} + {IMAGE} tokens",
            (3 * elements + 2 * (TEXT + IMAGE) * c) * size,
            4 * elements * (TEXT + IMAGE),
            partial(cross_ways, n, c, heads, dtype),
            ("2 × SDPA, K and V repeated", 2.0),
        )
        yield Case(
            "groupnorm_silu",
            f"16 × {c} × {n}",
            2 * elements * size,
            10 * elements,
            partial(norm_ways, n, c, dtype),
        )
        yield Case(
            "geglu",
            f"{FRAMES * n} × {4 * c}",
            12 * elements * size,
            30 * elements,
            partial(geglu_ways, n, c, dtype),
        )
    for c, heads, n in (*NARROW, *LEVELS):
        elements = FRAMES * n * c
        yield Case(
            "temporal_block",
            f"16 × {n} × {c}",
            (2 * elements + 4 * c * c) * size,
            8 * elements * c + 4 * FRAMES * elements,
            partial(block_ways, n, c, heads, dtype),
        )


def temporal_ways(n: int, c: int, heads: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Queries, keys and values as slices of one projection."""
    qkv = torch.randn(1, FRAMES, n, 3 * c, device=device, dtype=dtype)
    q, k, v = qkv.split(c, dim=-1)
    compiled = torch.compile(reference.temporal_attention)
    ways: dict[str, Call] = {
        "permute + SDPA": partial(reference.temporal_attention, q, k, v, heads),
        COMPILED: partial(compiled, q, k, v, heads),
        "ours": partial(ops.temporal_attention, q, k, v, heads),
    }
    if (attend := _xformers()) is not None:
        d = c // heads

        def xformers() -> Tensor:
            rows = [x.view(FRAMES, n, heads, d).transpose(0, 1) for x in (q, k, v)]
            out: Tensor = attend(*rows)
            return out.transpose(0, 1).reshape(1, FRAMES, n, c)

        ways["xformers"] = xformers
    return ways


def cross_ways(n: int, c: int, heads: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Own queries for each branch; "repeated" holds K and V once for every frame, as image models
    that were inflated do."""
    rows = (FRAMES * n, TEXT, TEXT, FRAMES * n, IMAGE, IMAGE)
    q, k, v, qi, ki, vi = (torch.randn(1, r, c, device=device, dtype=dtype) for r in rows)
    text, image = (q, k, v), (qi, ki, vi)

    def repeated() -> Tensor:
        each = [x.view(FRAMES, n, c) for x in (text[0], image[0])]
        kv = [x.expand(FRAMES, -1, -1).contiguous() for x in (*text[1:], *image[1:])]
        out = reference.attention(each[0], kv[0], kv[1], heads)
        return (out + reference.attention(each[1], kv[2], kv[3], heads)).view(1, -1, c)

    compiled = torch.compile(reference.dual_cross_attention)
    return {
        "2 × SDPA, K and V repeated": repeated,
        "2 × SDPA, K and V once": partial(reference.dual_cross_attention, text, image, heads),
        COMPILED: partial(compiled, text, image, heads),
        "ours": partial(ops.dual_cross_attention, text, image, heads),
    }


def norm_ways(n: int, c: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """NHWC, Stable Diffusion's groups."""
    side = int(n**0.5)
    x = torch.randn(FRAMES, c, side, side, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.rand(2, c, device=device, dtype=dtype).unbind()
    compiled = torch.compile(reference.groupnorm_silu)
    return {
        "eager": partial(reference.groupnorm_silu, x, 32, weight, bias),
        COMPILED: partial(compiled, x, 32, weight, bias),
        "ours": partial(ops.groupnorm_silu, x, 32, weight, bias),
    }


def geglu_ways(n: int, c: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """The feed-forward's inner width."""
    x = torch.randn(FRAMES * n, 8 * c, device=device, dtype=dtype)
    compiled = torch.compile(reference.geglu)
    return {
        "eager": partial(reference.geglu, x),
        COMPILED: partial(compiled, x),
        "ours": partial(ops.geglu, x),
    }


def block_ways(n: int, c: int, heads: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """A whole layer: as one kernel where the width allows it, and as products around the bare
    attention."""
    x = torch.randn(1, FRAMES, n, c, device=device, dtype=dtype)
    shapes = ((c,), (c,), (FRAMES, c), (3 * c, c), (c, c), (c,))
    layer = TemporalLayer(*(torch.randn(s, device=device, dtype=dtype) * c**-0.5 for s in shapes))
    apart = partial(ops.temporal_block, fused=False)
    ways: dict[str, Call] = {
        "eager": partial(reference.temporal_block, x, layer, heads),
        COMPILED: partial(torch.compile(reference.temporal_block), x, layer, heads),
        "ours": partial(ops.temporal_block, x, layer, heads),
        "ours, apart": partial(apart, x, layer, heads),
        "ours, apart, compiled": partial(torch.compile(apart), x, layer, heads),
    }
    if c <= 256:
        ways["ours, fused"] = partial(ops.temporal_block, x, layer, heads, fused=True)
    return ways


def _xformers() -> Callable[..., Tensor] | None:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        return None
    return memory_efficient_attention


def predicted(case: Case) -> dict[str, float]:
    """Microseconds the case takes at least on the assumed GPUs: its bytes or its products."""
    return {
        gpu: 1e6 * max(case.bytes / bandwidth, case.operations / rate)
        for gpu, (bandwidth, rate) in ASSUMED.items()
    }


def median_us(call: Callable[[], object]) -> float:
    """Median over some 50 ms of samples, the second-level cache flushed before each."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=25, rep=50, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes a second of a copy of 2 GiB, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * median_us(lambda: target.copy_(source)))


def measure(case: Case, bandwidth: float) -> dict[str, Any]:
    """Microseconds of every way, checked against the first one; ratios to ours; share of roof."""
    ways = case.make("cuda")
    wanted = next(iter(ways.values()))().float()
    row: dict[str, Any] = {"us": {}, "error": {}}
    for name, call in ways.items():
        error = (call().float() - wanted).abs().max() / wanted.abs().max()
        row["error"][name] = float(error)
        row["us"][name] = median_us(call) if error < 0.05 else None
    ours = row["us"]["ours"]
    row["roof_us"] = 1e6 * case.bytes / bandwidth
    if ours is not None:
        row["ratio"] = {name: us / ours for name, us in row["us"].items() if us is not None}
        row["share_of_roof"] = row["roof_us"] / ours
        if case.goal is not None:
            row["goal_kept"] = row["ratio"].get(case.goal[0], 0.0) >= case.goal[1]
    return row


def run(say: Callable[[str], None] = print, only: str = "") -> dict[str, Any]:
    """Rows of every case whose operation's name holds `only`; measured where there is a GPU."""
    gpu = torch.cuda.is_available()
    bandwidth = copy_bandwidth() if gpu else None
    rows = []
    for case in cases():
        if only not in case.op:
            continue
        row = {"op": case.op, "shape": case.shape, "bytes": case.bytes}
        row |= {"operations": case.operations, "predicted_us": predicted(case)}
        row |= measure(case, bandwidth) if bandwidth else {"measured": "not run: no GPU"}
        rows.append(row)
        say(line(row))
    name = torch.cuda.get_device_name() if gpu else "none: predicted, not run"
    return {"gpu": name, "copy_bytes_per_s": bandwidth, "assumed": ASSUMED, "rows": rows}


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['op']:21} {row['shape']:32} {row['bytes'] / 1e6:7.2f} MB"
    if "us" not in row:
        times = ", ".join(f"≥ {us:.1f} µs {gpu}" for gpu, us in row["predicted_us"].items())
        return f"{head}  predicted {times}; not run"
    times = ", ".join(
        f"{name} {'wrong' if us is None else f'{us:.1f}'}" for name, us in row["us"].items()
    )
    share = f"{100 * row['share_of_roof']:.0f} % of roof" if "share_of_roof" in row else "wrong"
    return f"{head}  {times} µs; {share}"
