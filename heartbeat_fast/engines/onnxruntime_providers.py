"""ONNX Runtime's execution providers as data: names, options, where their tensors live."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from heartbeat_fast.errors import EngineError, optional


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Args:
        name: onnxruntime's.
        memory: the device type of tensors that stay between graphs; "cpu": they do not.
        options: the provider's own, as strings.
        capture: its option that replays a graph as one CUDA graph; "" if it has none.
        library: the Python package that brings it as a plugin; "" if it is built in.
        before_cpu: providers that take what this one cannot, before the CPU does.
    """

    name: str
    memory: str = "cpu"
    options: dict[str, str] = field(default_factory=dict)
    capture: str = ""
    library: str = ""
    before_cpu: tuple[str, ...] = ()


CPU = "CPUExecutionProvider"
PROVIDERS = {
    "cpu": Provider(CPU),
    # TF32 rounds fp32 to 10 bits of mantissa, which the engine's name would hide.
    "cuda": Provider(
        "CUDAExecutionProvider",
        memory="cuda",
        options={"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"},
        capture="enable_cuda_graph",
    ),
    # Its own engine cache goes by the names of graphs, which new weights do not change.
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        memory="cuda",
        options={"trt_engine_cache_enable": "0", "trt_fp16_enable": "0"},
        capture="trt_cuda_graph_enable",
        before_cpu=("cuda",),
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        memory="cuda",
        capture="enable_cuda_graph",
        library="onnxruntime_ep_nv_tensorrt_rtx",
    ),
    "coreml": Provider(
        "CoreMLExecutionProvider",
        options={"ModelFormat": "MLProgram", "RequireStaticInputShapes": "1"},
    ),
    "directml": Provider("DmlExecutionProvider"),
}


def here(ort: Any) -> list[str]:
    """Our names of the providers this onnxruntime has, or has an installed plugin for."""
    built_in = ort.get_available_providers()
    return [
        name
        for name, provider in PROVIDERS.items()
        if provider.name in built_in or (provider.library and find_spec(provider.library))
    ]


def find(ort: Any, device: str) -> Provider:
    """The provider of a device.

    Raises:
        EngineError: this onnxruntime has none; lists those it has.
    """
    known = here(ort)
    if device not in known:
        raise EngineError(f"device: {device!r} came; onnxruntime has {', '.join(known)} here")
    return PROVIDERS[device]


def attach(ort: Any, options: Any, provider: Provider, capture: bool) -> list[Any] | None:
    """Readies session options for a provider; returns the `providers` of the session, None where
    the options say it all.

    Raises:
        EngineError: a plugin finds no device here.
    """
    own = dict(provider.options)
    if capture:
        own[provider.capture] = "1"
    if provider.name == "DmlExecutionProvider":  # refuses sessions that have it on
        options.enable_mem_pattern = False
    if provider.library:
        options.add_provider_for_devices(_plugin_devices(ort, provider), own)
        return None
    rest = [(PROVIDERS[name].name, PROVIDERS[name].options) for name in provider.before_cpu]
    chain: list[Any] = [(provider.name, own), *rest]
    return chain if provider.name == CPU else [*chain, (CPU, {})]


def _plugin_devices(ort: Any, provider: Provider) -> list[Any]:
    """The devices of a plugin, which is registered on first use."""
    plugin = optional(provider.library, "tensorrt-rtx")
    known = [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
    if not known:
        try:
            ort.register_execution_provider_library(provider.name, plugin.get_library_path())
        except Exception as error:  # onnxruntime raises its own classes, all straight off Exception
            reason = str(error).splitlines()[0]
            raise EngineError(
                f"engine onnxruntime: {provider.name} not loaded: {reason}"
            ) from error
        known = [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
    if not known:
        raise EngineError(f"engine onnxruntime: {provider.name} finds no device that it runs on")
    return known[:1]
