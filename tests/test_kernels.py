"""Triton kernels without a GPU: numerics in the interpreter, what is refused, what torch and ONNX
see. On a GPU: test_kernels_gpu.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heartbeat_benchmarks import results
from heartbeat_benchmarks.cli import main
from heartbeat_fast.models.blocks import use_kernels
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_kernels import ops, reference, tuning
from heartbeat_kernels.checks import KernelError
from heartbeat_kernels.reference import TemporalLayer

NUMERICS = Path(__file__).with_name("kernels_numerics.py")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["temporal_attention", "dual", "block or norm or geglu or op"])
def test_numerics_in_the_interpreter(which: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    done = run_pytest(NUMERICS, "-k", which, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def run_pytest(file: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A file's tests in a process of their own: Triton decides at its import how kernels run."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(file), *more], capture_output=True, text=True, env=os.environ | env
    )


def layer(c: int, f: int) -> TemporalLayer:
    shapes = [(c,), (c,), (f, c), (3 * c, c), (c, c), (c,)]
    return TemporalLayer(*(0.1 * torch.randn(s) for s in shapes))


def qkv(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(3)]


# What is refused

x = torch.zeros(1, 4, 3, 32)
rows, tokens = torch.zeros(2, 5, 32), torch.zeros(2, 7, 32)
REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "frames differ": (lambda: ops.temporal_attention(x, x[:, :3], x, 2), r"k is \(1, 3, 3, 32\)"),
    "positions differ": (lambda: ops.temporal_attention(x, x, x[:, :, :2], 2), "v is"),
    "rank": (lambda: ops.temporal_attention(x[0], x[0], x[0], 2), "wanted .B,F,N,E."),
    "heads": (lambda: ops.temporal_attention(x, x, x, 5), "do not divide by 5 heads"),
    "no heads": (lambda: ops.temporal_attention(x, x, x, 0), "do not divide by 0 heads"),
    "dtypes": (lambda: ops.temporal_attention(x, x.half(), x, 2), "k is torch.float16"),
    "double": (lambda: ops.temporal_attention(*[x.double()] * 3, 2), "backend='reference'"),
    "device": (lambda: ops.temporal_attention(x, x.to("meta"), x, 2), "k is on meta"),
    "stride": (lambda: ops.temporal_attention(*[x.mT.contiguous().mT] * 3, 2), "contiguous"),
    "33 frames": (lambda: ops.temporal_attention(*[x.repeat(1, 9, 1, 1)] * 3, 2), "1 to 32"),
    "empty": (lambda: ops.temporal_attention(*[x[:0]] * 3, 2), "none of them 0"),
    "backend": (lambda: ops.temporal_attention(x, x, x, 2, backend="cuda"), "'cuda' came"),  # type: ignore[arg-type]
    "clips": (lambda: ops.dual_cross_attention((rows, *[tokens[:1]] * 2), None, 2), "k is"),
    "values": (lambda: ops.dual_cross_attention((rows, tokens, tokens[:, :5]), None, 2), "v is"),
    "queries": (
        lambda: ops.dual_cross_attention((rows, tokens, tokens), (rows[:, :4], tokens, tokens), 2),
        "q_image is",
    ),
    "width": (
        lambda: ops.dual_cross_attention((rows, *[tokens[..., :16].contiguous()] * 2), None, 2),
        r"wanted \(2, 7, 32\)",
    ),
    "positions learned": (lambda: ops.temporal_block(x, layer(32, 3), 2), "position is"),
    "layer": (lambda: ops.temporal_block(x, layer(16, 4), 2), r"wanted \(32,\)"),
    "fused width": (
        lambda: ops.temporal_block(torch.zeros(1, 4, 3, 24), layer(24, 4), 2, fused=True),
        "multiples of 16",
    ),
    "groups": (lambda: ops.groupnorm_silu(x, 3, *[torch.ones(4)] * 2), "by 3 groups"),
    "gaps": (lambda: ops.groupnorm_silu(x[..., ::2], 2, *[torch.ones(4)] * 2), "without gaps"),
    "odd": (lambda: ops.geglu(torch.zeros(2, 7)), r"wanted \(…,2E\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_garbage_is_refused(name: str) -> None:
    call, says = REFUSED[name]
    with pytest.raises(KernelError, match=says):
        call()


def test_operations_check_for_themselves() -> None:
    """Export and TensorRT call hb::NAME without ops.py."""
    with pytest.raises(KernelError, match="do not divide"):
        torch.ops.hb.temporal_attention(x, x, x, 5)
    with pytest.raises(KernelError, match="come together"):
        torch.ops.hb.dual_cross_attention(rows, tokens, tokens, None, tokens, None, 2, 1.0)


# What torch sees


def both(call: Callable[..., Tensor]) -> None:
    assert torch.allclose(call(backend="triton"), call(backend="reference"), atol=1e-5)


def test_backends_agree_on_a_cpu() -> None:
    q, k, v = qkv(2, 4, 6, 32)
    both(lambda backend: ops.temporal_attention(q, k, v, 2, backend=backend))
    both(lambda backend: ops.temporal_block(q, LAYER, 2, backend=backend))
    a, b = qkv(2, 9, 32), qkv(2, 9, 32)
    both(lambda backend: ops.dual_cross_attention(a, b, 2, image_scale=0.3, backend=backend))  # type: ignore[arg-type]
    w, affine = torch.rand(4), (torch.rand(2, 4), torch.rand(2, 4))
    both(lambda backend: ops.groupnorm_silu(q, 2, w, w, affine=affine, backend=backend))
    both(lambda backend: ops.geglu(q, backend=backend))


def test_a_model_is_the_same_with_kernels(nano_model: HeartBeat) -> None:
    denoiser, frames = nano_model.denoiser, nano_model.config.frames
    config, side = denoiser.config, nano_model.config.latent
    z = torch.randn(1, frames, config.latent_channels, side, side)
    local = torch.randn(1, frames, config.local_channels, side, side)
    text, image = torch.randn(2, 1, 7, config.context_dim).unbind()
    inputs = z, torch.tensor([500]), local, text, image
    with torch.inference_mode():
        wanted = denoiser(*inputs)
        try:
            use_kernels(nano_model, "triton")
            came = denoiser(*inputs)
        finally:
            use_kernels(nano_model, "reference")
    assert torch.allclose(came, wanted, atol=1e-5)


LAYER = layer(32, 4)


class Layers(nn.Module):
    """One of each operation that an exported denoiser holds."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x + ops.temporal_attention(x, x, x, 2)
        x = ops.temporal_block(x, LAYER, 2, fused=True)
        q = x.flatten(1, 2)
        both = ops.dual_cross_attention((q, k, v), (q, v, k), 2, image_scale=0.5)
        own = ops.dual_cross_attention((q, k, v), (k[:, :1].expand_as(q), v, k), 2)
        return both + own + ops.dual_cross_attention((q, k, v), None, 2)


def test_compiles_to_one_graph_with_gradients() -> None:
    """aot_eager: tracing, fakes and gradients; what the inductor adds is not ours."""
    tensors = [torch.randn(2, 4, 3, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)]
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    compiled = torch.compile(Layers(), fullgraph=True, backend="aot_eager")
    came, wanted = compiled(*mine), Layers()(*theirs)
    assert torch.allclose(came, wanted, atol=1e-5)
    pairs = zip(
        torch.autograd.grad(came.square().sum(), mine),
        torch.autograd.grad(wanted.square().sum(), theirs),
        strict=True,
    )
    for one, other in pairs:
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


def test_gradients_are_the_references() -> None:
    tensors = [torch.randn(2, 4, 3, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)]
    found = []
    for module in (Layers(), PlainLayers()):
        mine = [t.clone().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(module(*mine).square().mean(), mine))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


class PlainLayers(nn.Module):
    """Layers, by the reference."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x + reference.temporal_attention(x, x, x, 2)
        x = reference.temporal_block(x, LAYER, 2)
        q = x.flatten(1, 2)
        both = reference.dual_cross_attention((q, k, v), (q, v, k), 2, 0.5)
        own = reference.dual_cross_attention((q, k, v), (k[:, :1].expand_as(q), v, k), 2)
        return both + own + reference.dual_cross_attention((q, k, v), None, 2)


# What ONNX sees


def test_exports_as_nodes_that_compute_the_same() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    from heartbeat_kernels.to_onnx import translations

    inputs = (torch.randn(2, 4, 3, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32))
    program = torch.onnx.export(
        Layers().eval(),
        inputs,
        dynamo=True,
        opset_version=21,
        custom_translation_table=translations(),
        verbose=False,
    )
    model = program.model_proto
    onnx.checker.check_model(model)
    nodes = [node for node in model.graph.node if node.domain == "hb"]
    kinds = ["temporal_attention", "temporal_block", *["dual_cross_attention"] * 3]
    assert [node.op_type for node in nodes] == kinds
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[2].attribute}
    assert attributes == {"heads": 2, "image_scale": 0.5, "aot": 1, "plugin_namespace": b"hb"}
    assert [len(node.input) for node in nodes] == [3, 7, 6, 6, 3]
    assert nodes[2].input[3] == ""  # shared queries: the slot is there, empty

    came = ReferenceEvaluator(model, new_ops=numpy_operations()).run(
        None, dict(zip((i.name for i in model.graph.input), map(np.asarray, inputs), strict=True))
    )
    assert np.allclose(came[0], PlainLayers()(*inputs), atol=1e-5)


def numpy_operations() -> list[type]:
    """hb's nodes for ONNX's own evaluator, by reference.py: whether the wiring is right."""
    from onnx.reference.op_run import OpRun

    def tensors(*arrays: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(np.array(a)) for a in arrays]

    class temporal_attention(OpRun):
        op_domain = "hb"

        def _run(self, q, k, v, heads, aot, plugin_namespace):  # type: ignore[no-untyped-def]
            return (reference.temporal_attention(*tensors(q, k, v), heads).numpy(),)

    class temporal_block(OpRun):
        op_domain = "hb"

        def _run(self, *arrays, heads, eps, aot, plugin_namespace):  # type: ignore[no-untyped-def]
            x, *parameters = tensors(*arrays)
            return (reference.temporal_block(x, TemporalLayer(*parameters, eps), heads).numpy(),)  # type: ignore[arg-type]

    class dual_cross_attention(OpRun):
        op_domain = "hb"

        def _run(self, q, k, v, q_image=None, k_image=None, v_image=None, **numbers):  # type: ignore[no-untyped-def]
            text, image = tensors(q, k, v), None
            if k_image is not None:
                image = tensors(q if q_image is None else q_image, k_image, v_image)
            scale, heads = numbers["image_scale"], numbers["heads"]
            return (reference.dual_cross_attention(text, image, heads, scale).numpy(),)  # type: ignore[arg-type]

    return [temporal_attention, temporal_block, dual_cross_attention]


# What the benchmark says


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured, not predicted")
def test_benchmark_without_a_gpu_predicts_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", "--only", "temporal_attention", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("not run") == 5  # four shapes, and the GPU
    (path,) = tmp_path.glob("kernels-*.json")
    row = results.load(path)["rows"][0]
    assert row["bytes"] == 4 * 16 * 1024 * 320 * 2  # q, k, v in, o out
    assert row["predicted_us"]["H100"] == pytest.approx(row["bytes"] / 3.0e12 * 1e6)
    assert "us" not in row


# Tuning tables


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_tuning_tables_are_whole(path: Path) -> None:
    table = tuning.read(path)
    assert table["status"]
    assert path.stem in ("default", tuning.slug(table["gpu"]))


def test_tuning_table_of_a_gpu_is_its_own_or_the_default_one() -> None:
    assert tuning.table("NVIDIA Nothing 3000") == tuning.table("")
    wide = tuning.launch_for("temporal_attention", 160, torch.bfloat16)
    assert tuning.launch_for("temporal_attention", 500, torch.bfloat16) == wide
    with pytest.raises(KernelError, match="float64"):
        tuning.launch_for("geglu", 8, torch.float64)


def test_a_broken_tuning_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    text = (tuning.FOLDER / "default.json").read_text()
    path.write_text(text.replace('"tile": 64', '"tile": 65'))
    with pytest.raises(KernelError, match="powers of two"):
        tuning.read(path)
    path.write_text("{")
    with pytest.raises(KernelError, match="not JSON"):
        tuning.read(path)
