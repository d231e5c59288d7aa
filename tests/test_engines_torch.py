"""The torch engine's fast choices against its plain one, and the loop that stays on the device."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from heartbeat_export.parity import beating_ring, psnr, relative_error
from heartbeat_fast.bundle import GRAPHS, Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.engines.torch_engine import TorchEngine, parse
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.graphs import example_inputs
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.models.sampling_loop import Loop, condition_sets
from heartbeat_fast.sampler import sample


@pytest.fixture(scope="module")
def plain(nano_model: HeartBeat, nano_bundle: Bundle) -> TorchEngine:
    return TorchEngine(nano_model, nano_bundle)


@pytest.mark.parametrize(
    ("precision", "bound", "decibels"), [("bf16", 3e-2, 30), ("fp16", 4e-3, 45)]
)
def test_half_precision_is_near(
    precision: str,
    bound: float,
    decibels: float,
    nano_model: HeartBeat,
    nano_bundle: Bundle,
    plain: TorchEngine,
) -> None:
    engine = TorchEngine(copy.deepcopy(nano_model), nano_bundle, precision=precision)
    for graph, tensors in example_inputs(nano_model, seed=5).items():
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        got, wanted = engine.run(graph, arrays), plain.run(graph, arrays)
        for name in wanted:
            error = relative_error(got[name], wanted[name])
            assert error <= (1e-5 if graph == "time" else bound), graph
            assert got[name].dtype == np.float32
    ring = beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    clips = [Generator(nano_bundle, e)(ring, steps=4, seed=3).frames for e in (engine, plain)]
    assert decibels <= psnr(*clips) < 99  # 99: nothing was cast


@pytest.mark.slow
def test_compiled_equals_eager(
    nano_model: HeartBeat, nano_bundle: Bundle, plain: TorchEngine
) -> None:
    """The smallest graph only: compiling all of them takes minutes."""
    engine = TorchEngine(copy.deepcopy(nano_model), nano_bundle, mode="compiled")
    t = {"t": np.array([500.0], np.float32)}
    assert relative_error(engine.run("time", t)["temb"], plain.run("time", t)["temb"]) < 1e-5
    assert all(
        hasattr(engine._modules[graph], "_torchdynamo_orig_callable")
        or hasattr(engine._modules[graph], "_orig_mod")
        for graph in GRAPHS
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("conditions", ["all", "without image"])
@pytest.mark.parametrize("sampler", [("dpmpp_2m", 6), ("ddim", 10)])
def test_the_loop_equals_the_sampler(
    sampler: tuple[str, int],
    conditions: str,
    guidance: float,
    nano_bundle: Bundle,
    plain: TorchEngine,
) -> None:
    generator = Generator(nano_bundle, plain)
    table = nano_bundle.samplers()[sampler]
    given = beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    if conditions == "without image":
        given = given.only(("text", "mask"))
    encoded = [generator.encode(given)]
    if guidance != 1:
        nothing = Conditions(frames=given.frames, size=given.size)
        encoded.append(generator.encode(nothing))
    sets = [{"local": each.local, **each.context} for each in encoded]
    times = generator._time_embeddings(table)
    shape = next(s.shape for s in nano_bundle.manifest.graphs["denoise"].inputs if s.name == "z")
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)

    def model(z: np.ndarray, i: int) -> np.ndarray:
        outs = [plain.run("denoise", {"z": z, "temb": times[i], **each})["out"] for each in sets]
        return outs[0] if guidance == 1 else outs[1] + np.float32(guidance) * (outs[0] - outs[1])

    done: list[tuple[int, int]] = []
    got = plain.loop(table, times, sets, guidance, noise, lambda i, of: done.append((i, of)))
    assert done == [(i + 1, table.steps) for i in range(table.steps)]
    wanted = sample(table, model, noise)
    assert wanted.std() > 0.1
    assert relative_error(got, wanted) < 1e-5
    assert np.array_equal(plain.loop(table, times, sets, guidance, noise), got)  # buffers hold on


def test_what_a_clip_leaves_in_the_buffers_does_not_reach_the_next(
    nano_bundle: Bundle,
) -> None:
    """Not even where it left no numbers."""
    table = nano_bundle.samplers()[("dpmpp_2m", 4)]
    noise, times = torch.randn(1, 2, 3), torch.randn(4, 5)
    loop = Loop(lambda z, temb, local: z * local, torch.float32, 4, [[torch.ones(1)]], False)
    first = loop.run(table, times, [[torch.ones(1)]], 1.0, noise)
    loop.run(table, times, [[torch.full((1,), torch.nan)]], 1.0, noise)
    assert torch.equal(loop.run(table, times, [[torch.ones(1)]], 1.0, noise), first)
    assert first.isfinite().all()


def test_an_absent_image_is_left_out() -> None:
    names = ("z", "temb", "local", "kv_a_text_k", "kv_a_text_v", "kv_a_image_k", "kv_a_image_v")
    there: dict[str, Tensor] = {name: torch.ones(2) for name in names[2:]}
    gone = there | {"kv_a_image_v": torch.zeros(2)}
    assert [len(each) for each in condition_sets([there, gone], names)] == [5, 3]


def test_options_are_read_before_the_folder(nano_model: HeartBeat, nano_bundle: Bundle) -> None:
    assert parse("bf16:graph:/a:b/c") == ({"precision": "bf16", "mode": "graph"}, "/a:b/c")
    assert parse("C:\\models") == ({}, "C:\\models")
    assert parse("bf16") == ({}, "bf16")  # a folder of that name: options end with a colon
    with pytest.raises(EngineError, match="no CUDA graph on cpu: leave out graph"):
        TorchEngine(nano_model, nano_bundle, mode="graph")
    with pytest.raises(EngineError, match="fp8, eager came; wanted of fp32, bf16, fp16, eager"):
        TorchEngine(nano_model, nano_bundle, precision="fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("precision", "decibels"), [("fp32", 45), ("bf16", 28)])
def test_a_captured_loop_on_a_gpu_equals_the_reference(
    precision: str,
    decibels: float,
    guidance: float,
    nano_model: HeartBeat,
    nano_bundle: Bundle,
    plain: TorchEngine,
) -> None:
    engine = TorchEngine(copy.deepcopy(nano_model), nano_bundle, "cuda", precision, "graph")
    ring = beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    options = {"steps": 6, "guidance": guidance, "seed": 3}
    got, wanted = (Generator(nano_bundle, e)(ring, **options).frames for e in (engine, plain))
    assert psnr(got, wanted) >= decibels
    other = Generator(nano_bundle, engine)(ring.only(("text",)), **options).frames
    again = Generator(nano_bundle, engine)(ring, **options).frames
    assert np.array_equal(again, got)
    assert not np.array_equal(other, got)
