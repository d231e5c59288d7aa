"""The denoiser: one UNet for images and clips, with Stable Diffusion's layers under its names.

Legend: B clips, F frames, M = B·F, C channels, h w latents, T tokens, D context width, S timesteps,
E all residual blocks' time embeddings side by side. Clips of one frame are images: they pass no
temporal layer.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from heartbeat_fast.models.blocks import (
    Downsample,
    ResBlock,
    Step,
    Transformer,
    Upsample,
    sinusoid,
)
from heartbeat_fast.models.config import DenoiserConfig


class Stage(nn.Module):
    """One level on one side: residual blocks, each followed by a transformer where the level has
    them; then the step to the next level. Diffusers calls it a down, up or mid block."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Transformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def layer(self, j: int, x: Tensor, step: Step) -> Tensor:
        """The j-th residual block and its transformer: (M,C_in,h,w) to (M,C,h,w)."""
        x = self.resnets[j](x, step)
        return self.attentions[j](x, step) if j < len(self.attentions) else x


class Denoiser(nn.Module):
    """Noise (or v) of latents at time t under the local features, text and image tokens.

    `forward` is the plain pass. `context`, `time` and `local_share` are what a clip or a sampler
    computes once; `denoise` is what is left for the loop.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        widths, depth = config.channels, len(config.channels)
        self.time_dim = 4 * widths[0]
        inputs = config.latent_channels + config.local_channels
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {
                "linear_1": nn.Linear(widths[0], self.time_dim),
                "linear_2": nn.Linear(self.time_dim, self.time_dim),
            }
        )

        # Down: each level notes the widths it leaves for the way up, one per layer and one of its
        # downsampling; lean: one.
        skips = [] if config.lean else [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            c_in = widths[max(level - 1, 0)]
            last = level == depth - 1
            stage = self._stage(level, [c_in] + [width] * (config.layers - 1))
            if not last:
                stage.downsamplers = nn.ModuleList([Downsample(width)])
            skips += [width] * (config.layers * (not config.lean) + (not last))
            self.down_blocks.append(stage)

        # Middle
        self.mid_block: Stage | None = None
        if not config.lean:
            self.mid_block = self._stage(depth - 1, [widths[-1]] * 2, transformers=1)

        # Up: widths come back in reverse.
        self.up_blocks = nn.ModuleList()
        c = widths[-1]
        for level in reversed(range(depth)):
            c_ins = []
            for j in range(config.layers + (not config.lean)):
                c_ins.append(c + (skips.pop() if self._takes_skip(level, j) else 0))
                c = widths[level]
            bare = config.lean and level == depth - 1
            stage = self._stage(level, c_ins, transformers=0 if bare else None)
            if level:
                c_out = widths[level - 1] if config.lean else c
                stage.upsamplers = nn.ModuleList([Upsample(c, c_out)])
                c = c_out
            self.up_blocks.append(stage)

        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.latent_channels, 3, padding=1)
        self._number_layers()

    def _stage(self, level: int, c_ins: list[int], transformers: int | None = None) -> Stage:
        """A level's layers, with the given widths coming in; transformers: how many, if not by the
        level's attention flag."""
        config, width = self.config, self.config.channels[level]
        if transformers is None:
            transformers = len(c_ins) if config.attention[level] else 0
        return Stage(
            [ResBlock(c, width, self.time_dim, config.groups) for c in c_ins],
            [
                Transformer(
                    width,
                    config.heads[level],
                    config.groups,
                    config.context_dim,
                    config.ff_mult,
                    config.image_branch,
                    config.frames if config.temporal else 0,
                )
                for _ in range(transformers)
            ],
        )

    def _takes_skip(self, level: int, j: int) -> bool:
        """Whether the j-th layer of a level's way up is given a skip."""
        return not self.config.lean or (j == 0 and level < len(self.config.channels) - 1)

    def _number_layers(self) -> None:
        """Tells every layer its place in Step.temb and Step.kv."""
        first = 0
        for block in self.resnets():
            block.first = first
            first += block.time_emb_proj.out_features
        branches = ("text", "image") if self.config.image_branch else ("text",)
        names: list[str] = []
        for index, (name, transformer) in enumerate(self.transformers()):
            transformer.index = index
            names += [f"kv_{name}_{branch}_{which}" for branch in branches for which in "kv"]
        self.kv_names = tuple(names)

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """Every stage in the order of the pass, by a short name: down0, …, mid, up0, …"""
        yield from ((f"down{i}", stage) for i, stage in enumerate(_stages(self.down_blocks)))
        if self.mid_block is not None:
            yield "mid", self.mid_block
        yield from ((f"up{i}", stage) for i, stage in enumerate(_stages(self.up_blocks)))

    def resnets(self) -> Iterator[ResBlock]:
        """Every residual block in the order of the pass."""
        for _, stage in self.stages():
            yield from stage.resnets  # type: ignore[misc]

    def transformers(self) -> Iterator[tuple[str, Transformer]]:
        """Every transformer in the order of the pass, by a short name: down1_0."""
        for name, stage in self.stages():
            for j, transformer in enumerate(stage.attentions):
                yield f"{name}_{j}", transformer  # type: ignore[misc]

    def temporal_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the layers that see more than one frame, by name."""
        return {k: p for k, p in self.named_parameters() if "_temporal." in k}

    def cross_attention_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the dual cross-attention layers, by name."""
        return {k: p for k, p in self.named_parameters() if ".attn2." in k}

    # The parts that do not change with the step

    def context(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values of every cross-attention, in the order of `kv_names`.

        Args:
            text: (B,T,D).
            image: (B,T',D), or None: then text keys and values only, two per layer.

        Returns:
            Tensors (B,T,C): per layer text k, text v, image k, image v.
        """
        if image is not None and not self.config.image_branch:
            image = None
        layers = [t.cross_attention.context(text, image) for _, t in self.transformers()]
        return tuple(tensor for kv in layers for tensor in kv)

    def time(self, t: Tensor) -> Tensor:
        """Every residual block's projected time embedding: t (S,) to (S,E)."""
        linear_1, linear_2 = self.time_embedding["linear_1"], self.time_embedding["linear_2"]
        x = sinusoid(t, self.config.channels[0]).to(self.conv_in.weight.dtype)
        x = functional.silu(linear_2(functional.silu(linear_1(x))))
        return torch.cat([block.time_emb_proj(x) for block in self.resnets()], dim=1)

    def local_share(self, local: Tensor) -> Tensor:
        """The local features' part of the first convolution, which is linear:
        conv([z,c]) = conv_z(z) + conv_c(c). (B,F,Cl,h,w) to (B,F,C₀,h,w)."""
        weight = self.conv_in.weight[:, self.config.latent_channels :]
        share = functional.conv2d(local.flatten(0, 1), weight, padding=1)
        return share.unflatten(0, local.shape[:2])

    # The pass

    def denoise(
        self,
        z: Tensor,
        temb: Tensor,
        share: Tensor,
        kv: Sequence[Tensor],
        temporal: bool = True,
    ) -> Tensor:
        """The loop's part.

        Args:
            z: latents (B,F,C,h,w).
            temb: `time` of this step, (1,E) or (B,E).
            share: `local_share` of the local features, (B,F,C₀,h,w).
            kv: `context` of the tokens.
            temporal: False makes frames independent of each other.

        Returns:
            (B,F,C,h,w).
        """
        weight = self.conv_in.weight[:, : self.config.latent_channels]
        x = functional.conv2d(z.flatten(0, 1), weight, self.conv_in.bias, padding=1)
        return self._unet(x + share.flatten(0, 1), z.shape[1], temb, kv, temporal)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        local: Tensor | None,
        text: Tensor,
        image: Tensor | None = None,
        temporal: bool = True,
    ) -> Tensor:
        """The plain pass.

        Args:
            z: latents (B,F,C,h,w).
            t: timesteps (B,), any number type.
            local: local features (B,F,Cl,h,w); None in a model without local channels.
            text: (B,T,D).
            image: (B,T',D), or None: no image branch.
            temporal: False makes frames independent of each other.

        Returns:
            (B,F,C,h,w).
        """
        x = z if local is None else torch.cat([z, local], dim=2)
        x = self.conv_in(x.flatten(0, 1))
        return self._unet(x, z.shape[1], self.time(t), self.context(text, image), temporal)

    def _unet(
        self, x: Tensor, frames: int, temb: Tensor, kv: Sequence[Tensor], temporal: bool
    ) -> Tensor:
        """Everything behind the first convolution: (M,C₀,h,w) to (B,F,C,h,w)."""
        if temb.shape[0] > 1:
            temb = temb.repeat_interleave(frames, dim=0)
        per_layer = 4 if len(kv) == len(self.kv_names) and self.config.image_branch else 2
        layers = [tuple(kv[i : i + per_layer]) for i in range(0, len(kv), per_layer)]
        step = Step(frames, temb, layers, temporal and frames > 1)

        # Down; a lean network keeps one skip per level, Stable Diffusion every x
        seen, kept = [x], []
        for stage in _stages(self.down_blocks):
            for j in range(len(stage.resnets)):
                seen.append(stage.layer(j, seen[-1], step))
            kept.append(seen[-1])
            if stage.downsamplers is not None:
                seen.append(stage.downsamplers[0](seen[-1]))
        x, skips = seen[-1], kept[:-1] if self.config.lean else seen

        # Middle
        if self.mid_block is not None:
            x = self.mid_block.resnets[1](self.mid_block.layer(0, x, step), step)

        # Up
        for i, stage in enumerate(_stages(self.up_blocks)):
            level = len(self.up_blocks) - 1 - i
            for j in range(len(stage.resnets)):
                if self._takes_skip(level, j):
                    x = torch.cat([x, skips.pop()], dim=1)
                x = stage.layer(j, x, step)
            if stage.upsamplers is not None:
                x = stage.upsamplers[0](x)

        x = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (-1, frames))


def _stages(blocks: nn.ModuleList) -> list[Stage]:
    """A module list with the type of what it holds."""
    return list(blocks)  # type: ignore[arg-type]
