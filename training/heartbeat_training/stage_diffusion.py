"""Stage 1 (images) and stage 2 (clips): denoising latents under randomly dropped conditions.

Stage 1 trains the image model on single frames; sketch and image prior come from the clip's first
frame while mask and valve are the frame's own, as they will be in a clip. Stage 2 freezes it and
trains what sees time: temporal attention and the flow encoder; or, thawed, all of the denoiser.
The paper trains with every condition on; dropping some makes any subset, and guidance, work.
Legend: B clips, F frames, M = B·F images, C channels, h w latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from heartbeat_fast.conditions import LOCAL, NAMES
from heartbeat_fast.models.embeddings import EmbeddingCache, fingerprint
from heartbeat_fast.models.heartbeat import HeartBeat, stage_parameters, train_only
from heartbeat_fast.text import Tokenizer
from heartbeat_training.clips import ClipCache
from heartbeat_training.ddim import alphas_cumprod, mixed_noise, sample

# Chances that a condition is left out by itself, all together, and all local ones together: dropped
# one by one, sketch, mask and valve are all away in a thousandth of the rows, and what text, EF and
# image prior say on their own is never learned.
DROP, DROP_ALL, DROP_LOCAL = 0.1, 0.1, 0.3
FIRST = 0.6  # chance of a clip without local conditions to be drawn in the noisiest fifth
IS_LOCAL = np.isin(NAMES, LOCAL)


def encode_cache(
    model: HeartBeat, cache: ClipCache, folder: Path, device: torch.device | None = None
) -> NDArray[Any]:
    """Latents (M, F, C, h, w) float16 of every clip, made on `device` (CPU) and kept beside the
    clips, by the encoder that made them.
    """
    file = folder / f"latents-{_encoder_mark(model)}.npy"
    shape = (*cache.frames.shape[:2], model.config.codec.latent_channels)
    shape = (*shape, cache.frames.shape[2] // 8, cache.frames.shape[3] // 8)
    if not file.exists():
        out = np.lib.format.open_memmap(file.with_suffix(".part"), "w+", np.float16, shape)
        place = device or torch.device("cpu")
        model.codec.to(place)
        with torch.no_grad(), torch.autocast(place.type, torch.bfloat16):
            for i in range(len(cache)):
                frames = torch.from_numpy(cache.frames[i].astype(np.float32) / 255)[:, None]
                out[i] = model.codec.encode(frames.to(place)).float().cpu().numpy()
        model.codec.to("cpu")
        (file.with_suffix(".part")).rename(file)
    return np.load(file, mmap_mode="r")


def _encoder_mark(model: HeartBeat) -> str:
    """Digest of the codec's tensors but the decoder's."""
    parts = model.codec.state_dict().items()
    return fingerprint({k: v for k, v in parts if ".decoder." not in f".{k}"})[:16]


class DiffusionStage:
    """One stage of denoising training. `frames` per clip: 1 in stage 1, F in stage 2."""

    def __init__(
        self,
        model: HeartBeat,
        cache: ClipCache,
        latents: NDArray[Any],
        tokenizer: Tokenizer,
        *,
        stage: int,
        batch: int,
        train_cross_attention: bool = False,
        thaw: bool = False,
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        """thaw: stage 2 trains the image model on. embeddings: of the image prior, from disk; None
        where the model's own encoder runs."""
        self.name, self.embeddings = f"stage{stage}", embeddings
        self.model, self.cache, self.latents = model, cache, latents
        self.stage, self.batch = stage, batch
        self.images_per_row = 1 if stage == 1 else cache.frames.shape[1]
        self._learned = stage_parameters(model, stage, train_cross_attention, thaw)
        train_only(model, self._learned)
        model.train()
        self._alphas = alphas_cumprod(model)
        self._known = np.ones((len(cache), len(NAMES)), np.float32)
        self._known[:, NAMES.index("ef")] = [row["ef"] is not None for row in cache.rows]
        for name in ("mask", "skeleton"):
            self._known[:, NAMES.index(name)] = [row.get("labels", True) for row in cache.rows]
        self._tokens = np.concatenate([tokenizer.encode(row["text"]) for row in cache.rows])

    def parameters(self) -> dict[str, nn.Parameter]:
        """What this stage learns."""
        return self._learned

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Conditions, clean latents z0 (B, F, C, h, w), times t (B,) and noise like z0."""
        clips, frames = self.picks(step, rng)
        present = self.chance(rng)
        t = self.times(present)
        shape = (self.batch, self.images_per_row, *self.latents.shape[2:])
        noise = mixed_noise(shape, self.model.config.shared_noise)
        clips, frames = clips[rows], None if frames is None else frames[rows]
        z0 = np.stack(
            [
                self.latents[c] if frames is None else self.latents[c, frames[i]]
                for i, c in enumerate(clips)
            ]
        )
        batch = self.conditions(clips, frames, present[rows])
        rest = {"z0": torch.from_numpy(z0.astype(np.float32)), "t": t[rows], "noise": noise[rows]}
        return batch | rest

    def times(self, present: NDArray[np.float32]) -> Tensor:
        """Times t (B,), uniform; but clips without local conditions are often among the noisiest.

        There alone motion must be made up. Later the model reads it off the noisy latents, and a
        clip that began still, as all do that start from one noise, stays still.
        """
        steps = self.model.config.steps
        t = torch.randint(steps, (self.batch,))
        if self.stage == 1:
            return t
        first = torch.rand(self.batch) < FIRST
        alone = torch.from_numpy(~present[:, IS_LOCAL].any(1))
        return torch.where(first & alone, torch.randint(steps * 4 // 5, steps, (self.batch,)), t)

    def picks(
        self, step: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The batch's clips (B,), and in stage 1 one frame of each (B, 1)."""
        few = len(self.cache) < self.batch
        clips = np.sort(rng.choice(len(self.cache), self.batch, replace=few))
        if self.stage == 2:
            return clips, None
        return clips, rng.integers(self.cache.frames.shape[1], size=(self.batch, 1))

    def chance(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Which conditions are present (B, 7)."""
        return drop(self.batch, rng, self.stage == 1)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared error of the predicted noise or v."""
        z0, t, noise = batch["z0"], batch["t"], batch["noise"]
        a = self._alphas.to(t.device)[t][:, None, None, None, None]
        z = a.sqrt() * z0 + (1 - a).sqrt() * noise
        target = noise
        if self.model.config.prediction == "v_prediction":
            target = a.sqrt() * noise - (1 - a).sqrt() * z0
        error = (self.model.predict(z, t, batch).float() - target) ** 2
        per_clip = error.mean((1, 2, 3, 4))
        late = per_clip[t >= 500]
        scalars = {"loss": per_clip.mean()}
        return scalars | ({"loss_late": late.mean()} if len(late) else {})

    def _image(self, clips: NDArray[Any]) -> Tensor:
        """First frames (B, 3, H, W) in [0, 1], or their embeddings: zeros where none is seen."""
        frames = [self.cache.frames[clip, 0] for clip in clips]
        if self.embeddings is None:
            first = torch.from_numpy(np.stack(frames).astype(np.float32) / 255)
            return first[:, None].expand(-1, 3, -1, -1)
        if not self._known[:, NAMES.index("image")].any():
            return torch.zeros(len(clips), *self.embeddings.shape)
        return torch.stack([self.embeddings(frame) for frame in frames]).float()

    def conditions(
        self, clips: NDArray[Any], frames: NDArray[Any] | None, present: NDArray[np.float32]
    ) -> dict[str, Tensor]:
        """Model inputs of some clips; frames (B, K): which ones, None for all."""
        cache = self.cache
        every = np.arange(cache.frames.shape[1])
        picked = [every if frames is None else frames[i] for i in range(len(clips))]

        def grey(images: list[NDArray[Any]]) -> Tensor:
            return torch.from_numpy(np.stack(images).astype(np.float32) / 255)

        labels = torch.from_numpy(
            np.stack([cache.labels[c, f] for c, f in zip(clips, picked, strict=True)])
        )
        flow = [cache.flow_of(c, f) for c, f in zip(clips, picked, strict=True)]
        if self.stage == 1:  # the flow encoder learns in stage 2
            flow = [np.zeros_like(f) for f in flow]
        ef = [[(cache.rows[c]["ef"] or 0.0) / 100] for c in clips]
        present = present * self._known[clips]
        return {
            "tokens": torch.from_numpy(self._tokens[clips]),
            "ef": torch.tensor(ef, dtype=torch.float32),
            "image": self._image(clips),
            "sketch": grey([cache.sketch[c] for c in clips])[:, None],
            "mask": functional.one_hot(labels.long(), 4).permute(0, 1, 4, 2, 3).float(),
            "skeleton": grey([cache.skeleton[c, f] for c, f in zip(clips, picked, strict=True)])[
                :, :, None
            ],
            "flow": torch.from_numpy(np.stack(flow)),
            "present": torch.from_numpy(present),
        }

    @torch.no_grad()
    def picture(self, step: int) -> NDArray[np.uint8] | None:
        """Rows: source, mask, sample with all conditions, with the mask only, with text only.

        The samples are decoded without texture noise's motion: single frames, 10 DDIM steps.
        """
        self.model.eval()
        clips = np.linspace(0, len(self.cache) - 1, 6).astype(int)
        frames = np.full((6, 1), self.cache.frames.shape[1] // 2)
        sets = (set(NAMES) - {"flow"}, {"mask"}, {"text"})
        rows = [np.stack([self.cache.frames[c, f[0]] for c, f in zip(clips, frames, strict=True)])]
        rows.append(
            np.stack([self.cache.labels[c, f[0]] * 80 for c, f in zip(clips, frames, strict=True)])
        )
        for names in sets:
            present = np.tile(np.array([[n in names for n in NAMES]], np.float32), (6, 1))
            place = self.model.ef_token.absent.device
            given = {k: v.to(place) for k, v in self.conditions(clips, frames, present).items()}
            shape = (6, 1, *self.latents.shape[2:])
            start = torch.Generator().manual_seed(0)
            z = sample(self.model, given, mixed_noise(shape, 0.0, start))
            noise = torch.randn(6, 2, *self.cache.frames.shape[2:])
            image = self.model.codec.decode(z[:, 0], noise.to(place))[:, 0]
            rows.append((image * 255).round().byte().cpu().numpy())
        self.model.train()
        return np.concatenate([np.concatenate(list(row), 1) for row in rows])


def drop(
    batch: int,
    rng: np.random.Generator,
    images: bool,
    each: float = DROP,
    together: float = DROP_ALL,
    local: float = DROP_LOCAL,
) -> NDArray[np.float32]:
    """Which conditions are present (B, 7): each dropped by itself, sometimes all local ones,
    sometimes all; no flow in images.
    """
    present = rng.random((batch, len(NAMES))) >= each
    present &= rng.random((batch, 1)) >= together
    present[:, IS_LOCAL] &= rng.random((batch, 1)) >= local
    if images:
        present[:, NAMES.index("flow")] = False
    return present.astype(np.float32)
