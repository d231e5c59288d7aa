"""A trained model to a bundle: graphs, tables, tokenizer, card, and the parity gate."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from heartbeat_export import fingerprints, parity, weight_map
from heartbeat_export.sampler_tables import build_tables
from heartbeat_export.to_onnx import PLAIN, ExportError, Recipe, signature, to_onnx
from heartbeat_fast.bundle import (
    SCHEMA_VERSION,
    Bundle,
    FileSpec,
    GraphSpec,
    Manifest,
    describe,
    replacing,
)
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.graphs import Tensors, build_graphs, example_inputs, round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.sampler import dump_tables
from heartbeat_fast.text import Tokenizer

Say = Callable[[str], None]
CARD = """# {name}

A `heartbeat_fast` bundle of the `{preset}` preset: {frames} frames of {size} × {size} pixels.
Generates synthetic echocardiography. Not for diagnosis. Licence: {licence}.
"""


def build_bundle(
    model: HeartBeat,
    tokenizer: Tokenizer,
    out: Path,
    *,
    name: str = "",
    revision: str = "unknown",
    licence: str = "Apache-2.0",
    provenance: dict[str, Any] | None = None,
    card: str = "",
    recipe: Recipe = PLAIN,
    say: Say = lambda line: None,
) -> Manifest:
    """Writes a bundle folder, whole and past the parity gate, or not at all.

    Args:
        model: its large weights are rounded in place to half, as the bundle stores them.
        name: the bundle's, by default the preset's.
        revision: of the source, e.g. `git describe`.
        provenance: data, training recipe, figures; JSON values.
        card: text of README.md; a short one is written where none is given.
        recipe: precision, opset and flavour of the graphs.
        say: called with one line a step.

    Raises:
        ExportError: a graph could not be exported, or differs from torch.
        BundleError: the folder cannot be written, or holds something else.
    """
    round_to_half(model)
    inputs = example_inputs(model)
    with replacing(out) as folder:
        graphs, arch = _write_graphs(model, inputs, folder, recipe, say)
        config = model.config
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name or config.name,
            preset=config.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            revision=revision,
            licence=licence,
            frames=config.frames,
            size=config.size,
            latent=(config.denoiser.latent_channels, config.latent, config.latent),
            prediction=config.prediction,
            shared_start=config.shared_start,
            graphs=graphs,
            files={},
            fingerprints={"arch": arch, "weights": weights_of(model)},
            parity={},
            provenance=provenance or {},
            precision=recipe.precision,
            flavour=recipe.flavour,
            opset=recipe.opset,
        )
        manifest.files.update(_write_files(manifest, model, tokenizer, folder, card))
        _write_manifest(manifest, folder)
        say("parity against torch")
        manifest.parity.update(_measure(model, inputs, folder))
        _write_manifest(manifest, folder)
    return manifest


def weights_of(model: HeartBeat) -> str:
    """The weights fingerprint of a model as it stands."""
    return fingerprints.weights({k: v.cpu().numpy() for k, v in model.state_dict().items()})


def _write_graphs(
    model: HeartBeat, inputs: dict[str, Tensors], folder: Path, recipe: Recipe, say: Say
) -> tuple[dict[str, GraphSpec], str]:
    """Every graph's file and manifest entry, the weights' map, the architecture fingerprint.

    One graph is in memory at a time: those of `base` hold 2.3 GB.
    """
    specs: dict[str, GraphSpec] = {}
    maps: dict[str, weight_map.GraphMap] = {}
    normal: dict[str, Any] = {}
    state = model.state_dict()
    for name, part in build_graphs(model).items():
        say(f"graph {name}")
        proto = to_onnx(part, inputs[name], **vars(recipe))
        path = folder / f"{name}.onnx"
        path.write_bytes(proto.SerializeToString())
        ends = signature(list(proto.graph.input)), signature(list(proto.graph.output))
        specs[name] = GraphSpec(**vars(describe(path)), inputs=ends[0], outputs=ends[1])
        maps[name] = weight_map.of_graph(name, proto, state)
        normal[name] = fingerprints.normalised(proto)
    weights = json.dumps(weight_map.whole(maps, model))
    (folder / "weights_map.json").write_text(weights, "utf-8")
    return specs, fingerprints.arch_of(normal)


def _write_files(
    manifest: Manifest, model: HeartBeat, tokenizer: Tokenizer, folder: Path, card: str
) -> dict[str, FileSpec]:
    config = model.config
    if tokenizer.vocab_size > config.text.vocab:
        raise ExportError(
            f"tokenizer: {tokenizer.vocab_size} ids came; the text encoder has {config.text.vocab}"
        )
    tokenizer.save(folder / "tokenizer.json")
    tables = build_tables(
        config.prediction,
        config.few_steps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.schedule,
        num_train_timesteps=config.steps,
    )
    (folder / "samplers.json").write_text(dump_tables(tables), "utf-8")
    (folder / "config.json").write_bytes(fingerprints.configuration(config))
    (folder / "README.md").write_text(card or CARD.format(**vars(manifest)), "utf-8")
    names = {"samplers": "samplers.json", "tokenizer": "tokenizer.json", "card": "README.md"}
    names |= {"config": "config.json", "weights_map": "weights_map.json"}
    return {key: describe(folder / file) for key, file in names.items()}


def _measure(model: HeartBeat, inputs: dict[str, Tensors], folder: Path) -> dict[str, Any]:
    """Parity of the written bundle; raises ExportError where it fails the gate."""
    bundle = Bundle.open(folder)
    engine = parity.engine_for(bundle, model)
    reference = TorchEngine(model, bundle)
    errors = parity.graph_errors(engine, reference, inputs)
    decibels = parity.clip_psnr(Generator(bundle, engine), Generator(bundle, reference))
    parity.gate(errors, decibels, bundle.manifest.precision)
    return {
        "engine": engine.name,
        "reference": f"torch {torch.__version__}",
        "relative_l2": {graph: float(f"{error:.3e}") for graph, error in errors.items()},
        "clip_psnr_db": round(decibels, 2),
    }


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / "manifest.json").write_text(manifest.to_json(), "utf-8")


def load_folder(folder: Path) -> tuple[HeartBeat, Tokenizer, dict[str, Any], str]:
    """A model folder: model, tokenizer, provenance.json ({} if none) and README.md ("" if none).

    Raises:
        HeartBeatError: the folder is no HeartBeat model, or lacks a tokenizer.
    """
    model = HeartBeat.from_pretrained(folder)
    homes = [folder / "tokenizer.json", folder / "tokenizer" / "tokenizer.json"]
    found = next((path for path in homes if path.is_file()), None)
    clip = (folder / "tokenizer" / "vocab.json").is_file()
    if found is None and not clip:
        raise ExportError(f"{folder}: no tokenizer.json, and no tokenizer/vocab.json: add one")
    tokenizer = Tokenizer.open(found) if found else Tokenizer.from_clip_folder(folder / "tokenizer")
    recipe, card = folder / "provenance.json", folder / "README.md"
    try:
        provenance = json.loads(recipe.read_text("utf-8")) if recipe.is_file() else {}
        return model, tokenizer, provenance, card.read_text("utf-8") if card.is_file() else ""
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder}: provenance.json or README.md unreadable ({error})") from error
