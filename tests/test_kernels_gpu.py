"""Triton kernels on a GPU: the same numerics as in the interpreter, real sizes, CUDA graphs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heartbeat_kernels import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUMERICS = Path(__file__).with_name("kernels_numerics.py")


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def error(came: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((came.float() - wanted).abs().max() / wanted.abs().max())


def test_numerics_compiled() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(NUMERICS)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize(("n", "c"), [(1024, 320), (256, 640), (64, 1280), (16, 1280)])
def test_bases_shapes(n: int, c: int) -> None:
    q, k, v = half(2, 16, n, 3 * c).split(c, dim=-1)
    wanted = reference.temporal_attention(q.float(), k.float(), v.float(), 8)
    assert error(ops.temporal_attention(q, k, v, 8), wanted) < 1e-2
    text, image = ((half(2, 16 * n, c), half(2, t, c), half(2, t, c)) for t in (77, 64))
    exact = [tuple(x.float() for x in branch) for branch in (text, image)]
    wanted = reference.dual_cross_attention(exact[0], exact[1], 8)  # type: ignore[arg-type]
    assert error(ops.dual_cross_attention(text, image, 8), wanted) < 1e-2


def test_more_rows_than_a_library_call_takes() -> None:
    """64 clips of 32×32 latents: 65,536 sequences, where CUDA's attention has refused to launch."""
    q, k, v = half(65, 16, 1024, 32), half(65, 16, 1024, 32), half(65, 16, 1024, 32)
    came = ops.temporal_attention(q, k, v, 1)
    last = [x[-1:].float() for x in (q, k, v)]
    assert error(came[-1:], reference.temporal_attention(*last, 1)) < 1e-2


def test_a_cuda_graph_replays_on_new_inputs() -> None:
    q, k, v = half(1, 16, 64, 320), half(1, 16, 64, 320), half(1, 16, 64, 320)
    ops.temporal_attention(q, k, v, 8)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.temporal_attention(q, k, v, 8)
    q.copy_(half(1, 16, 64, 320))
    graph.replay()
    wanted = reference.temporal_attention(q.float(), k.float(), v.float(), 8)
    assert error(out, wanted) < 1e-2


def test_compiles_through_the_inductor() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ops.dual_cross_attention((q * 2, k, k), (q, k, k), 8) + q

    q, k = half(1, 512, 320).requires_grad_(), half(1, 77, 320).requires_grad_()
    came = torch.compile(layer, fullgraph=True)(q, k)
    assert error(came, layer(q, k).float()) < 1e-2
    one = torch.autograd.grad(came.sum(), (q, k))
    other = torch.autograd.grad(layer(q, k).sum(), (q, k))
    assert all(error(a, b.float()) < 2e-2 for a, b in zip(one, other, strict=True))


def test_tensors_of_two_places_are_refused() -> None:
    with pytest.raises(ValueError, match="k is on cpu"):
        ops.temporal_attention(half(1, 4, 2, 32), half(1, 4, 2, 32).cpu(), half(1, 4, 2, 32), 2)
