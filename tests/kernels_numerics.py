"""Every kernel against its float64 reference: in Triton's interpreter on a CPU, compiled on a GPU.

test_kernels.py and test_kernels_gpu.py run this file in a process of its own: Triton decides at its
import whether it interprets. Sizes are odd on purpose, inputs have gaps, outputs start as NaN.
"""

import os

import pytest
import torch
from torch import Tensor

from heartbeat_kernels import dual_cross_attention as cross
from heartbeat_kernels import ops, reference
from heartbeat_kernels import temporal_attention as temporal
from heartbeat_kernels.library import interpreted
from heartbeat_kernels.reference import TemporalLayer
from heartbeat_kernels.tuning import Launch, launch_for

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the largest value. The interpreter cuts to bfloat16 where a GPU rounds: twice the error.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.5e-2, torch.float16: 2e-3}
ids = {"ids": lambda v: str(v).removeprefix("torch.").replace(" ", "")}


@pytest.fixture(autouse=True)
def _seed() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def assert_close(came: Tensor, wanted: Tensor, slack: float = 1.0) -> None:
    assert came.shape == wanted.shape
    error = (came.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)
    assert error <= slack * TOLERANCE[came.dtype], f"relative error {error:.2e}"


def assert_gradients_close(
    came: Tensor, mine: list[Tensor], wanted: Tensor, theirs: list[Tensor], slack: float = 2.0
) -> None:
    """Of the same random gradient of the result."""
    grad = random(*came.shape, dtype=came.dtype)
    pairs = zip(
        torch.autograd.grad(came, mine, grad),
        torch.autograd.grad(wanted, theirs, grad.double()),
        strict=True,
    )
    for one, other in pairs:
        assert_close(one, other, slack)


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


FRAMES = [(1, 9, 1, 32), (15, 3, 2, 40), (16, 5, 1, 80), (17, 2, 1, 160), (32, 1, 2, 64)]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize(("f", "n", "heads", "d"), [*FRAMES, (16, 4, 2, 24)])
def test_temporal_attention(f: int, n: int, heads: int, d: int, dtype: torch.dtype) -> None:
    e = heads * d
    packed = random(2, f, n, 3 * e, dtype=dtype)  # as one projection leaves them: read in place
    mine = [packed[..., i * e : (i + 1) * e].detach().requires_grad_() for i in range(3)]
    came = ops.temporal_attention(*mine, heads)
    wanted_of = exact(mine)
    wanted = reference.temporal_attention(*wanted_of, heads)
    assert_close(came, wanted)
    assert_gradients_close(came, mine, wanted, wanted_of)


def test_temporal_attention_leaves_nothing_unwritten_and_writes_nothing_else() -> None:
    b, f, n, e = 2, 5, 7, 48
    q, k, v = (random(b, n, f, e).transpose(1, 2) for _ in range(3))
    around = torch.full((b, f + 2, n + 3, e + 16), float("nan"), device=DEVICE)
    out = around[:, 1 : f + 1, 2 : n + 2, 8 : e + 8]
    temporal.forward(q, k, v, out, 2, Launch(4, 4))
    assert_close(out, reference.temporal_attention(q.double(), k.double(), v.double(), 2))
    assert around.isnan().sum() == around.numel() - out.numel()


def test_temporal_attention_of_300_positions() -> None:
    q, k, v = (random(1, 2, 300, 32) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    temporal.forward(q, k, v, out, 1, Launch(32, 4))
    assert_close(out, reference.temporal_attention(q.double(), k.double(), v.double(), 1))


def test_temporal_attention_past_65536_rows() -> None:
    """More programs than CUDA's second grid axis holds; the last clips are where it would show."""
    b, f, n = 5, 2, 13_200
    q, k, v = (random(b, f, n, 16) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    temporal.forward(q, k, v, out, 1, Launch(512, 4))
    assert b * n > 65_536
    assert_close(out, reference.temporal_attention(q.double(), k.double(), v.double(), 1))


CROSS = [
    (1, 1, 32, 77, 1),
    (70, 2, 40, 77, 64),
    (129, 1, 80, 1, 65),
    (33, 1, 160, 77, 256),
    (200, 1, 64, 128, 15),
]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize(("length", "heads", "d", "t", "ti"), CROSS)
def test_dual_cross_attention(
    length: int, heads: int, d: int, t: int, ti: int, dtype: torch.dtype
) -> None:
    e = heads * d
    shapes = [(length, e), (t, e), (t, e), (length, e), (ti, e), (ti, e)]
    mine = [random(2, r, c + 8, dtype=dtype)[..., :c].requires_grad_() for r, c in shapes]
    came = ops.dual_cross_attention(mine[:3], mine[3:], heads, image_scale=0.7)
    theirs = exact(mine)
    wanted = reference.dual_cross_attention(theirs[:3], theirs[3:], heads, 0.7)
    assert_close(came, wanted)
    assert_gradients_close(came, mine, wanted, theirs)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_dual_cross_attention_with_shared_queries_and_without_image(dtype: torch.dtype) -> None:
    mine = [random(2, r, 80, dtype=dtype).requires_grad_() for r in (50, 77, 77, 16, 16)]
    q, k, v, ki, vi = mine
    shared = ops.dual_cross_attention((q, k, v), (q, ki, vi), 2)
    alone = ops.dual_cross_attention((q, k, v), None, 2)
    theirs = exact(mine)
    dq, dk, dv, dki, dvi = theirs
    shared_wanted = reference.dual_cross_attention((dq, dk, dv), (dq, dki, dvi), 2)
    assert_close(shared, shared_wanted)
    assert_close(alone, reference.dual_cross_attention((dq, dk, dv), None, 2))
    zero = ops.dual_cross_attention((q, k, v), (random(2, 50, 80, dtype=dtype), ki, 0 * vi), 2)
    assert torch.equal(zero, alone)  # a branch of zero values adds exactly nothing
    assert_gradients_close(shared, mine, shared_wanted, theirs, slack=2)


def test_dual_cross_attention_writes_all_and_nothing_else() -> None:
    q, k, v = (random(3, r, 40) for r in (37, 77, 77))
    around = torch.full((3, 40, 56), float("nan"), device=DEVICE)
    out = around[:, 1:38, 8:48]
    launch = launch_for("dual_cross_attention", 40, q.dtype)
    cross.forward((q, k, v), None, out, 1, 1.0, launch)
    assert_close(out, reference.dual_cross_attention((q.double(), k.double(), v.double()), None, 1))
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize(
    ("f", "n", "c", "heads", "fused"),
    [(16, 3, 64, 4, True), (5, 3, 96, 2, True), (17, 1, 80, 1, True), (4, 3, 80, 2, False)],
)
def test_temporal_block(
    f: int, n: int, c: int, heads: int, fused: bool, dtype: torch.dtype
) -> None:
    x = random(2, f, n, c, dtype=dtype)
    parameters = [
        (1 + 0.1 * random(c)).to(dtype),
        0.1 * random(c, dtype=dtype),
        random(f + 1, c, dtype=dtype) if f != 17 else None,
        random(3 * c, c, dtype=dtype) * c**-0.5,
        random(c, c, dtype=dtype) * c**-0.5,
        random(c, dtype=dtype),
    ]
    mine = [t.detach().requires_grad_() for t in (x, *parameters) if t is not None]
    theirs = exact(mine)

    def layer(tensors: list[Tensor]) -> TemporalLayer:
        rest = tensors[1:]
        return TemporalLayer(*(rest if len(rest) == 6 else [*rest[:2], None, *rest[2:]]))

    came = ops.temporal_block(mine[0], layer(mine), heads, fused=fused)
    wanted = reference.temporal_block(theirs[0], layer(theirs), heads)
    assert_close(came, wanted, slack=2)
    assert_gradients_close(came, mine, wanted, theirs, slack=4)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_groupnorm_silu(channels_last: bool, affine: bool, dtype: torch.dtype) -> None:
    m, c, groups = 2, 30, 3
    x = 2 + random(m, c, 7, 5, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    mine = [x, 1 + random(c, dtype=dtype), random(c, dtype=dtype)]
    mine += [random(m, c, dtype=dtype), random(m, c, dtype=dtype)] if affine else []
    mine = [t.requires_grad_() for t in mine]
    theirs = exact(mine)
    came = ops.groupnorm_silu(mine[0], groups, *mine[1:3], affine=tuple(mine[3:]) or None)
    wanted = reference.groupnorm_silu(
        theirs[0], groups, *theirs[1:3], affine=tuple(theirs[3:]) or None
    )
    assert came.stride() == x.stride()
    assert_close(came, wanted)
    assert_gradients_close(came, mine, wanted, theirs, slack=4)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_geglu(dtype: torch.dtype) -> None:
    x = random(3, 2, 2 * 1100, dtype=dtype).requires_grad_()
    (theirs,) = exact([x])
    came, wanted = ops.geglu(x), reference.geglu(theirs)
    assert_close(came, wanted)
    assert_gradients_close(came, [x], wanted, [theirs])


def test_opcheck_runs_the_kernels() -> None:
    q, k, v = (random(1, 3, 2, 16).requires_grad_() for _ in range(3))
    torch.library.opcheck(torch.ops.hb.temporal_attention, (q, k, v, 1))
    tensors = [random(1, r, 16).requires_grad_() for r in (3, 5, 5, 3, 2, 2)]
    torch.library.opcheck(torch.ops.hb.dual_cross_attention, (*tensors, 1, 0.5))
