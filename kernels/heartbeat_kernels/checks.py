"""What an operation refuses, in one sentence: a kernel given a wrong shape would compute garbage.

The package imports nothing of heartbeat_fast, so its error derives from ValueError as that
package's errors do.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 32  # frames of a clip: two 16-row tiles of the tensor cores
WIDEST = 256  # channels of a temporal layer in one kernel: its sum stays in registers
EXTENT = 2**31  # elements a clip may span: offsets inside a clip are 32-bit, clips' own are 64-bit


class KernelError(ValueError):
    """An operation was given tensors it cannot compute on; says what came and what is wanted."""


def check_alike(op: str, tensors: Mapping[str, Tensor], *, fast: bool) -> None:
    """One device, one dtype; for a kernel also a dtype it has, unit stride last, a span it can
    address.

    Raises:
        KernelError: names the first tensor that differs.
    """
    (first, lead), *_ = tensors.items()
    for name, x in tensors.items():
        if x.device != lead.device:
            raise KernelError(f"{op}: {name} is on {x.device}, {first} on {lead.device}")
        if x.dtype != lead.dtype:
            raise KernelError(f"{op}: {name} is {x.dtype}, {first} {lead.dtype}")
        if not fast:
            continue
        if x.dtype not in DTYPES:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise KernelError(f"{op}: {name} is {x.dtype}; wanted {wanted}, or backend='reference'")
        if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise KernelError(
                f"{op}: {name} has strides {tuple(x.stride())}; wanted its last axis contiguous"
            )
        sizes, strides = x.shape[1:], x.stride()[1:]
        if sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) >= EXTENT:
            raise KernelError(f"{op}: {name} spans more than 2^31 elements per clip: split it")


def check_shape(op: str, name: str, x: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises: KernelError when x is not of exactly this shape."""
    if tuple(x.shape) != wanted:
        raise KernelError(f"{op}: {name} is {tuple(x.shape)}; wanted {wanted}")


def check_rank(op: str, name: str, x: Tensor, axes: str) -> None:
    """Raises: KernelError when x has not one non-empty axis for each letter of `axes`."""
    if x.dim() != len(axes) or 0 in x.shape:
        legend = ",".join(axes)
        raise KernelError(f"{op}: {name} is {tuple(x.shape)}; wanted ({legend}), none of them 0")


def check_heads(op: str, width: int, heads: int) -> int:
    """The head dimension. Raises: KernelError when the heads do not divide the width."""
    if heads < 1 or width % heads:
        raise KernelError(f"{op}: {width} channels do not divide by {heads} heads")
    return width // heads


def check_temporal(op: str, tensors: Mapping[str, Tensor], heads: int, *, fast: bool) -> None:
    """Queries, keys, values (and gradients) (B,F,N,E) alike, of a length a kernel has tiles for.

    Raises:
        KernelError: with the tensor and what is wanted.
    """
    (first, lead), *_ = tensors.items()
    check_rank(op, first, lead, "BFNE")
    for name, x in tensors.items():
        check_shape(op, name, x, tuple(lead.shape))
    check_alike(op, tensors, fast=fast)
    check_heads(op, lead.shape[3], heads)
    if fast and lead.shape[1] > LONGEST:
        raise KernelError(f"{op}: {lead.shape[1]} frames; wanted 1 to {LONGEST}")


def check_cross(
    op: str,
    text: tuple[Tensor, Tensor, Tensor],
    image: tuple[Tensor, Tensor, Tensor] | None,
    heads: int,
    *,
    fast: bool,
) -> None:
    """Queries (B,L,E), keys and values (B,T,E) of each branch; both branches of one B, L, E.

    Raises:
        KernelError: with the tensor and what is wanted.
    """
    check_rank(op, "q", text[0], "BLE")
    b, _, e = text[0].shape
    tensors: dict[str, Tensor] = {}
    for branch, triple in (("", text), ("_image", image)):
        if triple is None:
            continue
        q, k, v = triple
        check_shape(op, f"q{branch}", q, tuple(text[0].shape))
        check_rank(op, f"k{branch}", k, "BTE")
        check_shape(op, f"k{branch}", k, (b, k.shape[1], e))
        check_shape(op, f"v{branch}", v, tuple(k.shape))
        tensors |= {f"q{branch}": q, f"k{branch}": k, f"v{branch}": v}
    check_alike(op, tensors, fast=fast)
    check_heads(op, e, heads)


def check_block(
    op: str, x: Tensor, layer: Any, heads: int, *, fast: bool, fused: bool = False
) -> None:
    """x (B,F,N,C) and a TemporalLayer of its width, with positions for at least its frames.

    Raises:
        KernelError: with the tensor and what is wanted.
    """
    check_temporal(op, {"x": x}, heads, fast=fast)
    f, c = x.shape[1], x.shape[3]
    shapes = {
        "norm_weight": (c,),
        "norm_bias": (c,),
        "w_qkv": (3 * c, c),
        "w_out": (c, c),
        "b_out": (c,),
    }
    for name, shape in shapes.items():
        check_shape(op, name, getattr(layer, name), shape)
    tensors = {"x": x} | {name: getattr(layer, name) for name in shapes}
    if (position := layer.position) is not None:
        if position.dim() != 2 or position.shape[0] < f or position.shape[1] != c:
            raise KernelError(f"{op}: position is {tuple(position.shape)}; wanted (≥{f},{c})")
        tensors["position"] = position
    check_alike(op, tensors, fast=fast)
    if fused:
        for name, tensor in tensors.items():
            if name != "x" and not tensor.is_contiguous():
                raise KernelError(f"{op}: {name} has strides {tensor.stride()}; wanted contiguous")
        if c % 16 or c > WIDEST:
            raise KernelError(
                f"{op}: {c} channels; one kernel takes multiples of 16 to {WIDEST}: fused=False"
            )


def check_groupnorm(
    op: str,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    *,
    fast: bool,
) -> None:
    """x (M,C,h,w) in one of torch's two memory formats, groups that divide C, parameters (C,),
    scale and shift (M,C).

    Raises:
        KernelError: with the tensor and what is wanted.
    """
    check_rank(op, "x", x, "MChw")
    m, c = x.shape[:2]
    if groups < 1 or c % groups:
        raise KernelError(f"{op}: {c} channels do not divide by {groups} groups")
    parameters = {"weight": weight, "bias": bias}
    for name, tensor in parameters.items():
        check_shape(op, name, tensor, (c,))
    for name, tensor in zip(("scale", "shift"), affine or (), strict=False):
        check_shape(op, name, tensor, (m, c))
        parameters[name] = tensor
    check_alike(op, {"x": x} | parameters, fast=False)
    if not fast:
        return
    check_alike(op, {"x": x[0, 0, 0, :1]} | parameters, fast=True)
    formats = torch.contiguous_format, torch.channels_last
    if not any(x.is_contiguous(memory_format=f) for f in formats):
        raise KernelError(f"{op}: x has strides {x.stride()}; wanted NCHW or NHWC without gaps")
    for name, tensor in parameters.items():
        if not tensor.is_contiguous():
            raise KernelError(f"{op}: {name} has strides {tensor.stride()}; wanted contiguous")


def check_geglu(op: str, x: Tensor, *, fast: bool) -> None:
    """Raises: KernelError when the last axis has no two halves, or there is no kernel for it."""
    if not x.dim() or x.shape[-1] % 2 or 0 in x.shape:
        raise KernelError(f"{op}: x is {tuple(x.shape)}; wanted (…,2E), no axis of them 0")
    check_alike(op, {"x": x}, fast=fast)
