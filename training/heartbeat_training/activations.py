"""What the layers of the model keep for the backward pass, and what they compute: arithmetic.

Counted from the layers of a model on the meta device, for bfloat16 autocast as `loop` trains.
Products (convolution, linear, attention) read and write bfloat16. Norms are in float32 on CUDA, by
its autocast rules, with a float32 copy of their input; a CPU leaves them in bfloat16: `wide` says
which. Layers with frozen weights keep less, as their inputs are not needed. Legend: M images, N
positions of an image, C channels, F frames, T context tokens; bytes and floating-point operations
(FLOP, a multiplication and an addition each) are of one image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from heartbeat_fast.models.blocks import ResBlock, Transformer, TransformerBlock
from heartbeat_fast.models.conditioning import LOCAL_INPUTS, SCALE
from heartbeat_fast.models.config import HeartBeatConfig
from heartbeat_fast.models.heartbeat import HeartBeat

HALF, FULL = 2, 4  # bytes


@dataclass(frozen=True)
class Cost:
    """A layer, for one image. Checkpointed layers keep their input alone and run twice."""

    name: str
    kept: float  # bytes for the backward pass
    source: float  # bytes of its input, what a checkpoint keeps instead
    flop: float  # forward
    checkpointed: bool = False


def costs(model: HeartBeat, stage: int, wide: bool = True) -> Iterator[Cost]:
    """Every layer that a training step runs with gradients. stage: 1 images, 2 clips (also CMR).

    Which weights learn is read off `requires_grad`; the model may lie on the meta device.
    """
    config, denoiser = model.config, model.denoiser
    frames = 1 if stage == 1 else config.frames
    side = config.latent
    yield from _conditions(model, side * side, frames)
    yield _context(model, frames)
    yield _conv("conv_in", denoiser.conv_in, side * side)
    for name, layer in denoiser.stages():
        for j, resnet in enumerate(layer.resnets):
            assert isinstance(resnet, ResBlock)
            yield _resnet(f"{name} residual {j}", resnet, side * side, wide)
            if j < len(layer.attentions):
                transformer = layer.attentions[j]
                assert isinstance(transformer, Transformer)
                title = f"{name} transformer {j}"
                yield _transformer(title, transformer, config, side * side, frames, stage, wide)
        for sampler, factor in ((layer.downsamplers, 1), (layer.upsamplers, 2)):
            if sampler is not None:
                side = side * factor
                yield _conv(f"{name} resampling", sampler[0].get_submodule("conv"), side * side)
                side = side if factor == 2 else side // 2
    last = denoiser.conv_out
    channels, positions = last.in_channels, side * side
    norm = (2 * FULL if wide else 2 * HALF) * channels * positions
    out = _conv("conv_out", last, positions)
    yield Cost("conv_out", out.kept + norm, out.source, out.flop)


def weight_copies(model: HeartBeat, stage: int) -> int:
    """Bytes of the bfloat16 copies of the denoiser's weights, kept until the backward pass ends.

    A weight is kept where its input asks for gradients: those of the time embedding and of the
    context do only if something before them learns.
    """
    denoiser = model.denoiser
    context = any(
        p.requires_grad for p in (*model.adapter.parameters(), *model.ef_token.parameters())
    )
    time = any(p.requires_grad for p in denoiser.time_embedding.parameters())
    kept = 0
    for name, module in denoiser.named_modules():
        unread = (
            (not context and ".attn2.to_" in name and name.split(".to_")[1][0] in "kv")
            or (not time and "time_emb" in name)
            or (stage == 1 and "_temporal." in name)
        )
        if isinstance(module, nn.Conv2d | nn.Linear) and not unread:
            kept += HALF * module.weight.numel()
    return kept


def _learns(module: nn.Module) -> int:
    """1 if a layer's weight learns: then it keeps its input."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.requires_grad)


def _conv(name: str, conv: nn.Module, positions: int) -> Cost:
    """A convolution by itself, keeping its bfloat16 input; positions: of the input."""
    assert isinstance(conv, nn.Conv2d)
    kernel = conv.kernel_size[0] * conv.kernel_size[1]
    outputs = positions // (conv.stride[0] * conv.stride[1])
    kept = HALF * conv.in_channels * positions
    return Cost(name, kept, kept, 2 * kernel * conv.in_channels * conv.out_channels * outputs)


def _resnet(name: str, block: ResBlock, n: int, wide: bool) -> Cost:
    """Per norm: its input, SiLU's input; per convolution its input; the shortcut's input."""
    c_in, c = block.conv1.in_channels, block.conv1.out_channels
    norm = 2 * FULL if wide else 2 * HALF
    kept = (norm + HALF) * (c_in + c) * n
    # A norm in bfloat16 keeps the block's input as it is: the shortcut's is the same tensor.
    shortcut = block.conv_shortcut is not None
    kept += HALF * c_in * n if shortcut and wide else 0
    flop = 2 * n * c * (9 * c_in + 9 * c + c_in * shortcut)
    return Cost(name, kept, HALF * c_in * n, flop, checkpointed=True)


def _transformer(
    name: str,
    transformer: Transformer,
    config: HeartBeatConfig,
    n: int,
    frames: int,
    stage: int,
    wide: bool,
) -> Cost:
    """1×1 convolutions around the block: two bfloat16 inputs and the norm's."""
    block = transformer.transformer_blocks[0]
    assert isinstance(block, TransformerBlock)
    c = transformer.proj_in.in_channels
    kept: float = ((FULL if wide else HALF) + 2 * HALF) * c * n
    flop: float = 4.0 * n * c * c
    for part in (
        _self_attention(block, n, wide),
        _cross_attention(block, config, n, wide),
        _feed_forward(block, n, wide),
        _over_frames(block, n, frames, wide) if stage == 2 else (0.0, 0.0),
    ):
        kept, flop = kept + part[0], flop + part[1]
    return Cost(name, kept, HALF * c * n, flop, checkpointed=True)


def _self_attention(block: TransformerBlock, n: int, wide: bool) -> tuple[float, float]:
    """Norm's input; q, k, v, the output, a float32 sum per head and position.

    Each projection of a float32 input makes its own bfloat16 copy.
    """
    layer, c = block.attn1, block.norm1.normalized_shape[0]
    inputs = _learns(layer.to_q) * (3 if wide else 1)
    kept = (FULL if wide else HALF) * c + HALF * c * (inputs + 4) + FULL * layer.heads
    return n * kept, n * (8.0 * c * c + 4.0 * n * c)


def _cross_attention(
    block: TransformerBlock, config: HeartBeatConfig, n: int, wide: bool
) -> tuple[float, float]:
    """As self-attention, per branch, but for keys and values."""
    layer, c = block.attn2, block.norm2.normalized_shape[0]
    learns, tokens = _learns(layer.to_q), _tokens(config)
    branches = len(tokens)
    inputs = learns * (branches if wide else 1)
    kept: float = (FULL if wide else HALF) * c + HALF * c * (inputs + 2 * branches + learns)
    kept = n * (kept + FULL * layer.heads * branches)
    return kept, n * 2.0 * c * c * (branches + 1) + n * 4.0 * c * sum(tokens)


def _tokens(config: HeartBeatConfig) -> list[int]:
    """Context tokens per branch: text with the EF token, image."""
    return [config.text.tokens + 1] + [config.image.grid**2] * config.denoiser.image_branch


def _context(model: HeartBeat, frames: int) -> Cost:
    """Keys and values of all cross-attentions, once for a clip, and what they are made from, each
    copied for each. Checkpoints keep them too."""
    kept = flop = 0.0
    dim = model.config.denoiser.context_dim
    for _, transformer in model.denoiser.transformers():
        layer, c = transformer.cross_attention, transformer.proj_in.in_channels
        count = sum(_tokens(model.config)) / frames
        kept += count * HALF * 2 * (c + _learns(layer.to_q) * dim)
        flop += count * 4.0 * dim * c
    return Cost("context", kept, 0.0, flop)


def _feed_forward(block: TransformerBlock, n: int, wide: bool) -> tuple[float, float]:
    """Norm's input, the projection (both halves are factors), GELU's output, and both inputs."""
    out = block.ff.net[2]
    assert isinstance(out, nn.Linear)
    c, inner, learns = out.out_features, out.in_features, _learns(out)
    kept = (FULL if wide else HALF) * c + HALF * (3 * inner + learns * (c + inner))
    return n * kept, n * 6.0 * c * inner


def _over_frames(block: TransformerBlock, n: int, frames: int, wide: bool) -> tuple[float, float]:
    """As self-attention, over F tokens. Positions make the input float32, so it is copied three
    times; the output is copied once more, as its order changes."""
    layer, norm = block.attn_temporal, block.norm_temporal
    if layer is None or norm is None:
        return 0.0, 0.0
    c = norm.normalized_shape[0]
    inputs = 4 * _learns(layer.to_q)
    kept = (FULL if wide else HALF) * c + HALF * c * (inputs + 4) + FULL * layer.heads
    return n * kept, n * (8.0 * c * c + 4.0 * frames * c)


def _conditions(model: HeartBeat, n: int, frames: int) -> Iterator[Cost]:
    """The local encoders and the adapter that learn; the rest runs without gradients."""
    config = model.config
    hidden, out = config.local_hidden, config.denoiser.local_channels
    for name, channels in LOCAL_INPUTS.items():
        encoder = model.get_submodule(name)
        if any(p.requires_grad for p in encoder.parameters()):
            share = 1 / frames if name == "sketch" else 1.0  # one for the clip
            inputs = channels * SCALE**2
            flop = 18.0 * n * hidden * (inputs + out)
            yield Cost(name, share * HALF * n * (inputs + 2 * hidden), 0.0, share * flop)
    if any(p.requires_grad for p in model.adapter.parameters()):
        image = config.image
        patches = (image.size // image.patch) ** 2
        flop = 2.0 * patches * image.channels * image.adapter
        tokens = image.grid**2 * (HALF * image.adapter + FULL * config.denoiser.context_dim)
        kept = HALF * image.channels * patches + tokens  # BatchNorm's input is the batch
        yield Cost("adapter", kept / frames, 0.0, flop / frames)
