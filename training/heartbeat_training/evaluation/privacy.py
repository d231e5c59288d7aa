"""Does a generated clip show a patient of the training set? Nearest neighbours in a learned space.

A small contrastive encoder learns to tell patients apart, whatever the frame, gain or blur. A clip
is too like a training clip when it is more so than training and held-out patients, who are
different people, are like each other (the published rule). An encoder of patients puts what is no
patient anywhere, so a second look must agree on the same training clip: coarse brightness. What the
rule does on clips whose answer is known stands beside: held-out clips (should pass), training clips
through other gains, blurs and hands (should be caught).
Legend: B clips, F frames, S = 64 pixels, E = 64 embedding, T training clips.
Source: EchoNet-Synthetic, Reynaud et al., 2406.00808, there on latents and with one look.
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


def coarse(clips: list[Frames], side: int = 16) -> Float:
    """Where clips, each (F, S, S), are bright: mean over time on 16×16, over its own mean (B, 256).

    At this size gain and speckle are gone, and a shift of a few pixels hardly counts.
    """
    means = np.stack([clip.mean(0, dtype=np.float32) for clip in clips])
    small = [cv2.resize(m, (side, side), interpolation=cv2.INTER_AREA).ravel() for m in means]
    found = np.array(small, np.float64)
    return found / np.maximum(found.mean(1, keepdims=True), 1)


@dataclass(frozen=True, eq=False)
class Audit:
    """Generated clips against training clips, by both looks.

    tau: thresholds of (embedding, coarse brightness). r: of each generated clip at `nearest`, the
    training clip that both look at as most alike, (B, 2). over: whether both are above, (B,).
    Shares of one, by both looks and by the embedding alone: of generated clips, of held-out clips
    (false alarms: other people), of altered training clips (what the rule can see).
    """

    tau: tuple[float, float]
    r: Float
    nearest: NDArray[np.int_]
    over: NDArray[np.bool_]
    shares: dict[str, float]
    shares_alone: dict[str, float]


def audit(
    encoder: Encoder,
    training: list[Frames],
    held_out: list[Frames],
    generated: list[Frames],
    seed: int = 0,
) -> Audit:
    """Compare generated clips, each (F, S, S), with training clips.

    A threshold is the 95th percentile, over training clips, of the largest r to a held-out clip.
    """
    rng = np.random.default_rng(seed)
    copies = [
        (np.stack([changed(f, rng) for f in clip]) * 255).astype(np.uint8) for clip in training
    ]
    sets = {"generated": generated, "held_out": held_out, "copies": copies}
    usual = coarse(training).mean(0)  # what all patients share is no likeness
    looks = [lambda clips: embed(encoder, clips), lambda clips: coarse(clips) - usual]
    found: dict[str, list[Float]] = {name: [] for name in sets}
    tau = []
    for look in looks:
        known = look(training)
        for name, clips in sets.items():
            found[name].append(likeness(look(clips), known))  # (B, T)
        tau.append(float(np.quantile(found["held_out"][-1].max(0), QUANTILE)))
    margins = {name: np.minimum(one - tau[0], two - tau[1]) for name, (one, two) in found.items()}
    nearest = margins["generated"].argmax(1)
    rows = np.arange(len(generated))
    return Audit(
        tau=(tau[0], tau[1]),
        r=np.stack([r[rows, nearest] for r in found["generated"]], 1),
        nearest=nearest,
        over=margins["generated"].max(1) > 0,
        shares={name: float((m.max(1) > 0).mean()) for name, m in margins.items()},
        shares_alone={
            name: float((one.max(1) > tau[0]).mean()) for name, (one, _) in found.items()
        },
    )
