"""What a new checkpoint costs a bundle: nothing, a few files, new weights, new graphs, or it all.

Decided from what is really there, never from names or dates: new weights are put into the bundle's
graphs through its weights map, and what differs in bytes has changed. What the map cannot see
(heads of an attention, another schedule) is compared by the model's configuration, and behind all
of it stands the parity gate against torch (quick_gate.py).
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from heartbeat_export import fingerprints, store, weight_map
from heartbeat_export.build import load_folder
from heartbeat_export.errors import ExportError
from heartbeat_export.onnx_bytes import Bytes, Outline, outline, patched
from heartbeat_export.sampler_tables import build_tables, few_step_table, probe, scheduler
from heartbeat_export.to_onnx import Recipe
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.machine import threads
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.config import HeartBeatConfig
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.sampler import SamplerTable, dump_tables
from heartbeat_fast.text import Tokenizer

# Of the configuration: what a graph does not know. All else is architecture.
NOT_IN_GRAPHS = (
    *("name", "pretrained", "shared_noise", "shared_start", "prediction"),
    *("beta_start", "beta_end", "schedule", "steps", "few_steps"),
)
PROBE = ("ddim", 4)
SHOWN = 6  # names in a reason; all of them are in Decision.changed


class Road(StrEnum):
    """From nothing to everything, in order of cost."""

    NOTHING = "nothing"  # the bundle is this checkpoint's already
    FILES = "files"  # tables, tokenizer, card or manifest alone
    SWAP = "swap"  # new weights into the graphs that are there
    REBUILD = "rebuild"  # some graphs are traced anew: constants were computed from weights
    FULL = "full"  # an export of everything


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, read."""

    model: HeartBeat
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    card: str

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads a model folder.

        Raises:
            HeartBeatError: it is no HeartBeat model, or lacks a tokenizer.
        """
        return cls(*load_folder(folder))


@dataclass
class Decision:
    """A road and why.

    Args:
        reasons: one sentence each.
        changed: tensors that differ, by graph; initializers' names where no tensor is known.
        graphs: on the roads swap and rebuild, the files of the graphs that change, in pieces.
        files: new contents by the manifest's key.
    """

    road: Road = Road.NOTHING
    reasons: list[str] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)
    graphs: dict[str, list[Bytes]] = field(default_factory=dict)
    retrace: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def take(self, road: Road, reason: str) -> None:
        """Adds a reason; the dearest road that any reason asks for is the one taken."""
        order = list(Road)
        self.road = max(self.road, road, key=order.index)
        self.reasons.append(reason)


def recipe_of(bundle: Bundle) -> Recipe:
    """Precision, opset and flavour that the bundle was exported with."""
    return Recipe(**{f.name: getattr(bundle.manifest, f.name) for f in fields(Recipe)})


def decide(bundle: Bundle, checkpoint: Checkpoint, recipe: Recipe | None = None) -> Decision:
    """Compares a bundle with a checkpoint, and its recipe with the one wanted (None: its own).

    Nothing is written.
    """
    decision = Decision()
    try:
        contents = store.whole(bundle)
    except HeartBeatError as error:
        decision.take(Road.FULL, f"the bundle is not whole: {error}")
        return decision
    _compare_architecture(bundle, checkpoint.model, decision)
    _compare_recipe(bundle, recipe or recipe_of(bundle), decision)
    if decision.road is not Road.FULL:
        _compare_weights(bundle, contents, checkpoint.model, decision)
    if decision.road is not Road.FULL:
        _compare_files(bundle, checkpoint, decision)
    if decision.road is Road.NOTHING:
        decision.reasons.append("weights, tables, tokenizer, card and provenance are the bundle's")
    return decision


def _compare_architecture(bundle: Bundle, model: HeartBeat, decision: Decision) -> None:
    """The configuration; what the graphs do not know of it is left out."""
    if "config" not in bundle.manifest.files:
        decision.take(Road.FULL, "the bundle has no configuration: an older release exported it")
        return
    was = _flat(json.loads(bundle.read(bundle.manifest.files["config"])))
    now = _flat(json.loads(fingerprints.configuration(model.config)))
    for key in sorted(was.keys() | now.keys()):
        old, new = was.get(key, "nothing"), now.get(key, "nothing")
        if old != new and key not in NOT_IN_GRAPHS:
            decision.take(Road.FULL, f"architecture: {key} was {old}, is {new}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as {"denoiser.heads": "[2, 4]"}."""
    out: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = json.dumps(value)
    return out


def _compare_recipe(bundle: Bundle, recipe: Recipe, decision: Decision) -> None:
    """Precision, opset and flavour are in the graphs: other ones mean other graphs."""
    for name, has in vars(recipe_of(bundle)).items():
        if (wanted := getattr(recipe, name)) != has:
            decision.take(Road.FULL, f"{name}: the bundle's is {has}, wanted {wanted}")


def _compare_weights(
    bundle: Bundle, contents: Mapping[str, Bytes], model: HeartBeat, decision: Decision
) -> None:
    """Compares what the new weights would put into the bundle's graphs with what is there."""
    manifest, state = bundle.manifest, model.state_dict()
    if "weights_map" not in manifest.files:
        decision.take(Road.FULL, "the bundle has no weights map: an older release exported it")
        return
    content = json.loads(contents[manifest.files["weights_map"].file].tobytes())
    if content.get("schema_version") != weight_map.SCHEMA_VERSION:
        decision.take(Road.FULL, "the weights map is of another release's schema")
        return
    mapped = {e["tensor"] for entries in content["graphs"].values() for e in entries.values()}
    loose = [k for k, t in state.items() if t.is_floating_point() and k not in mapped]
    for name, spec in manifest.graphs.items():
        file, entries = contents[spec.file], content["graphs"].get(name, {})
        found = outline(file)
        try:
            changed = _changed(file, found, entries, state)
        except ExportError as error:
            decision.take(Road.FULL, f"graph {name}: {error}")
            return
        if changed:
            decision.graphs[name] = patched(file, found.initializers, changed)
            tensors = list(dict.fromkeys(entries[key]["tensor"] for key in changed))
            decision.changed[name] = tensors
            decision.take(Road.SWAP, f"graph {name}: new weights in {_listed(tensors)}")
        if computed := _computed(found, entries, bool(loose)):
            decision.retrace.append(name)
            why = f"{_listed(loose or computed)} cannot be put in by name"
            decision.take(Road.REBUILD, f"graph {name}: {why}, so it is traced anew")
    if not decision.graphs and decision.retrace and _same_weights(bundle, model):
        decision.retrace.clear()
        decision.reasons.clear()
        decision.road = Road.NOTHING


def _changed(
    file: Bytes, found: Outline, entries: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Bytes]:
    """New contents of a graph's initializers, where they differ, in the file's order.

    Raises:
        ExportError: the map is not the graph's, or a tensor is missing, mis-shaped or too large.
    """
    if lacking := [name for name in entries if name not in found.initializers]:
        raise ExportError(f"weights map: the graph has no initializer {lacking[0]}: export it anew")

    def compared(name: str) -> Bytes | None:
        span = found.initializers[name]
        return weight_map.difference(file, span, name, entries[name], state)

    names = [name for name in found.initializers if name in entries]
    with ThreadPoolExecutor(threads()) as pool:
        new = dict(zip(names, pool.map(compared, names), strict=True))
    return {name: content for name, content in new.items() if content is not None}


def _computed(found: Outline, entries: Mapping[str, Any], loose: bool) -> list[str]:
    """Constants of a graph that were computed from weights: scales of quantised ones, and, where
    some of the model's tensors are in no graph (loose), every float constant."""
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return [
        name
        for name, span in found.initializers.items()
        if name not in entries and (name in found.quantised or (loose and span.dtype in floats))
    ]


def _same_weights(bundle: Bundle, model: HeartBeat) -> bool:
    return fingerprints.of_model(model) == bundle.manifest.fingerprints.get("weights")


def _compare_files(bundle: Bundle, checkpoint: Checkpoint, decision: Decision) -> None:
    """Tables, tokenizer, card and what the manifest says of the model."""
    config, manifest = checkpoint.model.config, bundle.manifest
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        checkpoint.tokenizer.save(path)
        wanted = {"tokenizer": path.read_bytes()}
    if not _same_schedule(bundle, config):
        wanted["samplers"] = dump_tables(_tables(config)).encode()
    if checkpoint.card:
        wanted["card"] = checkpoint.card.encode()
    wanted["config"] = fingerprints.configuration(config)
    for key, content in wanted.items():
        if key not in manifest.files or bundle.read(manifest.files[key]) != content:
            decision.files[key] = content
            decision.take(Road.FILES, f"{key}: differs from the bundle's")
    for key in ("prediction", "shared_start"):
        was, now = getattr(manifest, key), getattr(config, key)
        if was != now:
            decision.take(Road.FILES, f"{key}: was {was}, is {now}")
    if checkpoint.provenance != manifest.provenance:
        decision.take(Road.FILES, "provenance: differs from the bundle's")


def _schedule(config: HeartBeatConfig) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of build_tables."""
    return (config.prediction, config.few_steps), {
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.schedule,
        "num_train_timesteps": config.steps,
    }


def _tables(config: HeartBeatConfig) -> list[SamplerTable]:
    arguments, schedule = _schedule(config)
    return build_tables(*arguments, **schedule)


def _same_schedule(bundle: Bundle, config: HeartBeatConfig) -> bool:
    """One table tells: all of them (a second to make) come of the same schedule."""
    (prediction, few_steps), schedule = _schedule(config)
    if few_steps:
        wanted = [few_step_table(steps, prediction, **schedule) for steps in few_steps]
    else:
        wanted = [probe(PROBE[0], scheduler(PROBE[0], prediction, **schedule), PROBE[1])]
    tables = bundle.samplers()
    here = [tables.get((table.name, table.steps)) for table in wanted]
    return all(
        was is not None
        and was.prediction == now.prediction
        and was.timesteps == now.timesteps
        and all(np.allclose(a, b) for a, b in zip(was.weights, now.weights, strict=True))
        for was, now in zip(here, wanted, strict=True)
    )


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
