"""Sampler tables against diffusers' schedulers over whole trajectories."""

import numpy as np
import pytest
import torch

from heartbeat_export.sampler_tables import (
    SAMPLERS,
    STEPS,
    build_tables,
    multistep,
    probe,
    scheduler,
)
from heartbeat_fast.sampler import (
    SamplerError,
    SamplerTable,
    dump_tables,
    load_tables,
    pick,
    sample,
)

RNG = np.random.Generator(np.random.PCG64(0))
MIX = RNG.standard_normal((2, 24, 24)) / np.sqrt(24)
NOISE = RNG.standard_normal((3, 24))


def model(z: np.ndarray, time: float) -> np.ndarray:
    """A random nonlinear model of latents (3, 24); every term depends on the time."""
    return np.tanh(z @ MIX[0] + np.sin(time / 200)) @ MIX[1] + 0.3 * np.cos(3 * z)


def trajectory_of_diffusers(name: str, prediction: str, steps: int) -> np.ndarray:
    diffusion = scheduler(name, prediction)
    diffusion.set_timesteps(steps)
    x = torch.from_numpy(NOISE) * diffusion.init_noise_sigma
    for t in diffusion.timesteps:
        scaled = diffusion.scale_model_input(x, t)
        x = diffusion.step(torch.from_numpy(model(scaled.numpy(), float(t))), t, x).prev_sample
    return x.numpy()


def run(table: SamplerTable, noise: np.ndarray) -> np.ndarray:
    return sample(table, lambda z, i: model(z, table.timesteps[i]).astype(z.dtype), noise)


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25, 50])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_table_equals_diffusers(name: str, prediction: str, steps: int) -> None:
    table = probe(name, scheduler(name, prediction), steps)
    wanted = trajectory_of_diffusers(name, prediction, steps)
    dense = SamplerTable(**{**vars(table), "multistep": None})
    for form in (table, dense):
        got = run(form, NOISE)
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_run_stays_close(name: str) -> None:
    table = probe(name, scheduler(name, "v_prediction"), 10)
    got = run(table, NOISE.astype(np.float32))
    wanted = trajectory_of_diffusers(name, "v_prediction", 10)
    assert got.dtype == np.float32
    assert np.linalg.norm(got - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2), ("unipc", 3)]
)
def test_short_form_has_the_known_order(name: str, order: int) -> None:
    table = probe(name, scheduler(name, "v_prediction"), 20)
    assert table.multistep is not None
    assert {len(row) for row in table.multistep} == {2 * order}
    assert np.abs(table.multistep).max() < 20  # well conditioned: no differences of large numbers


def test_a_history_without_short_form_stays_dense() -> None:
    T = np.tril(RNG.standard_normal((8, 9)), 1)
    assert multistep(T, 1.0) is None


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_what_is_not_linear_is_refused(option: str) -> None:
    with pytest.raises(SamplerError, match=f"{option} is not linear"):
        probe("ddim", scheduler("ddim", "v_prediction", **{option: True}), 4)


def test_file_round_trip_and_choice() -> None:
    built = build_tables("v_prediction")
    tables = load_tables(dump_tables(built).encode())
    assert len(tables) == len(SAMPLERS) * len(STEPS)
    assert all(tables[table.name, table.steps] == table for table in built)
    assert pick(tables, "dpmpp_2m", 10).timesteps[0] == 999
    with pytest.raises(SamplerError, match="steps: 7 came; unipc has 1, 2, 3"):
        pick(tables, "unipc", 7)
    with pytest.raises(SamplerError, match="'plms' came; this bundle has ddim"):
        pick(tables, "plms", 10)


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"{}", b"[]", b'{"schema_version": 1, "tables": [{}]}']
)
def test_a_broken_file_is_one_error(text: bytes) -> None:
    with pytest.raises(SamplerError, match=r"samplers\.json: not a sampler file"):
        load_tables(text)


def test_another_schema_is_said() -> None:
    with pytest.raises(SamplerError, match="schema 9 came; wanted 1"):
        load_tables(b'{"schema_version": 9, "tables": []}')


def test_rows_must_fit_the_steps() -> None:
    with pytest.raises(SamplerError, match="do not fit 2 steps"):
        SamplerTable("x", 2, "epsilon", (9, 1), 1.0, (1, 1), ((1, 1), (1, 1)))
