"""The paper's own stages, for `base`: what is loaded, what is frozen, what an epoch is.

Three stages: "stage1" on images, "stage2" on clips, "cmr" on short-axis volumes from the echo model
with the mask alone. The loss is DiffusionStage's; here are the frozen sets, epochs that show every
example once, and MedSAM's embeddings read from disk, which cost seconds an image to compute.
Legend: B clips, F frames, C channels, h w latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.checkpoints import CheckpointError, load_sd15
from heartbeat_fast.models.config import BASE, HeartBeatConfig
from heartbeat_fast.models.embeddings import EmbeddingCache, fingerprint
from heartbeat_fast.models.heartbeat import HeartBeat, stage_parameters, train_only
from heartbeat_fast.models.medsam import load_medsam
from heartbeat_fast.text import Tokenizer
from heartbeat_training.clips import ClipCache
from heartbeat_training.recipes import PAPER, PaperRecipe
from heartbeat_training.stage_diffusion import DiffusionStage, drop

STAGES = tuple(PAPER)


def open_base(
    sd15: str | Path, medsam: str | Path, config: HeartBeatConfig = BASE
) -> tuple[HeartBeat, Tokenizer]:
    """The model that stage 1 starts from, and CLIP's tokenizer.

    Args:
        sd15: Stable Diffusion 1.5, a diffusers folder or a single file. Beside a single file, a
            `tokenizer/` folder is wanted.
        medsam: MedSAM ViT-B, a transformers folder or a file.

    Raises:
        CheckpointError: a file is missing, unreadable or does not fit.
        FileError: no tokenizer.
    """
    sd15 = Path(sd15)
    if not sd15.exists():
        raise CheckpointError(f"{sd15}: no such file or folder; wanted Stable Diffusion 1.5")
    tokenizer = Tokenizer.from_clip_folder((sd15 if sd15.is_dir() else sd15.parent) / "tokenizer")
    model = HeartBeat(config)
    load_sd15(model, sd15)
    load_medsam(model.image_encoder, medsam)
    return model, tokenizer


def learned(
    model: HeartBeat, stage: str, train_cross_attention: bool = False
) -> dict[str, nn.Parameter]:
    """What a stage trains, by name; everything else is frozen.

    stage1: the UNet without its temporal layers, the adapter, the encoders of sketch, mask and
    valve, and the EF token, which the paper has not. stage2: the temporal layers, the flow encoder
    and, by the switch, cross-attention. cmr: the whole UNet and the mask encoder; which the paper
    tunes there is not known, and the appearance of MR asks for the spatial weights. student, ours:
    the whole UNet.
    """
    if stage == "student":
        return {k: p for k, p in model.named_parameters() if k.startswith("denoiser.")}
    if stage != "cmr":
        return stage_parameters(model, int(stage[-1]), train_cross_attention)
    return {k: p for k, p in model.named_parameters() if k.startswith(("denoiser.", "mask."))}


def embeddings_of(model: HeartBeat, folder: Path) -> EmbeddingCache:
    """The model's image encoder, with its embeddings kept under `folder`. Runs where it lies."""
    side = model.config.image.size // model.config.image.patch
    return EmbeddingCache(
        folder,
        lambda images: model.image_embedding(images.to(model.adapter.linear.weight.device)),
        fingerprint(model.image_encoder),
        (model.config.image.channels, side, side),
    )


class PaperStage(DiffusionStage):
    """A stage of PAPER. Examples: frames in stage 1, clips (volumes) otherwise.

    Args:
        latents: of the cache's clips (M,F,C,h,w), from `encode_cache`.
        recipe: from `paper_recipe`, for the examples of this cache.
        embeddings: of the image prior; None: the image encoder runs in every step.
    """

    def __init__(
        self,
        model: HeartBeat,
        cache: ClipCache,
        latents: NDArray[Any],
        tokenizer: Tokenizer,
        *,
        stage: str,
        recipe: PaperRecipe,
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        super().__init__(
            model,
            cache,
            latents,
            tokenizer,
            stage=1 if stage == "stage1" else 2,
            batch=recipe.batch,
            embeddings=embeddings,
        )
        there = len(cache) * (cache.frames.shape[1] if self.stage == 1 else 1)
        if not 0 < recipe.examples <= there:
            raise HeartBeatError(f"recipe of {recipe.examples} examples; the data hold {there}")
        self.name, self.recipe = stage, recipe
        self._learned = learned(model, stage, recipe.published.train_cross_attention)
        train_only(model, self._learned)
        model.train()
        wanted = recipe.published.conditions.split()
        self._known *= np.array([name in wanted for name in NAMES], np.float32)
        if embeddings is not None and "image" in wanted:
            # Now, while the model is whole: batches are drawn beside training, when its encoder may
            # be busy or spread over processes.
            embeddings.fill(cache.frames[clip, 0] for clip in range(len(cache)))

    def chance(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Which conditions are present (B,7), at the recipe's rates."""
        p = self.recipe.published
        return drop(self.batch, rng, False, p.drop, p.drop_all, p.drop_local)

    def picks(
        self, step: int, rng: np.random.Generator | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The examples of a step: clips (B,), and in stage 1 their frames (B,1).

        An epoch is one order of all examples; its last batch is filled up from its start.
        """
        recipe, per_epoch = self.recipe, self.recipe.steps_per_epoch
        epoch, place = divmod(step, per_epoch)
        order = np.random.Generator(np.random.PCG64([recipe.seed, 0xE90C, epoch]))
        chosen = np.resize(order.permutation(recipe.examples), per_epoch * recipe.batch)
        chosen = chosen[place * recipe.batch : (place + 1) * recipe.batch]
        if self.stage == 2:
            return chosen, None
        total = self.cache.frames.shape[1]
        return chosen // total, chosen[:, None] % total
