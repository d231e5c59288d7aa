"""The operations to call: checked, in plain torch or as Triton kernels by one argument.

backend="reference" is reference.py, in any dtype on any device. backend="triton" is a torch.library
operation hb::NAME, opaque to torch.compile, CUDA graphs and torch.export, with a fake
implementation and a gradient. On a CPU an hb operation computes the reference, so that a graph that
holds one can be traced, exported and checked there; under TRITON_INTERPRET=1 it runs its kernel in
Triton's interpreter.

Shapes and legend: reference.py.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional

from heartbeat_kernels import checks, library, library_pointwise, reference
from heartbeat_kernels.checks import KernelError
from heartbeat_kernels.reference import TemporalLayer
from heartbeat_kernels.tuning import gpu_of, table

Backend = Literal["triton", "reference"]
Triple = tuple[Tensor, Tensor, Tensor]


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, backend: Backend = "triton"
) -> Tensor:
    """Self-attention over the frames at each position: q, k, v (B,F,N,E) to (B,F,N,E).

    Strides are free but for the last axis: slices of one packed projection are read in place.

    Raises:
        KernelError: shapes, dtypes, devices or strides that the operation does not take.
    """
    fast = _fast(backend)
    tensors = {"q": q, "k": k, "v": v}
    checks.check_temporal("temporal_attention", tensors, heads, fast=fast)
    if not fast:
        return reference.temporal_attention(q, k, v, heads)
    return library.temporal_attention(q, k, v, heads)


def temporal_block(
    x: Tensor,
    layer: TemporalLayer,
    heads: int,
    *,
    backend: Backend = "triton",
    fused: bool | None = None,
) -> Tensor:
    """A temporal attention layer with norm, projections and residual: x (B,F,N,C) to (B,F,N,C).

    Args:
        fused: one kernel for all of it; None: up to the width the tuning table names, beyond which
            library products around the bare attention are predicted to be faster.

    Raises:
        KernelError: shapes, dtypes, devices or strides that the operation does not take.
    """
    fast = _fast(backend)
    checks.check_block("temporal_block", x, layer, heads, fast=fast)
    if not fast:
        return reference.temporal_block(x, layer, heads)
    if fused is None:
        c = x.shape[-1]
        fused = c % 16 == 0 and c <= table(gpu_of(x.device))["fused_channels"]
    if fused:
        return library.temporal_block(x, *layer[:6], heads, layer.eps)
    out = library.temporal_attention(*reference.projected(x, layer), heads)
    return x + functional.linear(out, layer.w_out, layer.b_out)


def dual_cross_attention(
    text: Triple,
    image: Triple | None,
    heads: int,
    *,
    image_scale: float = 1.0,
    backend: Backend = "triton",
) -> Tensor:
    """CA(text) + image_scale · CA(image), as reference.dual_cross_attention.

    The image branch may have the text branch's queries: give the same tensor, it is read once.

    Raises:
        KernelError: shapes, dtypes, devices or strides that the operation does not take.
    """
    fast = _fast(backend)
    checks.check_cross("dual_cross_attention", text, image, heads, fast=fast)
    if not fast:
        return reference.dual_cross_attention(text, image, heads, image_scale)
    if image is not None and image[0] is text[0]:
        image = (None, *image[1:])  # type: ignore[assignment]
    branch = image or (None, None, None)
    return library.dual_cross_attention(*text, *branch, heads, image_scale)


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    affine: tuple[Tensor, Tensor] | None = None,
    *,
    backend: Backend = "triton",
) -> Tensor:
    """silu(GroupNorm(x)·(1 + scale) + shift): x (M,C,h,w) to the same, in its memory format.

    Raises:
        KernelError: shapes, dtypes, devices or strides that the operation does not take.
    """
    fast = _fast(backend)
    checks.check_groupnorm("groupnorm_silu", x, groups, weight, bias, affine, fast=fast)
    if not fast:
        return reference.groupnorm_silu(x, groups, weight, bias, eps, affine)
    scale, shift = affine or (None, None)
    return library_pointwise.groupnorm_silu(x, groups, weight, bias, eps, scale, shift)


def geglu(x: Tensor, *, backend: Backend = "triton") -> Tensor:
    """value · GELU(gate): (…,2E) to (…,E).

    Raises:
        KernelError: an odd last axis, or a dtype the kernel has not.
    """
    fast = _fast(backend)
    checks.check_geglu("geglu", x, fast=fast)
    return library_pointwise.geglu(x) if fast else reference.geglu(x)


def _fast(backend: str) -> bool:
    if backend not in ("triton", "reference"):
        raise KernelError(f"backend {backend!r} came; wanted 'triton' or 'reference'")
    return backend == "triton"
