"""Published autoencoders and small decoders: every spelling lands, and draws what it drew."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from heartbeat_export import weight_map
from heartbeat_export.to_onnx import to_onnx
from heartbeat_fast.models.autoencoders import (
    decoder_state,
    load_small_decoder,
    open_autoencoder,
    save_small_decoder,
    width_of,
)
from heartbeat_fast.models.checkpoints import CheckpointError
from heartbeat_fast.models.codec import KLCodec, SmallDecoder, SmallKLCodec, build_codec
from heartbeat_fast.models.config import CodecConfig, ConfigError, from_dict, to_dict
from heartbeat_fast.models.graphs import build_graphs, example_inputs, round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_training.stage_decoder import smaller
from tests.test_base import SHARED, narrow

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: train)")
TAEF2 = SHARED / "data" / "weights" / "taef2"
CAMUS = SHARED / "data" / "camus_a4c"
WIDTHS = (8, 8, 8, 8)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """TAESD's network with random weights, narrow."""
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS
    ).eval()


def own_names(decoder: torch.nn.Module) -> dict[str, Tensor]:
    """A decoder's tensors as TAESD's own file names them: its clamp is layer 0."""
    names = ((k.split(".", 2), t) for k, t in decoder.state_dict().items())
    return {f"{int(number) + 1}.{rest}": t for (_, number, rest), t in names}


@pytest.mark.parametrize("spelling", ["diffusers", "its own", "ours"])
def test_a_published_decoder_draws_its_mean_colour(
    tiny: Any, spelling: str, tmp_path: Path
) -> None:
    path = tmp_path / "taesd"
    if spelling == "diffusers":
        tiny.save_pretrained(path)
    elif spelling == "its own":
        path = tmp_path / "taesd_decoder.safetensors"
        save_file(own_names(tiny.decoder), path)
    else:
        save_small_decoder(tiny.decoder, path, {"latent_channels": 4})
    codec = SmallDecoder(4, WIDTHS)
    assert width_of(path) == 8
    load_small_decoder(codec.decoder, path)
    z = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        rgb = tiny.decode(z).sample / 2 + 0.5
        grey = codec.paint(z, torch.zeros(2, 0))
    assert grey.std() > 1e-3
    torch.testing.assert_close(grey, rgb.mean(1, keepdim=True))


def test_what_does_not_fit_is_listed(tiny: Any, tmp_path: Path) -> None:
    state = own_names(tiny.decoder)
    state["3.pool.0.weight"] = torch.zeros(32, 8, 1, 1)
    state.pop("19.bias")
    file = tmp_path / "decoder.safetensors"
    save_file(state, file)
    with pytest.raises(CheckpointError) as raised:
        load_small_decoder(SmallDecoder(4, WIDTHS).decoder, file)
    assert "missing layers.18.bias" in str(raised.value)
    assert "not ours layers.2.pool.0.weight" in str(raised.value)
    with pytest.raises(CheckpointError, match="0 encoder files"):
        open_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="wanted a JSON object"):
        open_autoencoder(tmp_path)


def test_autoencoders_open_as_codecs(tiny: Any, tmp_path: Path) -> None:
    """diffusers' own encode and decode are the reference."""
    tiny.save_pretrained(tmp_path / "tiny")
    vae = KLCodec(CodecConfig(widths=(32, 32, 32, 32))).vae.eval()
    vae.save_pretrained(tmp_path / "sd" / "vae")
    frames, nothing = torch.rand(1, 1, 64, 64), torch.zeros(1, 0)
    rgb = frames.expand(-1, 3, -1, -1) * 2 - 1
    for folder, theirs in (("tiny", tiny), ("sd", vae)):
        codec = open_autoencoder(tmp_path / folder)
        with torch.no_grad():
            z = codec.encode(frames)
            if folder == "sd":
                wanted = 0.18215 * vae.encode(rgb).latent_dist.mode()
                drawn = vae.decode(wanted / 0.18215).sample
            else:
                wanted = theirs.encode(rgb).latents
                drawn = theirs.decode(wanted).sample
            torch.testing.assert_close(z, wanted)
            grey = (drawn.mean(1, keepdim=True) / 2 + 0.5).clamp(0, 1)
            torch.testing.assert_close(codec.decode(z, nothing), grey)
        assert not any(p.requires_grad for p in codec.parameters())


def test_a_small_kl_codec_keeps_the_encoder() -> None:
    config = CodecConfig(widths=(32, 32, 32, 32), decoder_widths=WIDTHS)
    small, large = build_codec(config), build_codec(replace(config, decoder_widths=()))
    assert isinstance(small, SmallKLCodec)
    theirs = {
        k: v for k, v in large.get_submodule("vae").state_dict().items() if "decoder" not in k
    }
    small.load_state_dict({k: v for k, v in theirs.items() if "post" not in k}, strict=False)
    frames = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(small.encode(frames), large.encode(frames))
        drawn = small.decode(small.encode(frames), torch.zeros(2, 0))
    assert drawn.shape == (2, 1, 64, 64)


@pytest.mark.parametrize(
    ("kind", "widths"), [("kl", (8, 8, 8)), ("kl", (8, 8, 8, 4)), ("echo", (8, 8, 8, 8))]
)
def test_impossible_widths_are_refused(kind: str, widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="decoder_widths"):
        from_dict(CodecConfig, {"kind": kind, "decoder_widths": list(widths)})


def test_a_model_with_it_is_saved_opened_and_exported(tmp_path: Path) -> None:
    """Folder and graph: the same numbers in torch again, every weight with its source."""
    large = narrow()
    model = smaller(large, WIDTHS).eval()
    assert not any(p.is_meta for p in model.parameters())
    assert model.denoiser is large.denoiser
    model.save_pretrained(tmp_path / "model")
    again = HeartBeat.from_pretrained(tmp_path / "model")
    assert to_dict(again.config) == to_dict(model.config)
    assert all(t.equal(model.state_dict()[k]) for k, t in again.state_dict().items())
    round_to_half(again)
    inputs = example_inputs(again)["decode"]
    graph = build_graphs(again)["decode"]
    proto = to_onnx(graph, inputs)
    session = pytest.importorskip("onnxruntime").InferenceSession(proto.SerializeToString())
    drawn = session.run(None, {k: t.numpy() for k, t in inputs.items()})[0]
    with torch.no_grad():
        wanted = graph.module(*inputs.values()).numpy()
    np.testing.assert_allclose(drawn, wanted, atol=2e-5)
    entries = weight_map.of_graph("decode", proto, again.state_dict()).entries
    decoder = {k for k in again.state_dict() if k.startswith("codec.decoder.")}
    assert {entry["tensor"] for entry in entries.values()} == decoder


@pytest.mark.skipif(not TAEF2.is_dir(), reason="../shared/data/weights/taef2 is not there")
def test_taef2_is_read_as_published() -> None:
    """Both files land whole; the decoder's map alone leaves only the normalised branches over."""
    codec: Any = open_autoencoder(TAEF2)
    assert sum(p.numel() for p in codec.encoder.parameters()) == 1_338_528
    assert sum(p.numel() for p in codec.decoder.parameters()) == 1_338_499
    from heartbeat_fast.models.weight_files import read_any

    names = set(decoder_state(read_any(TAEF2 / "taef2_decoder.pth")))
    wanted = set(SmallDecoder(32, (64,) * 4).decoder.state_dict())
    assert wanted == {name for name in names if ".pool." not in name}
    assert width_of(TAEF2 / "taef2_decoder.pth") == 64


@pytest.mark.skipif(not CAMUS.is_dir(), reason="../shared/data/camus_a4c is not there")
@pytest.mark.skipif(not TAEF2.is_dir(), reason="../shared/data/weights/taef2 is not there")
def test_taef2_draws_ultrasound() -> None:
    """The published figure of one frame, 32.7 dB: a wrong map or a lost branch costs far more."""
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed (extra: formats)")
    from heartbeat_fast.record import Record

    file = CAMUS / "database_nifti/patient0001/patient0001_4CH_ED.nii.gz"
    image = np.asarray(nibabel.load(file).dataobj).T.astype(np.uint8)
    frames = Record(frames=image[None]).standardised(1, 256).frames
    x = torch.from_numpy(frames.astype(np.float32) / 255)[:, None]
    codec = open_autoencoder(TAEF2)
    with torch.no_grad():
        error = ((codec.decode(codec.encode(x), torch.zeros(1, 0)) - x) ** 2).mean()
    assert -10 * error.log10() > 31
