"""The denoiser against diffusers, its hoisted parts against the plain pass, frames and clips."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from heartbeat_fast.models.config import NANO, ConfigError, DenoiserConfig, from_dict, to_dict
from heartbeat_fast.models.denoiser import Denoiser
from heartbeat_kernels.reference import attention, dual_cross_attention, temporal_attention

SD15 = DenoiserConfig(
    local_channels=0,
    channels=(32, 64, 96, 96),
    heads=(4, 4, 4, 4),
    context_dim=24,
    groups=8,
    image_branch=False,
    temporal=False,
)
SMALL = replace(SD15, channels=(32, 64), heads=(2, 4), attention=(True, False), layers=1)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def diffusers_unet(config: DenoiserConfig) -> UNet2DConditionModel:
    """Diffusers' UNet of the same shape, with random weights."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)]
    return UNet2DConditionModel(
        in_channels=config.latent_channels + config.local_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        layers_per_block=config.layers,
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.groups,
    ).eval()


def inputs(config: DenoiserConfig, clips: int = 2, frames: int = 3, side: int = 8) -> list[Tensor]:
    """z, t, local, text, image."""
    shape = (clips, frames, config.latent_channels, side, side)
    local = (clips, frames, config.local_channels, side, side)
    tokens = (clips, 5, config.context_dim)
    t = torch.randint(0, 1000, (clips,))
    return [torch.randn(shape), t, torch.randn(local), torch.randn(tokens), torch.randn(tokens)]


def video(seed: int = 0, trained: bool = True) -> Denoiser:
    """A nano denoiser; trained: its temporal layers no longer end in zeros."""
    torch.manual_seed(seed)
    model = Denoiser(NANO.denoiser).eval()
    if trained:
        for parameter in model.temporal_parameters().values():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("local_channels", [0, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (32, 8)])
@pytest.mark.parametrize("config", [SD15, SMALL], ids=["sd15", "small"])
@torch.no_grad()
def test_equals_diffusers(
    config: DenoiserConfig, height: int, width: int, local_channels: int
) -> None:
    """Temporal layers and image branch off, same weights: UNet2DConditionModel to 1e-5."""
    torch.manual_seed(0)
    config = replace(config, local_channels=local_channels)
    theirs = diffusers_unet(config)
    ours = Denoiser(config).eval()
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(3, 1, 4, height, width)
    local = torch.randn(3, 1, local_channels, height, width)
    t, text = torch.tensor([0, 421, 999]), torch.randn(3, 7, config.context_dim)
    expected = theirs(torch.cat([z, local], 2)[:, 0], t, text).sample
    assert relative(ours(z, t, local, text)[:, 0], expected) <= 1e-5


@torch.no_grad()
def test_extra_layers_keep_diffusers_names_and_values() -> None:
    """Added layers have their own names; zero tokens and fresh temporal layers add nothing."""
    torch.manual_seed(0)
    theirs = diffusers_unet(SD15)
    ours = Denoiser(replace(SD15, image_branch=True, temporal=True)).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert all("_ip." in name or "_temporal." in name for name in missing)
    z, t, text = torch.randn(2, 3, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 7, 24)
    expected = theirs(
        z.flatten(0, 1), t.repeat_interleave(3), text.repeat_interleave(3, dim=0)
    ).sample
    out = ours(z, t, None, text, torch.zeros(2, 4, 24))
    assert relative(out.flatten(0, 1), expected) <= 1e-5


@pytest.mark.parametrize("null", [False, True], ids=["conditions", "nothing present"])
@pytest.mark.parametrize("with_image", [True, False])
@torch.no_grad()
def test_hoisted_equals_forward(null: bool, with_image: bool) -> None:
    """context, time, local_share and denoise together are the plain pass, guidance's null too."""
    model = video()
    z, t, local, text, image = inputs(NANO.denoiser)
    if null:
        local, image = local * 0, image * 0
    image_or_none = image if with_image else None
    kv = model.context(text, image_or_none)
    share, temb = model.local_share(local), model.time(t)
    expected = model(z, t, local, text, image_or_none)
    assert relative(model.denoise(z, temb, share, kv), expected) <= 1e-5
    one = model.denoise(z[:1], model.time(t[:1]), share[:1], tuple(x[:1] for x in kv))
    assert relative(one, expected[:1]) <= 1e-5
    assert len(kv) == (len(model.kv_names) if with_image else len(model.kv_names) // 2)


@torch.no_grad()
def test_time_of_all_steps_at_once_is_each_step() -> None:
    """A sampler's table of time embeddings, and one row of it for a whole batch."""
    model = video()
    z, _, local, text, image = inputs(NANO.denoiser)
    table = model.time(torch.tensor([999.0, 500.5, 1.0]))
    share, kv = model.local_share(local), model.context(text, image)
    expected = model(z, torch.tensor([500.5, 500.5]), local, text, image)
    assert relative(model.denoise(z, table[1:2], share, kv), expected) <= 1e-5


@torch.no_grad()
def test_inflated_equals_image_model_frame_by_frame() -> None:
    """At initialisation temporal layers add nothing: every frame is the image model's."""
    model = video(trained=False)
    image_model = Denoiser(replace(NANO.denoiser, temporal=False)).eval()
    image_model.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "_temporal." not in k}
    )
    z, t, local, text, image = inputs(NANO.denoiser)
    out = model(z, t, local, text, image)
    for f in range(z.shape[1]):
        frame = image_model(z[:, f : f + 1], t, local[:, f : f + 1], text, image)
        assert relative(out[:, f : f + 1], frame) <= 1e-5


@torch.no_grad()
def test_temporal_layers_see_other_frames_only_when_asked() -> None:
    """A change in one frame reaches the others through temporal layers and nothing else."""
    model = video()
    z, t, local, text, image = inputs(NANO.denoiser)
    changed = z.clone()
    changed[:, 0] += 1
    for temporal in (True, False):
        before = model(z, t, local, text, image, temporal)[:, 1:]
        after = model(changed, t, local, text, image, temporal)[:, 1:]
        assert (relative(after, before) > 1e-4) == temporal
    single = model(z[:, :1], t, local[:, :1], text, image)
    alone = model(z, t, local, text, image, temporal=False)[:, :1]
    assert relative(single, alone) <= 1e-5


@torch.no_grad()
def test_clips_of_a_batch_never_see_each_other() -> None:
    """Every input of clip 0 changed, clip 1's output stays."""
    model = video()
    first, other = inputs(NANO.denoiser), inputs(NANO.denoiser)
    before = model(*first)
    mixed = [torch.cat([b[:1], a[1:]]) for a, b in zip(first, other, strict=True)]
    after = model(*mixed)
    assert relative(after[1], before[1]) <= 1e-5
    assert relative(after[0], before[0]) > 1e-2


@torch.no_grad()
def test_frames_share_keys_and_values_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-attention is handed the hoisted tensors themselves, one per clip for all frames."""
    model = video()
    z, t, local, text, image = inputs(NANO.denoiser)
    kv = model.context(text, image)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(
        text_qkv: tuple[Tensor, Tensor, Tensor],
        image_qkv: tuple[Tensor, Tensor, Tensor],
        heads: int,
    ) -> Tensor:
        assert text_qkv[0].shape[:2] == (2, 3 * 16)  # frames folded into the queries
        seen.extend([text_qkv[1:], image_qkv[1:]])
        return dual_cross_attention(text_qkv, image_qkv, heads)

    monkeypatch.setattr("heartbeat_fast.models.blocks.dual_cross_attention", spy)
    model.denoise(z, model.time(t), model.local_share(local), kv)
    assert [x.data_ptr() for pair in seen for x in pair] == [x.data_ptr() for x in kv]


def test_reference_operations_are_their_formulas() -> None:
    """softmax(q kᵀ/√d) v per head, written out."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 7, 12).unbind(0)  # (B,F,N,E)
    ki, vi = torch.randn(2, 2, 9, 12).unbind(0)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One head: (L,d), (T,d), (T,d)."""
        return torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v

    out = temporal_attention(q, k, v, heads=3)
    assert torch.allclose(
        out[1, :, 4, 4:8], plain(*(x[1, :, 4, 4:8] for x in (q, k, v))), atol=1e-5
    )
    queries, kt, vt = q.flatten(1, 2), k[:, 0], v[:, 0]
    dual = dual_cross_attention((queries, kt, vt), (queries, ki, vi), heads=3)
    head = (slice(None), slice(4, 8))
    expected = plain(queries[1][head], kt[1][head], vt[1][head])
    expected = expected + plain(queries[1][head], ki[1][head], vi[1][head])
    assert torch.allclose(dual[1][head], expected, atol=1e-5)
    alone = dual_cross_attention((queries, kt, vt), None, heads=3)
    assert torch.equal(alone, attention(queries, kt, vt, heads=3))
    assert torch.equal(alone, dual_cross_attention((queries, kt, vt), (queries, ki, vi * 0), 3))


def test_config_refuses_what_it_does_not_know() -> None:
    """Configs come back from JSON whole, and unknown or contradictory fields are named."""
    assert from_dict(type(NANO), to_dict(NANO)) == NANO
    with pytest.raises(ConfigError, match="DenoiserConfig has no field colour"):
        from_dict(type(NANO), {**to_dict(NANO), "denoiser": {"colour": 3}})
    with pytest.raises(ConfigError, match="one entry per level"):
        replace(NANO.denoiser, heads=(2,))
