"""The recipes of the presets' stages: how much data, how many steps, how fast.

`tiny` is close to what the shipped bundle was trained with on two CPU cores (its manifest says how
it was really run, under provenance.as_run; without `thaw`, or rows without local conditions);
`nano` is for tests. `base` counts in epochs, as its paper does: PAPER holds what is published, and
`recipe` makes steps of it once the data are known.
"""

import math
from dataclasses import dataclass, replace

from heartbeat_training.loop import Recipe

ALL = "text ef image sketch mask skeleton flow"  # every condition, in the order of NAMES


@dataclass(frozen=True)
class Plan:
    """Data and recipes of a whole training run on phantoms."""

    pairs: int  # anatomies for the codec, four frames each
    clips: int  # anatomies for the denoiser, a whole clip each
    codec: Recipe
    texture: Recipe  # the decoder alone, against the spectrum of speckle
    stage1: Recipe
    stage2: Recipe
    student: Recipe  # 1, 2 and 4 steps, after the last stage
    decoder: Recipe  # a smaller one, distilled
    ends: int  # clips whose latents the many-step model makes for both
    thaw: bool = False  # stage 2 trains the image model on
    first_seed: int = 10_000  # evaluation uses seeds from 900,000, the segmenter from 500,000

    def scaled(self, share: float) -> "Plan":
        """The plan with every stage's steps times `share`: a shorter or longer schedule."""
        stages = ("codec", "texture", "stage1", "stage2", "student", "decoder")
        found = {name: getattr(self, name) for name in stages}
        steps = {name: replace(r, steps=round(share * r.steps)) for name, r in found.items()}
        return replace(self, **steps)


PLANS = {
    "nano": Plan(
        pairs=6,
        clips=8,
        codec=Recipe(steps=30, batch=4, lr=2e-3, warmup=5, ema=0.9),
        texture=Recipe(steps=10, batch=4, lr=1e-3, warmup=5, ema=0.9),
        stage1=Recipe(steps=30, batch=8, lr=2e-3, warmup=5, ema=0.9),
        stage2=Recipe(steps=10, batch=2, lr=1e-3, warmup=5, ema=0.9),
        student=Recipe(steps=10, batch=2, lr=1e-3, warmup=2, ema=0.9),
        decoder=Recipe(steps=10, batch=4, lr=1e-3, warmup=2, ema=0.9),
        ends=4,
    ),
    "tiny": Plan(
        pairs=1000,
        clips=1250,
        codec=Recipe(steps=3200, batch=8, lr=2e-3, warmup=100, ema=0.995),
        texture=Recipe(steps=800, batch=8, lr=5e-4, warmup=50, ema=0.99),
        stage1=Recipe(steps=1600, batch=32, lr=1e-3, warmup=150, ema=0.998),
        stage2=Recipe(steps=1000, batch=3, lr=5e-4, warmup=50, ema=0.99),
        student=Recipe(steps=2000, batch=3, lr=3e-4, warmup=50, ema=0.99),
        decoder=Recipe(steps=3200, batch=8, lr=2e-3, warmup=50, ema=0.99),
        ends=900,
        thaw=True,
    ),
    # Real patients (real_data.py): `clips` counts the changed copies of each. About an hour on two
    # CPU cores, from the phantom-trained model or from nothing.
    "nano-real": Plan(
        pairs=0,
        clips=1,
        codec=Recipe(steps=10, batch=4, lr=2e-3, warmup=5, ema=0.9),
        texture=Recipe(steps=5, batch=4, lr=1e-3, warmup=2, ema=0.9),
        stage1=Recipe(steps=10, batch=8, lr=2e-3, warmup=5, ema=0.9),
        stage2=Recipe(steps=5, batch=2, lr=1e-3, warmup=5, ema=0.9),
        student=Recipe(steps=10, batch=2, lr=1e-3, warmup=2, ema=0.9),
        decoder=Recipe(steps=10, batch=4, lr=1e-3, warmup=2, ema=0.9),
        ends=4,
    ),
    "tiny-real": Plan(
        pairs=0,
        clips=6,
        codec=Recipe(steps=1500, batch=8, lr=1e-3, warmup=50, ema=0.995),
        texture=Recipe(steps=1000, batch=8, lr=1e-3, warmup=50, ema=0.99),
        stage1=Recipe(steps=1200, batch=32, lr=7e-4, warmup=100, ema=0.998),
        stage2=Recipe(steps=450, batch=3, lr=5e-4, warmup=50, ema=0.99),
        student=Recipe(steps=1000, batch=3, lr=3e-4, warmup=50, ema=0.99),
        decoder=Recipe(steps=1600, batch=8, lr=2e-3, warmup=50, ema=0.99),
        ends=600,
    ),
}


@dataclass(frozen=True)
class Published:
    """A stage of HeartBeat (MICCAI 2024): Adam, 1e-4, 500 warm-up steps, cosine, 200 epochs.

    Not published, hence ours: the gradient clip, which conditions are dropped how often (the paper
    drops none: 0), noisier times for clips without local ones, and everything about CMR but "mask
    only, 50 volumes, from the echo model".
    """

    batch: int
    epochs: int = 200
    lr: float = 1e-4
    warmup: int = 500
    conditions: str = ALL  # what may be present in training
    drop: float = 0.1  # each condition's chance to be left out
    drop_all: float = 0.1  # that of all together
    drop_local: float = 0.3  # that of sketch, mask, valve and flow together
    train_cross_attention: bool = False  # stage 2: the paper's text says no, its figure yes
    most: int = 0  # examples at most, 0: all


PAPER = {
    "stage1": Published(batch=64, conditions=ALL.replace(" flow", "")),
    "stage2": Published(batch=16),
    "cmr": Published(batch=16, conditions="mask", drop_all=0.0, drop_local=0.0, most=50),
}


@dataclass(frozen=True)
class PaperRecipe(Recipe):
    """A published stage over a data set of known size; both go into every checkpoint."""

    examples: int = 0  # images in stage 1, clips in stage 2, volumes for CMR
    published: Published = PAPER["stage2"]

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every example comes at least once."""
        return math.ceil(self.examples / self.batch)


def paper_recipe(published: Published, examples: int, seed: int = 0) -> PaperRecipe:
    """The recipe of a published stage over so many examples. The last epoch is kept: no EMA."""
    if published.most:
        examples = min(examples, published.most)
    return PaperRecipe(
        steps=published.epochs * math.ceil(examples / published.batch),
        batch=published.batch,
        lr=published.lr,
        warmup=published.warmup,
        ema=0.0,
        seed=seed,
        examples=examples,
        published=published,
    )
