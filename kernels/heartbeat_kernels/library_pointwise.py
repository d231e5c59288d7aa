"""hb::groupnorm_silu and hb::geglu as torch.library knows them; otherwise as library.py."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heartbeat_kernels import checks, reference
from heartbeat_kernels.checks import KernelError
from heartbeat_kernels.library import aten, launch_on, on, runs_kernels


@torch.library.custom_op("hb::groupnorm_silu", mutates_args=())
def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """reference.groupnorm_silu."""
    affine = _affine(scale, shift)
    checks.check_groupnorm("groupnorm_silu", x, groups, weight, bias, affine, fast=True)
    y = torch.empty_like(x)
    if not runs_kernels(x):
        return y.copy_(reference.groupnorm_silu(x, groups, weight, bias, eps, affine))
    from heartbeat_kernels import groupnorm_silu as op

    with on(x):
        op.forward(x, groups, (weight, bias, eps), affine, y, launch_on("groupnorm_silu", 320, x))
    return y


def _affine(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if scale is None or shift is None:
        if not (scale is None and shift is None):
            raise KernelError("groupnorm_silu: scale and shift come together")
        return None
    return scale, shift


@groupnorm_silu.register_fake
def _(x: Tensor, groups: int, *rest: Any) -> Tensor:
    affine = _affine(*rest[3:])
    checks.check_groupnorm("groupnorm_silu", x, groups, rest[0], rest[1], affine, fast=True)
    return torch.empty_like(x)


def _groupnorm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.groups, weight, bias, ctx.eps, scale, shift = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift)


def _groupnorm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift = ctx.saved_tensors
    x = x.contiguous()
    (m, c), spots = x.shape[:2], x.shape[2] * x.shape[3]
    normed, mean, rate = aten.native_group_norm(x, weight, bias, m, c, spots, ctx.groups, ctx.eps)
    gain = None if scale is None else 1 + scale[:, :, None, None]
    z = normed if gain is None else normed * gain + shift[:, :, None, None]
    d_z = aten.silu_backward(grad.contiguous(), z)
    d_scale = None if scale is None else (d_z * normed).sum((2, 3))
    d_shift = None if shift is None else d_z.sum((2, 3))
    d_normed = d_z if gain is None else d_z * gain
    d_x, d_weight, d_bias = aten.native_group_norm_backward(
        d_normed, x, mean, rate, weight, m, c, spots, ctx.groups, [True, True, True]
    )
    return d_x, None, d_weight, d_bias, None, d_scale, d_shift


groupnorm_silu.register_autograd(_groupnorm_gradients, setup_context=_groupnorm_context)


@torch.library.custom_op("hb::geglu", mutates_args=())
def geglu(x: Tensor) -> Tensor:
    """reference.geglu."""
    checks.check_geglu("geglu", x, fast=True)
    if not runs_kernels(x):
        return reference.geglu(x).contiguous()
    from heartbeat_kernels import geglu as op

    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    with on(x):
        op.forward(x, y, launch_on("geglu", x.shape[-1] // 2, x))
    return y


@geglu.register_fake
def _(x: Tensor) -> Tensor:
    checks.check_geglu("geglu", x, fast=True)
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _geglu_gradients(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    e = x.shape[-1] // 2
    value, gate = x[..., :e], x[..., e:]
    return torch.cat([grad * functional.gelu(gate), aten.gelu_backward(grad * value, gate)], -1)


geglu.register_autograd(
    _geglu_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
