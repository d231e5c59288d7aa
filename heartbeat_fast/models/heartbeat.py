"""The assembled model: conditions and noisy latents in, noise or v out; and its folder on disk.

Legend: B clips, F frames, C channels, h w latents. A folder is laid out as diffusers lays out a
pipeline: one subfolder per component with config.json and safetensors, model_index.json above.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from heartbeat_fast.models.codec import build_codec
from heartbeat_fast.models.conditioning import LOCAL_INPUTS, Conditioning
from heartbeat_fast.models.config import HeartBeatConfig
from heartbeat_fast.models.denoiser import Denoiser


class HeartBeat(Conditioning):
    """HeartBeat (Zhou et al., MICCAI 2024): a video UNet under seven conditions, and its codec."""

    def __init__(self, config: HeartBeatConfig) -> None:
        super().__init__(config)
        self.denoiser = Denoiser(config.denoiser)
        self.codec = build_codec(config.codec)

    def predict(
        self, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor], temporal: bool = True
    ) -> Tensor:
        """The plain pass: every step of the way, nothing kept.

        Args:
            z: noisy latents (B,F,C,h,w).
            t: timesteps (B,).
            conditions: tokens (B,77), ef (B,1), image, sketch, mask, skeleton, flow, present (B,7),
                shaped as `Conditions.arrays` makes them.
            temporal: False makes frames independent of each other.

        Returns:
            Predicted noise or v (`config.prediction`), (B,F,C,h,w).
        """
        c = conditions
        text = self.text_context(c["tokens"], c["ef"], c["present"])
        image = self.image_context(c["image"], c["present"])
        local = self.local_features(*[c[name] for name in LOCAL_INPUTS], present=c["present"])
        return self.denoiser(z, t, local, text, image, temporal)

    def train(self, mode: bool = True) -> "HeartBeat":
        """As torch's, but components without a trainable parameter stay in evaluation: a frozen
        adapter must not go on gathering BatchNorm statistics."""
        super().train(mode)
        for part in self.children():
            if mode and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self


def stage_parameters(
    model: HeartBeat, stage: int, train_cross_attention: bool = True
) -> dict[str, nn.Parameter]:
    """What a training stage trains, by name.

    Stage 1, images: everything but the codec, the temporal layers and the flow encoder; text and
    image encoders only where they do not come pretrained. Stage 2, clips: the temporal layers and
    the flow encoder. The paper's text freezes cross-attention in stage 2 and its figure does not:
    train_cross_attention decides.
    """
    temporal = {f"denoiser.{name}" for name in model.denoiser.temporal_parameters()}
    cross = {f"denoiser.{name}" for name in model.denoiser.cross_attention_parameters()}
    frozen = ("codec.", "flow.")
    if model.config.pretrained:
        frozen = (*frozen, "text_encoder.", "image_encoder.")
    named = dict(model.named_parameters())
    if stage == 1:
        return {k: p for k, p in named.items() if k not in temporal and not k.startswith(frozen)}
    chosen = temporal | cross if train_cross_attention else temporal
    return {k: p for k, p in named.items() if k in chosen or k.startswith("flow.")}


def train_only(model: HeartBeat, parameters: Mapping[str, nn.Parameter]) -> None:
    """Lets exactly these parameters of the model ask for gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
