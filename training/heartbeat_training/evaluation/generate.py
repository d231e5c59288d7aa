"""A bundle or a model folder as a generator, and one clip from it by any sampler at any length."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import FileError
from heartbeat_fast.generator import TEMPERATURE, Generator, Stopwatch
from heartbeat_fast.sampler import SamplerError, SamplerTable

EXPORTS = Path("runs/evaluation/bundles")


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn; `seeds` clips for each case, from first_seed on."""

    sampler: str = "dpmpp_2m"
    steps: int = 10
    guidance: float = 1.0
    temperature: float = TEMPERATURE
    seeds: int = 1
    first_seed: int = 1

    def seeds_of(self, case: int) -> range:
        """The seeds of a case by its number: with shared ones, clips from text would be one."""
        first = self.first_seed + case * self.seeds
        return range(first, first + self.seeds)


def open_generator(
    source: Path | None, engine: str = "auto", device: str = "cpu", exports: Path = EXPORTS
) -> Generator:
    """A bundle's generator (None: the embedded one's), or a model folder's, exported first.

    An export is kept under `exports` by the weights' fingerprint, since it takes a minute.

    Raises: FileError for a folder that is neither; BundleError, ExportError as reading them does.
    """
    if source is None or (source / "manifest.json").is_file():
        return Generator.open(source, engine, device)
    if not (source / "model_index.json").is_file():
        raise FileError(f"{source}: no manifest.json (bundle) and no model_index.json (model)")
    from heartbeat_export.build import build_bundle, load_folder, weights_of
    from heartbeat_fast.models.graphs import round_to_half

    model, tokenizer, provenance, card = load_folder(source)
    folder = exports / weights_of(round_to_half(model))[-16:]
    if not (folder / "manifest.json").is_file():
        build_bundle(model, tokenizer, folder, provenance=provenance, card=card)
    return Generator.open(folder, engine, device)


def table_of(bundle: Bundle, sampler: str, steps: int) -> SamplerTable:
    """The bundle's table of a sampler; one it lacks is probed with the exporter's function.

    Raises: SamplerError for an unknown sampler, or a bundle of another noise schedule.
    """
    tables = bundle.samplers()
    if found := tables.get((sampler, steps)):
        return found
    from heartbeat_export.sampler_tables import probe, scheduler

    prediction = bundle.manifest.prediction
    known = next(table for table in tables.values() if table.steps > 1)
    again = probe(known.name, scheduler(known.name, prediction), known.steps)
    close = np.allclose(again.weights[-1], known.weights[-1], atol=1e-6)
    if not close or again.timesteps != known.timesteps:
        raise SamplerError(
            f"steps: {steps} came; bundle {bundle.manifest.name} has no such table and a noise "
            "schedule of its own: export it with one"
        )
    return probe(sampler, scheduler(sampler, prediction), steps)


def make(
    generator: Generator, conditions: Conditions, sampling: Sampling, seed: int
) -> tuple[NDArray[np.uint8], float]:
    """One clip (F, H, W) and the seconds it took, encoders and decoder included.

    Raises: as the generator does.
    """
    table = table_of(generator.bundle, sampling.sampler, sampling.steps)
    watch = Stopwatch()
    encoded = generator.encode(conditions, watch)
    z = generator.denoise(
        encoded, table, sampling.guidance, seed, watch, temperature=sampling.temperature
    )
    frames = generator.decode(z, conditions.flow, seed, watch)
    return frames, sum(watch.ms.values()) / 1e3
