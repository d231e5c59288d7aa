"""Does a generated clip show a patient of the training set? Nearest neighbours in a learned space.

A small contrastive encoder learns to tell patients apart, whatever the frame, gain or blur. A
generated clip is flagged when it is more like some training clip than training and held-out
patients, who are different people, are like each other. What the rule does on clips whose answer is
known stands beside: held-out clips (should pass), training clips seen through other gains, blurs
and hands (should be caught). Legend: B clips, F frames, S = 64 pixels, E = 64 embedding.
Source: the protocol of EchoNet-Synthetic, Reynaud et al., 2406.00808, on frames, not latents.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heartbeat_fast.files import atomic
from heartbeat_training.evaluation.distances import EvaluationError
from heartbeat_training.loop import Recipe, train

SIDE, DIM, TEMPERATURE = 64, 64, 0.1
STEPS, PATIENTS = 400, 32  # steps; patients in a batch, two views of each
QUANTILE = 0.95
ENCODERS = Path("runs/evaluation/encoders")
WEIGHTS = "encoder.safetensors"
Frames = NDArray[np.uint8]
Float = NDArray[np.float64]


class Encoder(nn.Module):
    """Four strided convolutions and a linear layer, 0.1 M parameters."""

    def __init__(self, widths: tuple[int, ...] = (1, 16, 32, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, out in pairwise(widths):
            layers += [nn.Conv2d(inside, out, 3, 2, 1), nn.GroupNorm(8, out), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1] * 16, DIM)

    def forward(self, grey: Tensor) -> Tensor:
        """Grey (N, 1, S, S) in [0, 1] → embeddings (N, E) of unit length."""
        return F.normalize(self.out(self.features(2 * grey - 0.5).flatten(1)).float(), dim=1)


class ContrastiveStage:
    """NT-Xent (Chen et al., 2002.05709): two frames of a patient together, all others apart."""

    name = "re-identification"

    def __init__(self, encoder: Encoder, clips: list[Frames], batch: int) -> None:
        self.encoder, self.clips, self.batch = encoder, clips, batch

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the encoder."""
        return dict(self.encoder.named_parameters())

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Two changed frames of each of `batch` patients, (B, 2, S, S)."""
        picked = rng.choice(len(self.clips), self.batch, replace=False)
        pairs = []
        for i in picked:
            clip = self.clips[i]
            pairs.append([changed(clip[rng.integers(len(clip))], rng) for _ in range(2)])
        return {"pairs": torch.from_numpy(np.array(pairs, np.float32))[rows]}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of finding the other view among all 2B − 1."""
        views = batch["pairs"].transpose(0, 1).flatten(0, 1)[:, None]
        found = self.encoder(views)
        likeness = found @ found.T / TEMPERATURE
        likeness.fill_diagonal_(-1e4)
        count = len(views) // 2
        wanted = (torch.arange(2 * count) + count) % (2 * count)
        return {"loss": F.cross_entropy(likeness, wanted)}

    def picture(self, step: int) -> None:
        """None: the audit's own figures say how well it tells patients apart."""


def changed(frame: Frames, rng: np.random.Generator) -> NDArray[np.float32]:
    """One frame (S, S) through another hand, gain or generator: moved, toned, blurred, grained."""
    angle, scale = rng.uniform(-6, 6), rng.uniform(0.94, 1.06)
    turn = np.asarray(cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), angle, scale), np.float64)
    turn[:, 2] += rng.uniform(-3, 3, 2)
    grey = cv2.warpAffine(frame, turn, (SIDE, SIDE)).astype(np.float32) / 255
    grey = grey ** rng.uniform(0.7, 1.4) * rng.uniform(0.75, 1.25)
    if rng.random() < 0.6:
        grey = np.asarray(cv2.GaussianBlur(grey, (0, 0), rng.uniform(0.3, 1.2)))
    grain = 1 + rng.uniform(0, 0.3) * rng.standard_normal((SIDE, SIDE))
    return np.clip(grey * grain, 0, 1).astype(np.float32)


def shrink(clip: Frames) -> Frames:
    """A grey clip (F, H, W), square, by area to (F, S, S)."""
    return np.stack([cv2.resize(f, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for f in clip])


def train_encoder(clips: list[Frames], steps: int = STEPS, folder: Path = ENCODERS) -> Encoder:
    """Learn to tell the patients of `clips` (each (F, S, S)) apart, a clip a patient.

    A minute or two on a CPU; kept under `folder` by the clips' content.

    Raises: EvaluationError for fewer than eight patients.
    """
    if len(clips) < 8:
        raise EvaluationError(f"audit: {len(clips)} training patients came; wanted 8 or more")
    digest = hashlib.sha256(str(steps).encode())
    for clip in clips:
        digest.update(clip.tobytes())
    run = folder / digest.hexdigest()[:12]
    torch.manual_seed(0)
    encoder = Encoder()
    if (run / WEIGHTS).exists():
        encoder.load_state_dict(load_file(run / WEIGHTS))
        return encoder.eval()
    recipe = Recipe(steps, min(PATIENTS, len(clips)), lr=2e-3, warmup=steps // 8, ema=0.98)
    train(ContrastiveStage(encoder, clips, recipe.batch), recipe, run)
    with atomic(run / WEIGHTS) as temporary:
        save_file(encoder.state_dict(), temporary)
    return encoder.eval()


def embed(encoder: Encoder, clips: list[Frames]) -> Float:
    """Clips, each (F, S, S), as (B, E): mean over frames."""
    out = []
    for clip in clips:
        with torch.inference_mode():
            grey = torch.from_numpy(clip.astype(np.float32) / 255)[:, None]
            out.append(encoder(grey).mean(0).numpy())
    return np.array(out, np.float64)


def likeness(a: Float, b: Float) -> Float:
    """Pearson's r of every embedding of a (A, E) with every one of b (B, E), (A, B)."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return np.asarray(a @ b.T / np.maximum(lengths, 1e-12))


@dataclass(frozen=True, eq=False)
class Audit:
    """tau; for each generated clip its largest r to training, at which clip, and what rules say.

    flagged: share of generated clips with r > tau. held_out: the same of held-out clips, false
    alarms, since these are other people. copies: the same of altered training clips, the rule's
    sight. Shares are of one.
    """

    tau: float
    r: Float
    nearest: NDArray[np.int_]
    flagged: float
    held_out: float
    copies: float


def audit(
    encoder: Encoder,
    training: list[Frames],
    held_out: list[Frames],
    generated: list[Frames],
    seed: int = 0,
) -> Audit:
    """Compare generated clips, each (F, S, S), with training clips.

    tau is the 95th percentile over training clips of the largest r to any held-out clip.
    """
    rng = np.random.default_rng(seed)
    copies = [
        (np.stack([changed(f, rng) for f in clip]) * 255).astype(np.uint8) for clip in training
    ]
    known = embed(encoder, training)
    aside = likeness(known, embed(encoder, held_out))
    tau = float(np.quantile(aside.max(1), QUANTILE))
    found = likeness(embed(encoder, generated), known)
    caught = likeness(embed(encoder, copies), known).max(1)
    return Audit(
        tau=tau,
        r=found.max(1),
        nearest=found.argmax(1),
        flagged=float((found.max(1) > tau).mean()),
        held_out=float((aside.max(0) > tau).mean()),
        copies=float((caught > tau).mean()),
    )
