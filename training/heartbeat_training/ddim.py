"""The noise schedule in torch, and plain DDIM for samples made while training. The runtime has
tables instead (heartbeat_fast/sampler.py).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from heartbeat_fast.models.heartbeat import HeartBeat


def alphas_cumprod(model: HeartBeat) -> Tensor:
    """ᾱ of SD's "scaled_linear" schedule: √β runs linearly."""
    c = model.config
    beta = torch.linspace(c.beta_start**0.5, c.beta_end**0.5, c.steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0).float()


def mixed_noise(
    shape: Sequence[int], shared: float, generator: torch.Generator | None = None
) -> Tensor:
    """Unit noise (B, F, …) of which `shared` of the power is the same in all frames of a clip."""
    common = torch.randn(shape[0], 1, *shape[2:], generator=generator)
    own = torch.randn(*shape, generator=generator)
    return shared**0.5 * common + (1 - shared) ** 0.5 * own


@torch.no_grad()
def sample(model: HeartBeat, conditions: dict[str, Tensor], z: Tensor, steps: int = 10) -> Tensor:
    """DDIM (Song et al., 2010.02502) from the noise z (B, F, C, h, w): latents of its shape.

    Conditions as `HeartBeat.predict` takes them, encoded once.
    """
    config, place = model.config, conditions["present"].device
    local, text, image = encoded(model, conditions)
    alphas, z = alphas_cumprod(model).to(place), z.to(place)
    times = torch.linspace(config.steps - 1, 0, steps + 1, device=place).round().long()
    for now, then in pairwise(times):
        out = model.denoiser(z, now.expand(len(z)), local, text, image, True).float()
        a, b = alphas[now], alphas[then]
        if config.prediction == "v_prediction":
            z0, noise = a.sqrt() * z - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * z
        else:
            z0, noise = (z - (1 - a).sqrt() * out) / a.sqrt(), out
        z = b.sqrt() * z0 + (1 - b).sqrt() * noise
    return z


def encoded(model: HeartBeat, conditions: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Local features, text tokens and image tokens, as the denoiser takes them."""
    c = conditions
    text = model.text_context(c["tokens"], c["ef"], c["present"])
    image = model.image_context(c["image"], c["present"])
    local = model.local_features(c["sketch"], c["mask"], c["skeleton"], c["flow"], c["present"])
    return local, text, image
