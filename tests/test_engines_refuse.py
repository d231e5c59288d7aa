"""Bundles that an engine cannot take are refused when they are opened, with what to do instead."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from heartbeat_fast.bundle import Bundle, describe
from heartbeat_fast.engines import cuda
from heartbeat_fast.engines.base import engine_class
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator
from tests.fake_cuda import Driver
from tests.fake_tensorrt import module

CHOICES = ("onnxruntime", "openvino:fp32", "openvino:bf16", "openvino:int8", "auto")


def opened(folder: Path, engine: str) -> Generator:
    """A generator, where the engine is installed."""
    name = engine.partition(":")[0]
    if name != "auto" and not engine_class(name).available()[0]:
        pytest.skip(f"{name} is not installed")
    return Generator.open(folder, engine)


def said_to_be(bundle: Bundle, folder: Path, **fields: str) -> Path:
    """A copy whose manifest says so."""
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **fields}))
    return folder


@pytest.mark.parametrize("engine", CHOICES)
def test_the_plugin_flavour(engine: str, nano_bundle: Bundle, tmp_path: Path) -> None:
    folder = said_to_be(nano_bundle, tmp_path / "b", flavour="plugin")
    wanted = "plugin flavour.*use engine tensorrt, or export it with --flavour standard"
    with pytest.raises(EngineError, match=wanted) as error:
        opened(folder, engine)
    assert "\n" not in str(error.value)


def test_the_plugin_flavour_on_tensorrt_rtx(
    nano_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = said_to_be(nano_bundle, tmp_path / "b", flavour="plugin")
    driver = Driver(capability=(8, 9))
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    for version in ("rtx 1.7.1.116", "11.4.0.106"):
        made = module(version, driver)
        monkeypatch.setitem(sys.modules, made.__name__, made)
    with pytest.raises(EngineError, match="use engine tensorrt, or export it with --flavour"):
        Generator.open(folder, "tensorrt_rtx", "cuda")
    assert Generator.open(folder, "tensorrt", "cuda").engine.name == "tensorrt"


def in_bf16(bundle: Bundle, folder: Path) -> Path:
    """A copy whose time graph computes in bf16, as an export does: casts inside, float32 ends."""
    said_to_be(bundle, folder, precision="bf16")
    spec = bundle.manifest.graphs["time"]
    rows, width = spec.outputs[0].shape
    nodes: list[Any] = [
        helper.make_node("Cast", ["t"], ["low"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["low", "scale"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], [spec.outputs[0].name], to=TensorProto.FLOAT),
    ]
    half = (0x3F00).to_bytes(2, "little") * rows * width
    scale = helper.make_tensor("scale", TensorProto.BFLOAT16, [rows, width], half, raw=True)
    ends = [
        helper.make_tensor_value_info(t.name, TensorProto.FLOAT, list(t.shape))
        for t in (*spec.inputs, *spec.outputs)
    ]
    graph = helper.make_graph(nodes, "time", ends[:1], ends[1:], [scale])
    opsets = [helper.make_opsetid("", 22)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / spec.file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"]["time"] |= vars(describe(folder / spec.file))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_bf16_on_onnxruntime(nano_bundle: Bundle, tmp_path: Path) -> None:
    folder = in_bf16(nano_bundle, tmp_path / "b")
    wanted = r"bf16 on cpu: use engine openvino, or export with --precision fp32"
    with pytest.raises(EngineError, match=wanted) as error:
        opened(folder, "onnxruntime")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ["openvino:fp32", "openvino:bf16"])
def test_bf16_on_openvino_runs(engine: str, nano_bundle: Bundle, tmp_path: Path) -> None:
    """Not refused: it computes such graphs, on processors without bf16 too."""
    if engine.partition(":")[2] not in engine_class("openvino").precisions():
        pytest.skip(f"no {engine} here")
    generator = opened(in_bf16(nano_bundle, tmp_path / "b"), engine)
    got = generator.engine.run("time", {"t": np.array([500], np.float32)})
    assert np.allclose(next(iter(got.values())), 250)
