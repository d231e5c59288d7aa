"""hb operations as TensorRT plugins: Triton kernels, compiled ahead of time, baked into the plan.

TensorRT asks for a kernel's name, PTX and launch parameters while it builds, so at run time there
is neither Python nor Triton. Shapes are static, which makes every number but the pointers a
constant of the kernel (heartbeat_kernels.aot). TensorRT-RTX has no such plugins.
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.errors import EngineError, optional

NAMESPACE = "hb"
MARK = b"plugin_namespace"  # an attribute of every node of the plugin flavour
# Inputs and attributes of each operation, as in heartbeat_kernels.to_onnx, none of them absent.
OPERATIONS: dict[str, tuple[tuple[str, ...], dict[str, type]]] = {
    "temporal_attention": (("q", "k", "v"), {"heads": int}),
    "dual_cross_attention": (
        ("q", "k", "v", "q_image", "k_image", "v_image"),
        {"heads": int, "image_scale": float},
    ),
}


def needed(content: bytes) -> bool:
    """Whether an ONNX file is of the plugin flavour."""
    return MARK in content


def refuse(bundle: Bundle, engine: str) -> None:
    """For engines that do not know the nodes of the plugin flavour, before anything is loaded.

    Raises:
        EngineError: the bundle is of that flavour.
    """
    if bundle.manifest.flavour == "plugin":
        raise EngineError(
            f"engine {engine}: bundle {bundle.manifest.name} is of the plugin flavour, whose nodes "
            "TensorRT alone takes: use engine tensorrt, or export it with --flavour standard"
        )


@cache
def digest() -> str:
    """SHA-256 of the kernels' source, which a plan of the plugin flavour depends on."""
    found = find_spec("heartbeat_kernels")
    total = hashlib.sha256()
    if found is not None and found.origin is not None:
        for path in sorted(Path(found.origin).parent.glob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


@cache
def register(trt: Any, target: str) -> None:
    """Makes the operations known to TensorRT, once a process.

    Args:
        target: compute capability the kernels are compiled for, e.g. "SM90".

    Raises:
        EngineError: this TensorRT takes no kernels compiled ahead of time.
        MissingDependency: Triton is not installed.
    """
    plugin = optional(f"{trt.__name__}.plugin", "tensorrt")
    if not hasattr(plugin, "aot_impl"):
        raise EngineError(
            f"{trt.__name__} {trt.__version__} takes no kernels compiled ahead of time: "
            "export the standard flavour"
        )
    kernels = optional("heartbeat_kernels.aot", "gpu")
    dtypes = _dtypes(trt, optional("torch", "gpu"))
    for name in OPERATIONS:
        plugin.register(f"{NAMESPACE}::{name}")(_description(plugin, name))
        made = _implementation(plugin, name, kernels, dtypes, int(target.removeprefix("SM")))
        plugin.aot_impl(f"{NAMESPACE}::{name}")(made)


def _dtypes(trt: Any, torch: Any) -> dict[Any, Any]:
    kinds = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
    return {getattr(trt.DataType, name): kind for name, kind in kinds.items()}


def _description(plugin: Any, name: str) -> Callable[..., Any]:
    """The output of an operation: like its queries."""

    def describe(*tensors: Any, **attributes: Any) -> Any:
        return tensors[0].like()

    return _signed(describe, plugin, name, (), plugin.TensorDesc)


def _implementation(
    plugin: Any, name: str, kernels: Any, dtypes: dict[Any, Any], sm: int
) -> Callable[..., Any]:
    """An operation's kernel for the tensors at hand."""
    count = len(OPERATIONS[name][0])

    def implement(*arguments: Any) -> Any:
        tensors, numbers = arguments[:count], arguments[count:-2]  # then outputs and tactic
        made = _compile(kernels, name, tensors, numbers, dtypes[tensors[0].dtype], sm)
        if len(made.arguments) != count + 1:
            raise EngineError(f"{name}: its kernel takes {made.arguments}; wanted inputs, output")
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = made.grid
        launch.block_x, launch.shared_mem = made.block, made.shared
        return made.name, made.ptx, launch, plugin.SymIntExprs(0)

    returned = tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]
    return _signed(implement, plugin, name, ("outputs", "tactic"), returned)


def _compile(kernels: Any, name: str, tensors: Any, numbers: Any, dtype: Any, sm: int) -> Any:
    shapes = [tuple(e.constant_value() for e in tensor.shape_expr) for tensor in tensors]
    if name == "temporal_attention":
        return kernels.temporal_attention(shapes[0], numbers[0], dtype, sm)
    tokens = shapes[1][1], shapes[4][1]
    heads, scale = numbers
    return kernels.dual_cross_attention(shapes[0], tokens, heads, dtype, sm, image_scale=scale)


def _signed(
    function: Callable[..., Any], plugin: Any, name: str, extra: tuple[str, ...], returns: Any
) -> Callable[..., Any]:
    """A function with the signature that TensorRT reads: tensors, attributes, then `extra`."""
    tensors, attributes = OPERATIONS[name]
    kinds = dict.fromkeys(tensors, plugin.TensorDesc) | attributes
    parameters = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for n, kind in kinds.items()
    ] + [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in extra]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return function
