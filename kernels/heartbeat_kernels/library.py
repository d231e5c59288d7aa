"""hb::NAME: the operations as torch.library knows them. Import ops.py to call them.

Each has an implementation (its kernel on a GPU and in Triton's interpreter, the reference on a
CPU), a fake one that checks shapes and says what comes out, and a gradient. Attention over frames
has a backward kernel; the others' gradients are computed anew in plain torch, whose products there
are large enough for the library. Gradients of gradients are not defined, and torch says so.
"""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heartbeat_kernels import checks, reference
from heartbeat_kernels.checks import KernelError
from heartbeat_kernels.reference import TemporalLayer
from heartbeat_kernels.tuning import Launch, gpu_of, launch_for

aten = torch.ops.aten


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernels(x: Tensor) -> bool:
    """Whether x's device runs kernels; a CPU does in Triton's interpreter.

    Raises:
        KernelError: a device that has no operation, or a GPU without Triton.
    """
    if x.device.type not in ("cuda", "cpu"):
        raise KernelError(f"hb operations run on cuda and cpu, {x.device} came")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        if x.is_cuda:
            raise KernelError("triton is not installed: pip install triton") from error
        return False
    return x.is_cuda or interpreted()


def launch_on(op: str, width: int, x: Tensor) -> Launch:
    """The tuning table's entry for x's GPU and dtype."""
    return launch_for(op, width, x.dtype, gpu_of(x.device))


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """x's GPU made current: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# Attention over frames


@torch.library.custom_op("hb::temporal_attention", mutates_args=())
def temporal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """reference.temporal_attention."""
    checks.check_temporal("temporal_attention", {"q": q, "k": k, "v": v}, heads, fast=True)
    if not runs_kernels(q):
        return reference.temporal_attention(q, k, v, heads).contiguous()
    from heartbeat_kernels import temporal_attention as op

    out = q.new_empty(q.shape)
    with on(q):
        op.forward(q, k, v, out, heads, launch_on("temporal_attention", q.shape[3] // heads, q))
    return out


@temporal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    checks.check_temporal("temporal_attention", {"q": q, "k": k, "v": v}, heads, fast=True)
    return q.new_empty(q.shape)


@torch.library.custom_op("hb::temporal_attention_backward", mutates_args=())
def temporal_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """reference.temporal_attention_gradients."""
    tensors = {"q": q, "k": k, "v": v, "grad": grad}
    checks.check_temporal("temporal_attention_backward", tensors, heads, fast=True)
    if not runs_kernels(q):
        return reference.temporal_attention_gradients(q, k, v, grad, heads)
    from heartbeat_kernels import temporal_attention as op

    out = (q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape))
    launch = launch_on("temporal_attention_backward", q.shape[3] // heads, q)
    with on(q):
        op.backward(q, k, v, grad, out, heads, launch)
    return out


@temporal_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _temporal_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v = ctx.saved_tensors
    grad = grad.contiguous()  # a sum's gradient is expanded: its strides are zero
    return *temporal_attention_backward(q, k, v, grad, ctx.heads), None


def _temporal_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.heads = inputs[3]


temporal_attention.register_autograd(_temporal_gradients, setup_context=_temporal_context)


# A whole temporal layer


@torch.library.custom_op("hb::temporal_block", mutates_args=())
def temporal_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    position: Tensor | None,
    w_qkv: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """reference.temporal_block."""
    layer = TemporalLayer(norm_weight, norm_bias, position, w_qkv, w_out, b_out, eps)
    checks.check_block("temporal_block", x, layer, heads, fast=True, fused=True)
    if not runs_kernels(x):
        return reference.temporal_block(x, layer, heads).contiguous()
    from heartbeat_kernels import temporal_block as op

    y = x.new_empty(x.shape)
    with on(x):
        op.forward(x, layer, y, heads, launch_on("temporal_block", x.shape[3], x))
    return y


@temporal_block.register_fake
def _(x: Tensor, *parameters: Any) -> Tensor:
    *tensors, heads, eps = parameters
    layer = TemporalLayer(*tensors, eps)  # type: ignore[call-arg]
    checks.check_block("temporal_block", x, layer, heads, fast=True, fused=True)
    return x.new_empty(x.shape)


def _block_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.heads, ctx.eps = inputs[7:]


def _block_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The layer's steps anew, then back through them."""
    x, norm_weight, norm_bias, position, w_qkv, w_out, _ = ctx.saved_tensors
    f, c = x.shape[1], x.shape[3]
    z, mean, rate = aten.native_layer_norm(x, [c], norm_weight, norm_bias, ctx.eps)
    if position is not None:
        z = z + position[:f, None]
    qkv = functional.linear(z, w_qkv)
    q, k, v = qkv[..., :c], qkv[..., c : 2 * c], qkv[..., 2 * c :]
    out = temporal_attention(q, k, v, ctx.heads)

    grad_rows, out_rows = grad.reshape(-1, c), out.reshape(-1, c)
    d_out = (grad_rows @ w_out).reshape(x.shape)
    d_qkv = torch.cat(temporal_attention_backward(q, k, v, d_out, ctx.heads), dim=-1)
    d_z = (d_qkv.reshape(-1, 3 * c) @ w_qkv).reshape(x.shape)
    d_position = None
    if position is not None:
        d_position = functional.pad(d_z.sum((0, 2)), (0, 0, 0, position.shape[0] - f))
    d_x, d_norm_weight, d_norm_bias = aten.native_layer_norm_backward(
        d_z, x, [c], mean, rate, norm_weight, norm_bias, [True, True, True]
    )
    d_w_qkv = d_qkv.reshape(-1, 3 * c).T @ z.reshape(-1, c)
    d_w_out = grad_rows.T @ out_rows
    d_parameters = d_norm_weight, d_norm_bias, d_position, d_w_qkv, d_w_out, grad_rows.sum(0)
    return d_x + grad, *d_parameters, None, None


temporal_block.register_autograd(_block_gradients, setup_context=_block_context)


# Text and image cross-attention


@torch.library.custom_op("hb::dual_cross_attention", mutates_args=())
def dual_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_image: Tensor | None,
    k_image: Tensor | None,
    v_image: Tensor | None,
    heads: int,
    image_scale: float,
) -> Tensor:
    """reference.dual_cross_attention; no q_image: the image branch has the text branch's."""
    text, image = (q, k, v), _image(q, q_image, k_image, v_image)
    checks.check_cross("dual_cross_attention", text, image, heads, fast=True)
    if not runs_kernels(q):
        return reference.dual_cross_attention(text, image, heads, image_scale).contiguous()
    from heartbeat_kernels import dual_cross_attention as op

    out = q.new_empty(q.shape)
    with on(q):
        launch = launch_on("dual_cross_attention", q.shape[2] // heads, q)
        branch = None if image is None else (q_image, *image[1:])
        op.forward(text, branch, out, heads, image_scale, launch)
    return out


def _image(
    q: Tensor, q_image: Tensor | None, k_image: Tensor | None, v_image: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    if k_image is None or v_image is None:
        if not (q_image is None and k_image is None and v_image is None):
            raise KernelError("dual_cross_attention: k_image and v_image come together")
        return None
    return q if q_image is None else q_image, k_image, v_image


@dual_cross_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
    checks.check_cross("dual_cross_attention", (q, k, v), _image(q, *more[:3]), more[3], fast=True)
    return q.new_empty(q.shape)


def _cross_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.heads, ctx.image_scale = inputs[6:]


def _cross_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, q_image, k_image, v_image = ctx.saved_tensors
    d_q, d_k, d_v = reference.attention_gradients(q, k, v, grad, ctx.heads)
    if k_image is None:
        return d_q, d_k, d_v, None, None, None, None, None
    queries, scaled = q if q_image is None else q_image, grad * ctx.image_scale
    d_qi, d_ki, d_vi = reference.attention_gradients(queries, k_image, v_image, scaled, ctx.heads)
    if q_image is None:
        return d_q + d_qi, d_k, d_v, None, d_ki, d_vi, None, None
    return d_q, d_k, d_v, d_qi, d_ki, d_vi, None, None


dual_cross_attention.register_autograd(_cross_gradients, setup_context=_cross_context)
