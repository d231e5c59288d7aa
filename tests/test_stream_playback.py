"""Playing by phase, starting from latents, takes of any length: each held to what must come out."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from heartbeat_export.sampler_tables import SAMPLERS, build_tables
from heartbeat_fast.anatomy import contraction_at, sample_anatomy, systole
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.carry import levels, resume
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.controls import Settings
from heartbeat_fast.errors import ConditionError
from heartbeat_fast.generator import Generator
from heartbeat_fast.heart import Shape, beat
from heartbeat_fast.playback import Loop, Player, step, whole_beat
from heartbeat_fast.sampler import SamplerError, SamplerTable, sample
from heartbeat_fast.takes import long_take, windows
from heartbeat_training.acoustics import Probe
from heartbeat_training.phantom import record
from tests.fixtures_toy import FRAMES, SIZE, ToyEngine, toy_bundle

STEPS = (1, 2, 4, 10)


def tables(prediction: str) -> list[SamplerTable]:
    return [table for table in build_tables(prediction) if table.steps in STEPS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


def pulsing(count: int, share: float = 1.0) -> NDArray[np.uint8]:
    """A disc that shrinks and grows: `share` of a beat in so many frames."""
    y, x = np.mgrid[-32:32, -32:32]
    phase = np.linspace(0, share, count)
    radius = 20 + 6 * np.cos(2 * np.pi * phase)
    return ((np.hypot(x, y) < radius[:, None, None]) * 200).astype(np.uint8)


# --- the anatomy in the runtime is the phantom's ---


def test_beat_is_the_phantoms_and_stays_in_the_sector() -> None:
    heart = sample_anatomy(3, coverage=1.0)
    one, item = beat(heart, 4, 64), record(3, coverage=1.0, frames=4, size=64)
    assert item.labels is not None
    assert item.flow is not None
    assert item.skeleton is not None
    assert (one.mask == item.labels).all()
    assert (one.flow == item.flow).all()
    assert (one.skeleton == item.skeleton).all()
    assert (one.fps, one.spacing_mm) == (item.fps, item.spacing_mm)
    shape = Shape(heart, 64)
    assert (shape.inside == Probe.of(64, shape.origin, heart).inside).all()


# --- starting a sampler in the middle ---


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_levels_are_the_schedules(prediction: str) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.sqrt(np.cumprod(1 - betas))
    for table in tables(prediction):
        if table.name == "ddim" and table.steps == 10:
            continue  # "trailing" rounds otherwise there; the next test holds it all the same
        seen = levels(table)
        wanted = alphas[np.asarray(table.timesteps).round().astype(int)]
        assert seen[:, 0] == pytest.approx(wanted, abs=2e-3), (table.name, table.steps)
        assert (seen**2).sum(1) == pytest.approx(np.ones(table.steps), abs=1e-4)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_perfect_model_gives_the_latents_back(prediction: str, dense: bool) -> None:
    """From any step: so history, levels and order of the resumed sampler fit together."""
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, 1, 2, 3, 4, 4))
    for table in tables(prediction):
        if dense:
            table = SamplerTable(**{**vars(table), "multistep": None})
        seen = levels(table)

        def perfect(x: NDArray[np.float64], i: int) -> NDArray[np.float64]:
            a, s = seen[i]  # noqa: B023
            assert np.allclose(x, a * z + s * noise, atol=1e-4)
            return a * noise - s * z if prediction == "v_prediction" else noise

        for start in range(table.steps):
            out = resume(table, perfect, z, noise, start)
            assert np.allclose(out, z, atol=1e-4), (table.name, table.steps, start)


def test_few_step_tables_can_be_resumed() -> None:
    """They are no solvers, and their levels are the schedule's to a few hundredths."""
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, 1, 2, 3, 4, 4))
    few = [t for t in build_tables("v_prediction", (1, 2, 4)) if t.name == "few_step"]
    assert len(few) == 3
    for table in few:
        seen = levels(table)
        assert np.hypot(*seen.T) == pytest.approx(np.ones(table.steps), abs=0.03)
        for start in range(table.steps):

            def perfect(x: NDArray[np.float64], i: int) -> NDArray[np.float64]:
                return np.asarray(seen[i, 0] * noise - seen[i, 1] * z)  # noqa: B023

            assert np.allclose(resume(table, perfect, z, noise, start), z, atol=1e-4)


def test_a_carried_start_follows_the_model() -> None:
    """Data N(μ, s²) have an exact model: wherever it starts, the mean moves on to μ."""
    table = next(t for t in tables("v_prediction") if t.name == "dpmpp_2m" and t.steps == 10)
    seen, mean, spread = levels(table), 3.0, 0.1
    rng = np.random.default_rng(1)
    z, noise = rng.standard_normal((2, 4000)) * 0.1, rng.standard_normal(4000)

    def exact(x: NDArray[np.float64], i: int) -> NDArray[np.float64]:
        a, s = seen[i]
        clean = mean + a * spread**2 * (x - a * mean) / (a**2 * spread**2 + s**2)
        return np.asarray((a * x - clean) / s)

    z = z[0]  # old latents at 0, the wanted ones at 3
    ends = [float(resume(table, exact, z, noise, start).mean()) for start in (0, 5, 8)]
    plain = float(sample(table, exact, noise).mean())
    assert ends[0] == pytest.approx(plain, abs=0.05)
    assert ends[0] > ends[1] > ends[2]  # more carried, less followed
    assert ends[1] > 2.0


def test_what_cannot_be_resumed_is_refused() -> None:
    table = tables("v_prediction")[0]
    with pytest.raises(SamplerError, match="start: 9 came"):
        resume(table, lambda x, i: x, np.zeros(2), np.zeros(2), 9)
    odd = SamplerTable(**{**vars(table), "weights": ((0.5, 0.1),), "steps": 1,
                          "timesteps": (999,), "input_scale": (1,), "multistep": None})  # fmt: skip
    with pytest.raises(SamplerError, match="cannot be read off"):
        levels(odd)
    assert set(SAMPLERS) == {t.name for t in tables("epsilon")}


# --- loops ---


def test_whole_beats_and_halves_are_told_apart() -> None:
    whole, half = pulsing(16), pulsing(16, 0.5)
    assert whole_beat(whole)
    assert not whole_beat(half)
    masks = [(frames > 0).astype(np.uint8) for frames in (whole, half)]
    noise = np.random.default_rng(0).integers(0, 255, whole.shape, np.uint8)
    assert whole_beat(noise, masks[0])  # the mask knows better than the picture
    assert not whole_beat(noise, masks[1])


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("rate", [40.0, 72.0, 180.0])
def test_a_loop_has_no_seam(share: float, rate: float) -> None:
    frames = pulsing(16, share)
    conditions = Conditions(mask=(frames > 0).astype(np.uint8), frames=16, size=64)
    loop = Loop.of(frames, conditions)
    assert loop.whole == (share == 1.0)
    seam, within = loop.seam()
    assert seam <= within
    indices = [loop.index(phase, rate) for phase in np.arange(0, 1, 0.001)]
    assert indices[0] == 0
    jumps = np.abs(np.diff([*indices, indices[0]]))
    count = len(loop.frames)
    assert np.minimum(jumps, count - jumps if loop.whole else jumps).max() <= 1
    assert set(indices) == set(range(count))
    # The ventricle is smallest at the end of systole.
    areas = [(loop.frames[loop.index(p, rate)] > 0).sum() for p in np.arange(0, 1, 0.001)]
    smallest = float(np.mean(np.flatnonzero(areas == np.min(areas)))) / 1000
    assert smallest == pytest.approx(0.5 if loop.whole else systole(rate), abs=0.12)


def test_a_beat_that_does_not_close_is_joined() -> None:
    frames = pulsing(16)
    frames[-1] //= 2  # ends darker than it began
    frames[-2] = (frames[-2] * 0.6).astype(np.uint8)
    loop = Loop(frames, whole=True)
    assert len(loop.frames) == 15
    assert step(loop.frames[-1], loop.frames[0]) < step(frames[-2], frames[0])


def test_heart_rate_is_the_beats_a_minute() -> None:
    player = Player(heart_rate=90)
    player.show(Loop(pulsing(16), True, version=1), 0.0)
    phases = [player.frame(t / 25, t).phase for t in range(250)]  # ten seconds
    assert (np.diff(phases) < 0).sum() == 15 - 1 + (phases[-1] < phases[-2])
    at = player.phase
    player.heart_rate = 45  # from here on
    assert player.frame(250 / 25 - 0.04, 0).phase == pytest.approx(at)
    assert player.frame(250 / 25 + 0.36, 0).phase == pytest.approx((at + 0.4 * 0.75) % 1)


def test_a_change_does_not_jump() -> None:
    """Over a fade no step is larger than within the clips, plus the fade's own even share."""
    old, new = pulsing(16), np.roll(pulsing(16), 6, 2)
    player = Player(heart_rate=60, fade=0.2)
    player.show(Loop(old, True, 1), 0.0)
    shown = [player.frame(t / 25, t) for t in range(10)]
    player.show(Loop(new, True, 2), 0.4)
    shown += [player.frame(0.4 + t / 25, t) for t in range(10)]
    assert [f.version for f in shown] == [1] * 10 + [2] * 10
    assert (shown[10].pixels != old[player.loop.index(shown[10].phase, 60)]).any()  # at once
    steps = [step(a.pixels, b.pixels) for a, b in pairwise(shown)]
    within = max(Loop(clip, True).seam()[1] for clip in (old, new))
    apart = max(step(a, b) for a, b in zip(old, new, strict=True))
    assert max(steps) <= within + apart / (0.2 * 25) + 1
    assert apart > 2 * within
    assert player.loop is not None
    assert (shown[-1].pixels == player.loop.frames[player.loop.index(player.phase, 60)]).all()


def test_contraction_is_one_at_the_end_of_systole() -> None:
    for rate in (50, 75, 120):
        ends = np.array([0, systole(rate), 1.0])
        assert contraction_at(ends, rate) == pytest.approx([0, 1, 0], abs=1e-9)


# --- takes ---


def test_windows_cover_a_take() -> None:
    for length in range(16, 60):
        for overlap in (1, 4, 15):
            starts = windows(length, 16, overlap)
            covered = {t for start in starts for t in range(start, start + 16)}
            assert covered == set(range(length))
            assert all(b - a <= 16 - overlap for a, b in pairwise(starts))


def test_a_take_of_one_window_is_a_clip_and_longer_ones_hang_together(bundle: Bundle) -> None:
    generator = Generator(bundle, ToyEngine(bundle))
    one = Conditions(text="An ECHO.", ef=40, frames=FRAMES, size=SIZE)
    settings = Settings(steps=4)
    assert (
        long_take(generator, one, settings, overlap=2).frames == generator(one, steps=4).frames
    ).all()

    L = 11
    mask = np.zeros((L, SIZE, SIZE), np.uint8)
    for t in range(L):
        mask[t, 16:48, 8 + 2 * t : 32 + 2 * t] = 1
    flow = np.zeros((L, 2, SIZE, SIZE), np.float32)
    flow[:, 0] = 2
    long = Conditions(ef=40, mask=mask, flow=flow, frames=L, size=SIZE)
    take = long_take(generator, long, settings, overlap=2)
    assert take.frames.shape == (L, SIZE, SIZE)
    assert take.provenance["windows"] == 5
    brightest = [frame[16:48].mean(0) for frame in take.frames.astype(float)]
    centres = [float((row * np.arange(SIZE)).sum() / row.sum()) for row in brightest]
    assert np.all(np.diff(centres) > 0)  # the motion goes on through every joint
    steps = [step(a, b) for a, b in pairwise(take.frames)]
    assert max(steps) < 2 * np.median(steps)
    for changed in ({"overlap": 4}, {"overlap": 0}):
        with pytest.raises(ConditionError, match="take: 11 frames, overlap"):
            long_take(generator, long, settings, **changed)
