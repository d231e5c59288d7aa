"""New weights into a bundle that is in use: decide, write beside, compare with torch, switch.

The bundle's folder holds a whole version at every moment (store.py); what runs from it takes the
new one up between two clips (heartbeat_fast/reload.py).
"""

import datetime
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from heartbeat_export import fingerprints, parity, quick_gate, store, weight_map
from heartbeat_export.build import build_bundle
from heartbeat_export.decide import Checkpoint, Decision, Road, decide, recipe_of
from heartbeat_export.errors import ExportError
from heartbeat_export.local_engines import Follower
from heartbeat_export.onnx_bytes import Bytes
from heartbeat_export.rebuild_report import Report as Report
from heartbeat_export.to_onnx import Recipe, to_onnx
from heartbeat_fast.bundle import Bundle, FileSpec, Manifest
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.models.graphs import build_graphs, example_inputs, round_to_half

Say = Callable[[str], None]
NAMES = {"samplers": "samplers.json", "tokenizer": "tokenizer.json", "card": "README.md"}


def rebuild(
    folder: Path,
    checkpoint: Path,
    *,
    recipe: Recipe | None = None,
    dry_run: bool = False,
    wait: bool = True,
    warm: bool = False,
    revision: str = "unknown",
    say: Say = lambda line: None,
) -> Report:
    """Brings a bundle to a checkpoint by the cheapest road that is right.

    Args:
        folder: of the bundle.  checkpoint: a HeartBeat model folder.
        recipe: precision, opset and flavour; by default the bundle's own.
        dry_run: decide only; nothing is written, not even the lock.
        wait: for another rebuild of the same bundle; else refuse.
        warm: engines that were compiled here for the old weights are for the new ones, before the
            switch, where no refit does it; else when they are next opened.
        revision: of the source, for the manifest.  say: called with one line a step.

    Raises:
        HeartBeatError: no bundle, no checkpoint, a busy or unwritable folder, or parity missed even
            by a full export. The bundle is then as it was.
    """
    report = Report(str(folder), dry_run=dry_run)
    with report.stage("all"):
        Bundle.open(folder)  # before the checkpoint is read: a wrong path shows at once
        with report.stage("load"):
            opened = Checkpoint.open(checkpoint)
        if dry_run:
            bundle = Bundle.open(folder)
            decision = _decide(bundle, opened, recipe, report)
            report.tell(Follower(bundle, decision, opened.model, EngineCache(), warm).foresee())
            return report
        with ExitStack() as held:
            with report.stage("lock"):
                held.enter_context(store.locked(folder, wait))
            bundle = Bundle.open(folder)
            store.sweep(bundle)
            decision = _decide(bundle, opened, recipe, report)
            for reason in decision.reasons:
                say(reason)
            say(f"road: {decision.road}")
            follower = Follower(bundle, decision, opened.model, EngineCache(), warm)
            wanted = recipe or recipe_of(bundle)
            _Work(bundle, opened, wanted, revision, report, say, follower).run(decision)
    return report


def _decide(
    bundle: Bundle, checkpoint: Checkpoint, recipe: Recipe | None, report: Report
) -> Decision:
    with report.stage("decide"):
        decision = decide(bundle, checkpoint, recipe)
    report.road, report.reasons = decision.road.value, decision.reasons
    report.changed = decision.changed
    report.before = report.after = bundle.manifest.fingerprints.get("weights", "")
    return decision


@dataclass
class _Work:
    """One rebuild under the lock."""

    bundle: Bundle
    checkpoint: Checkpoint
    recipe: Recipe
    revision: str
    report: Report
    say: Say
    follower: Follower

    def run(self, decision: Decision) -> None:
        """Takes the decision's road; a gate that fails leads to a full export."""
        if decision.road is Road.NOTHING:
            return
        if decision.road is not Road.FULL:
            try:
                manifest = self._patched(decision)
            except ExportError as error:
                if decision.road is Road.FILES:
                    raise
                decision.take(Road.FULL, f"{decision.road} is not enough: {error}")
                self.report.road = decision.road.value
                self.say(decision.reasons[-1])
        if decision.road is Road.FULL:
            manifest = self._full()
        with self.report.stage("engines"):
            self.report.tell(self.follower.follow(Bundle(self.bundle.path, manifest)))
        with self.report.stage("switch"):
            after = store.commit(self.bundle, manifest)
        self.report.after = manifest.fingerprints["weights"]
        self.report.parity = manifest.parity
        engine = parity.engine_for(after, self.checkpoint.model)
        self.report.build = fingerprints.build(after.manifest, engine)
        known = {spec.file for spec in store.specs(self.bundle.manifest)}
        self.report.written = sum(
            spec.bytes for spec in store.specs(manifest) if spec.file not in known
        )

    def _patched(self, decision: Decision) -> Manifest:
        """The manifest of new weights and files, written beside the old and past the gate."""
        old, model = self.bundle.manifest, self.checkpoint.model
        if self.checkpoint.tokenizer.vocab_size > model.config.text.vocab:
            raise ExportError(
                f"tokenizer: {self.checkpoint.tokenizer.vocab_size} ids came; the text encoder "
                f"has {model.config.text.vocab}"
            )
        files, prints = dict(decision.files), dict(old.fingerprints)
        if decision.retrace:
            with self.report.stage("trace"):
                protos = self._traced(decision)
            for name in decision.retrace:
                whole = protos[name].SerializeToString()
                decision.graphs[name] = [np.frombuffer(whole, np.uint8)]
            files["weights_map"] = json.dumps(weight_map.build(protos, model)).encode()
            prints["arch"] = fingerprints.arch(protos)
        changed = set(decision.graphs)
        with self.report.stage("write"):
            written = self._put({f"{name}.onnx": c for name, c in decision.graphs.items()})
            extra = self._put({NAMES.get(key, f"{key}.json"): c for key, c in files.items()})
        decision.graphs.clear()
        with self.report.stage("fingerprint"):
            prints["weights"] = fingerprints.of_model(model)
        entries = {
            name: store.named(spec, written[f"{name}.onnx"]) if name in changed else spec
            for name, spec in old.graphs.items()
        }
        manifest = self._manifest(old, prints, entries, files, extra)
        if changed:
            with self.report.stage("gate"):
                manifest = replace(manifest, parity=self._gate(manifest, changed))
        return manifest

    def _manifest(
        self,
        old: Manifest,
        prints: dict[str, str],
        entries: dict[str, Any],
        files: Mapping[str, bytes],
        extra: dict[str, FileSpec],
    ) -> Manifest:
        config = self.checkpoint.model.config
        return replace(
            old,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            revision=self.revision,
            prediction=config.prediction,
            shared_start=config.shared_start,
            graphs=entries,
            files={**old.files, **{k: extra[NAMES.get(k, f"{k}.json")] for k in files}},
            fingerprints=prints,
            provenance=self.checkpoint.provenance,
        )

    def _put(self, contents: Mapping[str, bytes | Iterable[Bytes]]) -> dict[str, FileSpec]:
        known = store.kept(self.bundle)
        return {
            name: store.put(self.bundle.path, name, content, known)
            for name, content in contents.items()
        }

    def _traced(self, decision: Decision) -> dict[str, onnx.ModelProto]:
        """All graphs with the new weights; only those that must be are traced anew."""
        model = round_to_half(self.checkpoint.model)
        inputs, parts, protos = example_inputs(model), build_graphs(model), {}
        for name, spec in self.bundle.manifest.graphs.items():
            if name in decision.retrace:
                self.say(f"graph {name}: traced anew")
                protos[name] = to_onnx(parts[name], inputs[name], **vars(self.recipe))
            else:
                pieces = decision.graphs.get(name) or [store.mapped(self.bundle, spec)]
                protos[name] = onnx.load_from_string(b"".join(map(bytes, pieces)))
        return protos

    def _gate(self, manifest: Manifest, changed: set[str]) -> dict[str, Any]:
        """The new parity record; raises ExportError where the gate fails."""
        staged = Bundle(self.bundle.path, manifest)
        engine = parity.engine_for(staged, self.checkpoint.model)
        found = quick_gate.measure(staged, engine, self.checkpoint.model, changed)
        parity.gate(found, None, manifest.precision)
        errors = {name: float(f"{error:.3e}") for name, error in found.items()}
        return {  # and no clip_psnr_db: the old one was of other weights
            "engine": engine.name,
            "reference": f"torch {torch.__version__}",
            "relative_l2": {**manifest.parity.get("relative_l2", {}), **errors},
        }

    def _full(self) -> Manifest:
        """An export of everything into the bundle's folder; build_bundle has the gate."""
        old, folder = self.bundle.manifest, self.bundle.path
        with (
            self.report.stage("export"),
            tempfile.TemporaryDirectory(dir=folder, prefix=".full-", suffix=".tmp") as scratch,
        ):
            fresh = Path(scratch) / "bundle"
            manifest = build_bundle(
                self.checkpoint.model,
                self.checkpoint.tokenizer,
                fresh,
                name=old.name,
                revision=self.revision,
                licence=old.licence,
                recipe=self.recipe,
                provenance=self.checkpoint.provenance,
                card=self.checkpoint.card,
                say=self.say,
            )
            with self.report.stage("write"):
                put = self._put(
                    {s.file: (fresh / s.file).read_bytes() for s in store.specs(manifest)}
                )
        return replace(
            manifest,
            graphs={name: store.named(s, put[s.file]) for name, s in manifest.graphs.items()},
            files={key: put[s.file] for key, s in manifest.files.items()},
        )
