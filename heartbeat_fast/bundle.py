"""The deployable folder: what is in it, that it is whole, and writing it in one move.

    manifest.json   this file's schema: graphs, signatures, hashes, fingerprints, provenance
    *.onnx          one graph each, static shapes, weights inside (no external data)
    samplers.json   sampler tables (sampler.py);  tokenizer.json;  README.md, the model card

Nothing in a bundle is trusted: names are confined to the folder, sizes are compared before a byte
is read, and bytes are hashed before they are used.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from heartbeat_fast import onnx_check, signatures
from heartbeat_fast.errors import BundleError
from heartbeat_fast.onnx_check import OnnxError
from heartbeat_fast.sampler import SamplerTable, load_tables
from heartbeat_fast.untrusted import JsonError, parse, regular

SCHEMA_VERSION = 1
GRAPHS = ("text", "image", "local", "context", "time", "denoise", "decode", "encode")
EMBEDDED = Path(__file__).parent / "bundles" / "tiny"
MAX_BYTES = 2**31 - 1  # a protobuf cannot be longer
MAX_MANIFEST = 4 * 2**20
DTYPES = signatures.DTYPES
AGAIN = "copy or export the bundle again"
CHOICES = {"precision": ("fp32", "fp16", "bf16"), "flavour": ("standard", "plugin")}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: name, numpy dtype, static shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileSpec:
    """One file of the bundle: its name (no folders), SHA-256 in hex, length."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class GraphSpec(FileSpec):
    """One graph: its file and signature."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    Args:
        preset: the model configuration's name.
        created: UTC, ISO 8601.  revision: the source's git revision.
        frames, size: of a clip: F, and H = W in pixels.  latent: (C, h, w) of one frame.
        prediction: "v_prediction" or "epsilon".
        shared_start: share of the initial noise's power that all frames have in common, 0 to 1.
        graphs: every name of GRAPHS.  files: samplers, tokenizer and card.
        fingerprints: arch (graphs without weights), weights (Merkle root of the tensors).
        parity: relative L2 error per graph and clip PSNR in dB, against torch.
        provenance: data, training recipe, figures: whatever the model's folder says of itself.
        precision: what the graphs compute in: fp32, fp16 or bf16.  opset: ONNX's.
        flavour: "standard", or "plugin": with nodes of the domain hb, which need our plugins.
    """

    schema_version: int
    name: str
    preset: str
    created: str
    revision: str
    licence: str
    frames: int
    size: int
    latent: tuple[int, ...]
    prediction: str
    shared_start: float
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]
    fingerprints: dict[str, str]
    parity: dict[str, Any]
    provenance: dict[str, Any]
    precision: str = "fp32"
    flavour: str = "standard"
    opset: int = 21

    def identity(self) -> dict[str, Any]:
        """What a result says of the bundle it is of."""
        names = ("name", "preset", "revision", "precision", "fingerprints", "parity")
        hashes = {name: graph.sha256 for name, graph in self.graphs.items()}
        return {name: getattr(self, name) for name in names} | {"graphs_sha256": hashes}

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and a manifest that holds together."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path | None = None) -> "Bundle":
        """Opens a bundle folder; None is the embedded default, a bare name that is no folder here
        an embedded one ("tiny", "tiny-fast").

        Raises:
            BundleError: no bundle there, or a manifest that does not hold together.
        """
        folder = EMBEDDED if path is None else Path(path)
        if isinstance(path, str) and _FILE_NAME.fullmatch(path) and not folder.exists():
            embedded = EMBEDDED.parent / path
            folder = embedded if (embedded / "manifest.json").is_file() else folder
        try:
            content = regular(folder / "manifest.json", MAX_MANIFEST)
        except OSError as error:
            raise BundleError(
                f"bundle {folder}: no readable manifest.json ({error.strerror}): "
                "give a folder that heartbeat-export wrote"
            ) from error
        try:
            return cls(folder, _manifest(parse(content, MAX_MANIFEST)))
        except (BundleError, JsonError) as error:
            raise BundleError(f"bundle {folder}: manifest.json: {error}") from error

    def read(self, spec: FileSpec) -> bytes:
        """A file's bytes, exactly those the manifest was written for.

        Raises:
            BundleError: missing, truncated, altered, or an ONNX file that points outside itself.
        """
        try:
            content = regular(self.path / spec.file, spec.bytes)
        except OSError as error:
            raise self.unreadable(spec, error) from error
        except MemoryError as error:
            raise BundleError(
                f"bundle {self.path}: {spec.file} has {spec.bytes} bytes, more than fit in memory"
            ) from error
        self.check(spec, content)
        return content

    def unreadable(self, spec: FileSpec, error: OSError) -> BundleError:
        """What to raise where a file cannot be read."""
        return BundleError(
            f"bundle {self.path}: {spec.file} is missing or unreadable ({error.strerror}): {AGAIN}"
        )

    def check(self, spec: FileSpec, content: Any) -> None:
        """Holds a file's content (bytes, or a map of them) to the manifest; errors as `read`."""
        if (size := len(content)) != spec.bytes:
            state = "truncated" if size < spec.bytes else "altered"
            raise BundleError(
                f"bundle {self.path}: {spec.file} is {state} "
                f"({size} bytes, manifest says {spec.bytes}): {AGAIN}"
            )
        if hashlib.sha256(content).hexdigest() != spec.sha256:
            raise BundleError(f"bundle {self.path}: {spec.file} is altered (SHA-256): {AGAIN}")
        if isinstance(spec, GraphSpec):
            try:
                onnx_check.hold(content, spec.inputs, spec.outputs)
            except OnnxError as error:
                raise BundleError(f"bundle {self.path}: {spec.file}: {error}") from error

    def verify(self) -> None:
        """Reads and hashes every file.

        Raises:
            BundleError: names the first file that is not what the manifest says.
        """
        for spec in (*self.manifest.graphs.values(), *self.manifest.files.values()):
            self.read(spec)

    def samplers(self) -> dict[tuple[str, int], SamplerTable]:
        """The sampler tables by (name, steps)."""
        return load_tables(self.read(self.manifest.files["samplers"]))


_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _manifest(data: Any) -> Manifest:
    if isinstance(data, dict) and data.get("schema_version") != SCHEMA_VERSION:
        came = data.get("schema_version")
        raise BundleError(f"schema_version {came} came; this release reads {SCHEMA_VERSION}")
    manifest: Manifest = _parse(Manifest, data, "manifest")
    if lacking := [name for name in GRAPHS if name not in manifest.graphs]:
        raise BundleError(f"graphs: {', '.join(lacking)} missing; wanted {', '.join(GRAPHS)}")
    if lacking := [name for name in ("samplers", "tokenizer") if name not in manifest.files]:
        raise BundleError(f"files: {', '.join(lacking)} missing")
    if not 0 <= manifest.shared_start <= 1:
        raise BundleError(f"shared_start: {manifest.shared_start} came; wanted 0 to 1")
    for name, choices in CHOICES.items():
        if (came := getattr(manifest, name)) not in choices:
            raise BundleError(f"{name}: {came!r} came; wanted {', '.join(choices)}")
    for spec in (*manifest.graphs.values(), *manifest.files.values()):
        if not _FILE_NAME.fullmatch(spec.file):
            raise BundleError(f"file name {spec.file!r} leaves the folder: refused")
        if not 0 < spec.bytes <= MAX_BYTES:
            raise BundleError(f"{spec.file}: {spec.bytes} bytes; wanted 1 to {MAX_BYTES}")
    signatures.check(manifest)
    return manifest


def _parse(kind: Any, value: Any, where: str) -> Any:
    """JSON into the dataclasses above, refusing whatever has another type.

    Raises:
        BundleError: names the field, what came, what is wanted.
    """
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is None and kind in (int, str) and type(value) is kind:
        return value
    if kind is float and type(value) in (int, float):
        return float(value)
    if hasattr(kind, "__dataclass_fields__") and isinstance(value, dict):
        hints, names = get_type_hints(kind), {f.name for f in fields(kind)}
        optional = {f.name for f in fields(kind) if f.default is not MISSING}
        if odd := sorted((names ^ value.keys()) - (optional - value.keys())):
            state = "unknown" if odd[0] in value else "missing"
            raise BundleError(f"{where}.{odd[0]} is {state}")
        return kind(
            **{key: _parse(hints[key], item, f"{where}.{key}") for key, item in value.items()}
        )
    wanted = getattr(kind, "__name__", str(kind))
    raise BundleError(f"{where}: {str(value)[:40]!r} came; wanted {wanted}")


def describe(path: Path) -> FileSpec:
    """The manifest's entry of a written file."""
    return FileSpec(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, that takes `folder`'s place when the block ends without error.

    Until then, and after any error, `folder` is as it was. An existing folder is replaced only when
    it is a bundle or empty.

    Raises:
        BundleError: the folder holds something else, or cannot be written.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise BundleError(f"{folder} is not a bundle, so it is not overwritten: choose another")
    new = old = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".tmp"))
        yield new
        new.chmod(0o755)  # mkdtemp's 0700 would keep a shared bundle private
        for path in (*new.iterdir(), new):
            _sync(path)
        if folder.exists():
            old = new.with_name(new.name + ".old")
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        if old is not None and not folder.exists():
            old.rename(folder)
        raise BundleError(f"{folder}: not written ({error.strerror or error})") from error
    finally:
        for leftover in (new, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
