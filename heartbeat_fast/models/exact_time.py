"""The time embedding in float32, beside a denoiser that is about to be cast to half precision."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from heartbeat_fast.models.blocks import sinusoid
from heartbeat_fast.models.denoiser import Denoiser


class ExactTime(nn.Module):
    """Denoiser.time on copies of its layers."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.width = denoiser.config.channels[0]
        self.embedding = copy.deepcopy(denoiser.time_embedding)
        self.projections = nn.ModuleList(
            copy.deepcopy(block.time_emb_proj) for block in denoiser.resnets()
        )

    def forward(self, t: Tensor) -> Tensor:
        """t (1,) to temb (1,E)."""
        x = functional.silu(self.embedding["linear_1"](sinusoid(t, self.width)))
        x = functional.silu(self.embedding["linear_2"](x))
        return torch.cat([projection(x) for projection in self.projections], dim=1)
