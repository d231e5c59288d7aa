"""How the graphs of a bundle fit together: which tensors, of which shape, from which graph.

A manifest can be well-formed and still describe graphs that nobody can chain, or tensors that
nobody can hold. Hosts allocate by these shapes, so they are checked before anything is allocated.
Legend: F frames, S = H = W pixels, C channels and h w of one frame's latents, N tokens.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from heartbeat_fast.conditions import NAMES, NUM_LABELS, TOKENS
from heartbeat_fast.errors import BundleError

if TYPE_CHECKING:
    from heartbeat_fast.bundle import GraphSpec, Manifest

DTYPES = ("float32", "int64")
MAX_ELEMENTS = 2**27  # of one tensor, 512 MiB; the base preset's largest has 2**22
# Inputs → outputs. Beside these, context's outputs and denoise's further inputs are the K and V of
# every cross-attention, whatever their names.
CALLS = {
    "text": ("tokens ef present", "text_context"),
    "image": ("image present", "image_context"),
    "local": ("sketch mask skeleton flow present", "local"),
    "context": ("text_context image_context", ""),
    "time": ("t", "temb"),
    "denoise": ("z temb local", "out"),
    "decode": ("z noise", "frames"),
    "encode": ("frames", "z"),
}


def check(manifest: "Manifest") -> None:
    """Holds every graph's signature to the manifest's frames, size and latent, and to the others.

    Raises:
        BundleError: a tensor is missing, unknown, too large, or not what its neighbours say.
    """
    known = _fixed(manifest)
    for name, graph in manifest.graphs.items():
        for side, tensors in (("input", graph.inputs), ("output", graph.outputs)):
            if len({tensor.name for tensor in tensors}) != len(tensors):
                raise BundleError(f"graph {name}: an {side} stands twice")
            for tensor in tensors:
                if tensor.dtype not in DTYPES or not all(0 < n < 2**24 for n in tensor.shape):
                    raise BundleError(f"graph {name}: {tensor} is no static tensor of {DTYPES}")
                if math.prod(tensor.shape) > MAX_ELEMENTS:
                    raise BundleError(f"graph {name}: {tensor} exceeds {MAX_ELEMENTS} elements")
                spec = (tensor.dtype, tensor.shape)
                if known.setdefault(tensor.name, spec) != spec:
                    raise BundleError(
                        f"graph {name}: {side} {tensor.name} is {spec}; wanted {known[tensor.name]}"
                    )
    for name, side, wanted, came in _calls(manifest.graphs):
        if odd := sorted(wanted ^ came):
            state = "unknown" if odd[0] in came else "missing"
            raise BundleError(f"graph {name}: {side} {odd[0]} is {state}")


def _fixed(manifest: "Manifest") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors whose shape follows from the clip's."""
    F, S = manifest.frames, manifest.size
    floats = {
        **{"ef": (1, 1), "present": (1, len(NAMES)), "t": (1,)},
        **{"image": (1, 3, S, S), "sketch": (1, 1, S, S), "mask": (1, F, NUM_LABELS, S, S)},
        **{"skeleton": (1, F, 1, S, S), "flow": (1, F, 2, S, S), "noise": (1, F, 2, S, S)},
        **{"frames": (1, F, 1, S, S)},
        **dict.fromkeys(("z", "out"), (1, F, *manifest.latent)),
    }
    return {"tokens": ("int64", (1, TOKENS)), **{k: ("float32", v) for k, v in floats.items()}}


def _calls(
    graphs: Mapping[str, "GraphSpec"],
) -> Iterator[tuple[str, str, set[str], set[str]]]:
    """Graph, side, the names that must stand there, the names that do."""
    kv = {tensor.name for tensor in graphs["context"].outputs}
    for name, (inputs, outputs) in CALLS.items():
        came = graphs[name]
        extra_in, extra_out = kv if name == "denoise" else set(), kv if name == "context" else set()
        yield name, "input", {*inputs.split()} | extra_in, {t.name for t in came.inputs}
        yield name, "output", {*outputs.split()} | extra_out, {t.name for t in came.outputs}
