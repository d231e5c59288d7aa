"""The plugin flavour: what TensorRT is told of the hb operations, and the kernels it is handed.

The stand-in checks signatures as TensorRT's own Python does (tensors with types, attributes, then
outputs and tactic). Kernels are really compiled, for the architecture asked for.
"""

import inspect
import os
import sys
from types import ModuleType
from typing import Any

import pytest

from heartbeat_fast.engines import cuda, tensorrt_plugins
from heartbeat_fast.engines.tensorrt_plan import TENSORRT, Recipe, build, facts
from heartbeat_fast.errors import EngineError
from heartbeat_kernels.to_onnx import NODES
from tests.fake_cuda import Driver
from tests.fake_tensorrt import module

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing can be compiled", allow_module_level=True)


class Expression:
    def __init__(self, value: int) -> None:
        self.value = value

    def constant_value(self) -> int:
        return self.value


class TensorDesc:
    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape_expr, self.dtype = [Expression(n) for n in shape], dtype

    def like(self) -> "TensorDesc":
        return self


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class SymIntExprs:
    def __init__(self, count: int) -> None:
        self.count = count


class Plugins(ModuleType):
    """tensorrt.plugin, as far as it is used."""

    TensorDesc, KernelLaunchParams, SymIntExprs = TensorDesc, KernelLaunchParams, SymIntExprs

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.known: dict[str, dict[str, Any]] = {}

    def register(self, name: str) -> Any:
        assert name not in self.known, "already has a definition"

        def keep(function: Any) -> Any:
            kinds = {k: p.annotation for k, p in inspect.signature(function).parameters.items()}
            assert inspect.signature(function).return_annotation is TensorDesc
            assert all(kind in (TensorDesc, int, float) for kind in kinds.values())
            self.known[name] = {"describe": function, "arguments": list(kinds)}
            return function

        return keep

    def aot_impl(self, name: str) -> Any:
        def keep(function: Any) -> Any:
            wanted = [*self.known[name]["arguments"], "outputs", "tactic"]
            assert list(inspect.signature(function).parameters) == wanted
            self.known[name]["implement"] = function
            return function

        return keep


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    driver = Driver()
    made: Any = module("11.4.0.106", driver)
    made.plugin = Plugins()
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", made.plugin)
    return made


def test_operations_are_those_of_the_exported_nodes() -> None:
    for name, (tensors, attributes) in tensorrt_plugins.OPERATIONS.items():
        inputs, numbers = NODES[name]
        assert tensors == tuple(i.rstrip("?") for i in inputs)
        assert tuple(attributes) == numbers


@pytest.mark.parametrize(
    ("name", "shapes", "numbers"),
    [
        ("temporal_attention", [(1, 4, 64, 64)] * 3, (2,)),
        (
            "dual_cross_attention",
            [(1, 256, 64), (1, 77, 64), (1, 77, 64), (1, 256, 64), (1, 16, 64), (1, 16, 64)],
            (2, 0.5),
        ),
    ],
)
@pytest.mark.parametrize(("target", "architecture"), [("SM86", "sm_86"), ("SM90", "sm_90a")])
def test_a_kernel_for_the_shapes_at_hand(
    trt: Any, name: str, shapes: list[Any], numbers: Any, target: str, architecture: str
) -> None:
    tensorrt_plugins.register(trt, target)
    known = trt.plugin.known[f"hb::{name}"]
    tensors = [TensorDesc(shape, trt.DataType.HALF) for shape in shapes]
    assert known["describe"](*tensors) is tensors[0]
    kernel, ptx, launch, scalars = known["implement"](*tensors, *numbers, (tensors[0],), None)
    assert f".target {architecture}" in ptx
    assert f".entry {kernel}" in ptx
    # Inputs, then the output: the only arguments that TensorRT passes without being told more.
    signature = ptx.partition(".entry ")[2].partition(")")[0]
    assert signature.count(".param") == len(shapes) + 1
    assert scalars.count == 0
    assert launch.grid_x * launch.grid_y * launch.grid_z > 1
    assert launch.block_x % 32 == 0


def test_built_only_by_tensorrt_and_only_when_needed(trt: Any) -> None:
    plain = b"\x08\x08"
    build(TENSORRT, plain, Recipe())
    assert trt.plugin.known == {}
    assert tensorrt_plugins.needed(b"..plugin_namespace..")
    with pytest.raises(EngineError, match="cannot parse"):  # the mark alone is no graph
        build(TENSORRT, b"..plugin_namespace..", Recipe())
    assert set(trt.plugin.known) == {"hb::temporal_attention", "hb::dual_cross_attention"}


def test_a_tensorrt_without_them_says_so(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = ModuleType("tensorrt.plugin")
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", bare)
    with pytest.raises(EngineError, match="takes no kernels compiled ahead of time"):
        tensorrt_plugins.register(trt, "SM80")


def test_a_plan_depends_on_the_kernels(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = cuda.Gpu.find("cuda")
    before = facts(TENSORRT, "0" * 64, Recipe(), gpu)
    monkeypatch.setattr(tensorrt_plugins, "digest", lambda: "other")
    assert facts(TENSORRT, "0" * 64, Recipe(), gpu) != before
