"""The order of calls: hoisted equals plain, absent costs nothing, calls never see each other."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heartbeat_export.parity import beating_ring
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.engines.base import Arrays
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.errors import ConditionError, EngineError
from heartbeat_fast.generator import STAGES, Generator
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.sampler import SamplerError
from heartbeat_fast.text import Tokenizer

SUBSETS = [(), ("text",), ("ef",), ("image",), ("mask", "flow"), ("sketch", "skeleton"), NAMES]


class Counting:
    """An engine that notes which graphs ran."""

    name, precision, device = "counting", "fp32", "cpu"

    def __init__(self, bundle: Bundle) -> None:
        self.inner = OnnxRuntimeEngine.open(bundle)
        self.ran: list[str] = []

    @staticmethod
    def available() -> tuple[bool, str]:
        return True, ""

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cpu", source: str = "") -> "Counting":
        return cls(bundle)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self.ran.append(graph)
        return self.inner.run(graph, inputs)


@pytest.fixture(scope="module")
def generator(nano_bundle: Bundle) -> Generator:
    return Generator.open(nano_bundle)


@pytest.fixture(scope="module")
def ring(nano_bundle: Bundle) -> Conditions:
    return beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_hoisted_equals_the_plain_pass(
    subset: tuple[str, ...],
    nano_bundle: Bundle,
    nano_model: HeartBeat,
    nano_tokenizer: Tokenizer,
    ring: Conditions,
) -> None:
    conditions = ring.only(subset)
    z = np.random.default_rng(1).standard_normal((1, 4, 4, 8, 8), np.float32)
    arrays: dict[str, Any] = dict(conditions.arrays())
    arrays["tokens"] = nano_tokenizer.encode(conditions.text or "")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.inference_mode():
        plain = nano_model.predict(torch.from_numpy(z), torch.tensor([321.0]), tensors).numpy()

    # Encoders of absent conditions did not run here; in the plain pass they did, and count zero.
    engine = TorchEngine(nano_model, nano_bundle)
    encoded = Generator(nano_bundle, engine).encode(conditions)
    temb = engine.run("time", {"t": np.array([321.0], np.float32)})["temb"]
    inputs = {"z": z, "temb": temb, "local": encoded.local, **encoded.context}
    hoisted = engine.run("denoise", inputs)["out"]
    assert np.linalg.norm(hoisted - plain) <= 1e-5 * np.linalg.norm(plain)


def test_same_seed_same_clip_and_nothing_leaks(generator: Generator, ring: Conditions) -> None:
    first = generator(ring, steps=3, seed=5)
    other = generator(ring.only(["text"]), steps=4, seed=6, guidance=2.0)
    again = generator(ring, steps=3, seed=5)
    assert (first.frames == again.frames).all()
    assert (first.frames != other.frames).any()
    assert (first.frames != generator(ring, steps=3, seed=7).frames).any()


def test_every_condition_changes_the_clip(generator: Generator, ring: Conditions) -> None:
    nothing = generator(ring.only([]), steps=2)
    for name in NAMES:
        assert (generator(ring.only([name]), steps=2).frames != nothing.frames).any(), name


def test_each_stage_runs_as_often_as_it_must(nano_bundle: Bundle, ring: Conditions) -> None:
    engine = Counting(nano_bundle)
    generator = Generator(nano_bundle, engine)
    generator(ring, steps=4)
    assert engine.ran == [
        *("text", "image", "local", "context"),
        *["time"] * 4,
        *["denoise"] * 4,
        "decode",
    ]
    engine.ran.clear()
    generator(ring.only(["text", "ef"]), steps=4)  # warm: time embeddings are kept
    assert engine.ran == ["text", "context", *["denoise"] * 4, "decode"]
    engine.ran.clear()
    generator(ring.only(["mask"]), steps=4, guidance=3.0)
    assert engine.ran.count("denoise") == 8
    assert "image" not in engine.ran


def test_guidance_of_two_conditioned_passes_is_one(generator: Generator, ring: Conditions) -> None:
    """With nothing present, null + w (conditioned − null) is the null itself for any weight."""
    plain = generator(ring.only([]), steps=3, seed=2).frames.astype(int)
    guided = generator(ring.only([]), steps=3, seed=2, guidance=5.0).frames.astype(int)
    assert np.abs(plain - guided).max() <= 1


def test_provenance_and_progress(generator: Generator, ring: Conditions) -> None:
    seen: list[tuple[int, int]] = []
    clip = generator(
        ring.only(["mask", "ef"]),
        steps=3,
        seed=9,
        spacing_mm=(0.5, 0.6),
        fps=40,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert clip.frames.shape == (4, 64, 64)
    assert (clip.spacing_mm, clip.fps) == ((0.5, 0.6), 40)
    facts = clip.provenance
    assert facts["conditions"] == ["ef", "mask"]
    assert facts["seed"] == 9
    assert tuple(facts["timings_ms"]) == STAGES
    assert facts["timings_ms"]["denoise"] > 0


def test_wrong_input_is_one_clear_error(generator: Generator, ring: Conditions) -> None:
    with pytest.raises(ConditionError, match="16 frames of 256 came; bundle nano wants 4 of 64"):
        generator(Conditions(text="An ECHO."))
    with pytest.raises(ConditionError, match=r"text: \d+ tokens came; wanted at most 77"):
        generator(Conditions(text="heart " * 90, frames=4, size=64))
    with pytest.raises(SamplerError, match="steps: 7 came; dpmpp_2m has"):
        generator(ring, steps=7)
    with pytest.raises(SamplerError, match="'plms' came"):
        generator(ring, sampler="plms")
    for options in ({"guidance": float("nan")}, {"guidance": -1.0}, {"seed": -1}):
        with pytest.raises(EngineError, match="wanted both 0 or more"):
            generator(ring, **options)
    with pytest.raises(EngineError, match="temperature 3 came; wanted 0 to 2"):
        generator(ring, temperature=3)


def test_frames_that_are_no_numbers_are_refused(generator: Generator) -> None:
    with pytest.raises(EngineError, match="came out as NaN"):
        generator.decode(np.full((1, 4, 4, 8, 8), np.nan, np.float32))


def test_what_is_kept_does_not_outlive_a_fault(
    nano_bundle: Bundle, ring: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time embeddings are computed once; numbers that were none must not stay."""
    generator = Generator.open(nano_bundle, "onnxruntime")
    run = generator.engine.run
    with monkeypatch.context() as broken:
        broken.setattr(
            generator.engine,
            "run",
            lambda graph, given: {
                k: np.full_like(v, np.nan) if graph == "time" else v
                for k, v in run(graph, given).items()
            },
        )
        with pytest.raises(EngineError, match="came out as NaN"):
            generator(ring, steps=4)
    assert generator(ring, steps=4).frames.any()
