"""The recipes of the presets' three stages: how much data, how many steps, how fast.

`tiny` is close to what the shipped bundle was trained with on two CPU cores (its manifest says how
it was really run, under provenance.as_run); `nano` is for tests. `base` has no recipe yet.
"""

from dataclasses import dataclass

from heartbeat_training.loop import Recipe


@dataclass(frozen=True)
class Plan:
    """Data and recipes of a whole training run on phantoms."""

    pairs: int  # anatomies for the codec, four frames each
    clips: int  # anatomies for the denoiser, a whole clip each
    codec: Recipe
    texture: Recipe  # the decoder alone, against the spectrum of speckle
    stage1: Recipe
    stage2: Recipe
    first_seed: int = 10_000  # evaluation uses seeds from 900,000, the segmenter from 500,000


PLANS = {
    "nano": Plan(
        pairs=6,
        clips=8,
        codec=Recipe(steps=30, batch=4, lr=2e-3, warmup=5, ema=0.9),
        texture=Recipe(steps=10, batch=4, lr=1e-3, warmup=5, ema=0.9),
        stage1=Recipe(steps=30, batch=8, lr=2e-3, warmup=5, ema=0.9),
        stage2=Recipe(steps=10, batch=2, lr=1e-3, warmup=5, ema=0.9),
    ),
    "tiny": Plan(
        pairs=1000,
        clips=1250,
        codec=Recipe(steps=3200, batch=8, lr=2e-3, warmup=100, ema=0.995),
        texture=Recipe(steps=800, batch=8, lr=5e-4, warmup=50, ema=0.99),
        stage1=Recipe(steps=1600, batch=32, lr=1e-3, warmup=150, ema=0.998),
        stage2=Recipe(steps=1000, batch=3, lr=5e-4, warmup=50, ema=0.99),
    ),
    # Real patients (real_data.py): `clips` counts the changed copies of each; the codec stage makes
    # speckle too. About an hour on two CPU cores, from the phantom-trained model or from nothing.
    "nano-real": Plan(
        pairs=0,
        clips=1,
        codec=Recipe(steps=10, batch=4, lr=2e-3, warmup=5, ema=0.9),
        texture=Recipe(steps=0, batch=4),
        stage1=Recipe(steps=10, batch=8, lr=2e-3, warmup=5, ema=0.9),
        stage2=Recipe(steps=5, batch=2, lr=1e-3, warmup=5, ema=0.9),
    ),
    "tiny-real": Plan(
        pairs=0,
        clips=6,
        codec=Recipe(steps=1500, batch=8, lr=1e-3, warmup=50, ema=0.995),
        texture=Recipe(steps=0, batch=8),
        stage1=Recipe(steps=1200, batch=32, lr=7e-4, warmup=100, ema=0.998),
        stage2=Recipe(steps=450, batch=3, lr=5e-4, warmup=50, ema=0.99),
    ),
}
