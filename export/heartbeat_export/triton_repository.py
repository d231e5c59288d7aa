"""A bundle as a model repository of NVIDIA's Triton Inference Server.

    DIR/README.md             how to start it, and the loop that a client runs
    DIR/client/               what that client reads: manifest, sampler tables, tokenizer
    DIR/models/NAME_GRAPH/    config.pbtxt and 1/model.onnx, one for each graph
    DIR/models/NAME_conditions/   an ensemble: conditions to K, V and local share in one request

The denoising loop is not a graph: an ensemble runs each step once, in one direction. So the client
holds the latents and the sampler's table, and calls NAME_denoise once a step.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from heartbeat_export.errors import ExportError
from heartbeat_fast.bundle import GRAPHS, Bundle, GraphSpec, TensorSpec

ENCODERS = ("text", "image", "local", "context")
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}


def write_repository(
    bundle: Bundle, out: Path, *, name: str = "", device: str = "cpu"
) -> list[str]:
    """Writes the folder, whole or not at all.

    Args:
        out: must not exist, or be empty.
        name: of the models; by default the bundle's.  device: "cpu" or "gpu".

    Returns the names of the models.

    Raises:
        ExportError: the folder cannot be written, the name is none, or the graphs need plugins.
        BundleError: a file of the bundle is not what its manifest says.
    """
    name = name or bundle.manifest.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ExportError(
            f"name {name!r}: wanted letters, digits, - and _: give another with --name"
        )
    if bundle.manifest.flavour != "standard":
        raise ExportError(f"bundle {bundle.path}: its graphs need plugins: export a standard one")
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out}: not empty: choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-", suffix=".tmp"))
    try:
        models = _fill(bundle, new, name, device)
        new.chmod(0o755)  # mkdtemp's 0700 would keep the server out
        os.replace(new, out)
    except OSError as error:
        raise ExportError(f"{out}: not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return models


def _fill(bundle: Bundle, folder: Path, name: str, device: str) -> list[str]:
    manifest = bundle.manifest
    for graph in GRAPHS:
        spec = manifest.graphs[graph]
        home = folder / "models" / f"{name}_{graph}" / "1"
        home.mkdir(parents=True)
        (home / "model.onnx").write_bytes(bundle.read(spec))  # verified, whatever lies on the disk
        text = graph_config(f"{name}_{graph}", spec, KINDS[device], manifest.fingerprints)
        (home.parent / "config.pbtxt").write_text(text, "utf-8")
    ensemble = f"{name}_conditions"
    (folder / "models" / ensemble / "1").mkdir(parents=True)  # a version, though it holds nothing
    text = ensemble_config(ensemble, name, manifest.graphs)
    (folder / "models" / ensemble / "config.pbtxt").write_text(text, "utf-8")
    client = folder / "client"
    client.mkdir()
    (client / "manifest.json").write_text(manifest.to_json(), "utf-8")
    for key in ("samplers", "tokenizer"):
        (client / manifest.files[key].file).write_bytes(bundle.read(manifest.files[key]))
    (folder / "README.md").write_text(README.format(name=name), "utf-8")
    return [*(f"{name}_{graph}" for graph in GRAPHS), ensemble]


def graph_config(
    model: str, spec: GraphSpec, kind: str, fingerprints: dict[str, str] | None = None
) -> str:
    """The config.pbtxt of one graph: static shapes, so no batching by the server.

    kind: "KIND_CPU" or "KIND_GPU".  fingerprints: go along as parameters, for whoever asks.
    """
    lines = [
        f"name: {_quoted(model)}",
        'backend: "onnxruntime"',
        "max_batch_size: 0",
        *_tensors("input", spec.inputs),
        *_tensors("output", spec.outputs),
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
        "version_policy { specific { versions: [ 1 ] } }",
    ]
    for key, value in sorted((fingerprints or {}).items()):
        pair = f"key: {_quoted(f'heartbeat_{key}')} value {{ string_value: {_quoted(value)} }}"
        lines.append(f"parameters {{ {pair} }}")
    return "\n".join(lines) + "\n"


def ensemble_config(model: str, name: str, graphs: dict[str, GraphSpec]) -> str:
    """The config.pbtxt of the ensemble: every condition in, all that the loop needs out.

    Its tensors have the graphs' own names, which are the same on both ends of each connection.
    """
    inner = {tensor.name for graph in ENCODERS for tensor in graphs[graph].outputs}
    inputs = {t.name: t for g in ENCODERS for t in graphs[g].inputs if t.name not in inner}
    outputs = (*graphs["local"].outputs, *graphs["context"].outputs)
    lines = [
        f"name: {_quoted(model)}",
        'platform: "ensemble"',
        "max_batch_size: 0",
        *_tensors("input", inputs.values()),
        *_tensors("output", outputs),
        "ensemble_scheduling {",
    ]
    for graph in ENCODERS:
        lines += [
            "  step {",
            f"    model_name: {_quoted(f'{name}_{graph}')}",
            "    model_version: 1",
        ]
        for side, tensors in (("input", graphs[graph].inputs), ("output", graphs[graph].outputs)):
            for tensor in tensors:
                same = _quoted(tensor.name)
                lines.append(f"    {side}_map {{ key: {same} value: {same} }}")
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _tensors(side: str, tensors: Iterable[TensorSpec]) -> list[str]:
    return [
        f"{side} [ {{ name: {_quoted(tensor.name)} data_type: {TYPES[tensor.dtype]} "
        f"dims: [ {', '.join(map(str, tensor.shape))} ] }} ]"
        for tensor in tensors
    ]


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


README = """# {name} on NVIDIA Triton Inference Server

Written by `heartbeat-export triton-repository`. Start it so that only this machine reaches it:

    tritonserver --model-repository=models --disable-auto-complete-config \\
        --http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1

By itself tritonserver listens on every address and asks nobody who they are: put something that
does in front of it before you change these. In a container listen on 0.0.0.0 inside, and publish
the ports on the loopback only: `-p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001`, with this folder
mounted read-only.

## A clip

1. Once a clip: one request to `{name}_conditions` with the conditions (zeros where absent,
   `present` says which there are; `client/tokenizer.json` makes the tokens). Back come `local` and
   the K and V of every cross-attention.
2. Once a sampler: `{name}_time` for each of the table's timesteps.
3. Once a step: `{name}_denoise` with the latents `z`, `temb` of the step, and all of 1. The table
   in `client/samplers.json` says how to weigh its outputs into the next `z`. This loop is the
   client's: an ensemble cannot repeat a model. Over a network, register 1 as shared memory or run
   the client on the server's machine, else K and V travel with every step.
4. Once a clip: `{name}_decode` with `z` and the texture noise. Frames in [0, 1].

docs/bundle.md of heartbeat_fast has each of these steps in full, noise included. What comes out is
synthetic and not for diagnosis: say so wherever it goes.
"""
