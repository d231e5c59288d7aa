"""Bundles: what is broken is named, nothing leaves the folder, nothing is half-written."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from heartbeat_export.to_onnx import signature
from heartbeat_fast import bundle as module
from heartbeat_fast.bundle import GRAPHS, SCHEMA_VERSION, Bundle, describe, replacing
from heartbeat_fast.errors import BundleError
from heartbeat_fast.signatures import CALLS

KV = ("kv_text_k", "kv_text_v")
SHAPES: dict[str, tuple[int, ...]] = {
    **{"ef": (1, 1), "present": (1, 7), "t": (1,), "image": (1, 3, 64, 64)},
    **{"sketch": (1, 1, 64, 64), "mask": (1, 4, 4, 64, 64), "skeleton": (1, 4, 1, 64, 64)},
    **{"flow": (1, 4, 2, 64, 64), "noise": (1, 4, 2, 64, 64), "frames": (1, 4, 1, 64, 64)},
    **dict.fromkeys(("z", "out"), (1, 4, 4, 8, 8)),
    "tokens": (1, 77),
}


def values(names: str) -> list[onnx.ValueInfoProto]:
    return [
        onnx.helper.make_tensor_value_info(
            name, 7 if name == "tokens" else 1, SHAPES.get(name, (1, 2))
        )
        for name in names.split()
    ]


def write_graph(path: Path) -> dict[str, Any]:
    """A graph without nodes but with the signature that its name asks for; its manifest entry."""
    inputs, outputs = CALLS[path.stem]
    ends = [inputs + " ".join(("", *KV)) * (path.stem == "denoise"), outputs or " ".join(KV)]
    graph = onnx.helper.make_graph([], path.stem, values(ends[0]), values(ends[1]))
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    said = {
        side: [vars(tensor) for tensor in signature(list(end))]
        for side, end in (("inputs", graph.input), ("outputs", graph.output))
    }
    return {**vars(describe(path)), **said}


def write_bundle(folder: Path, **changes: Any) -> Path:
    """A bundle of dummy bytes with a sound manifest, but for the changes."""
    folder.mkdir()
    graphs, files = {}, {}
    for name in GRAPHS:
        graphs[name] = write_graph(folder / f"{name}.onnx")
    for key, name in (("samplers", "samplers.json"), ("tokenizer", "tokenizer.json")):
        (folder / name).write_text("{}")
        files[key] = vars(describe(folder / name))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        **dict.fromkeys(("name", "preset", "created", "revision", "licence"), "x"),
        **{"frames": 4, "size": 64, "latent": [4, 8, 8], "prediction": "epsilon"},
        "shared_start": 0.5,
        **{"graphs": graphs, "files": files, "fingerprints": {}, "parity": {}, "provenance": {}},
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b")


def edit(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_whole_bundle_verifies(folder: Path) -> None:
    bundle = Bundle.open(folder)
    bundle.verify()
    assert bundle.manifest.graphs["time"].inputs[0].shape == (1,)
    said = json.loads((folder / "manifest.json").read_text())
    written = json.loads(bundle.manifest.to_json())
    assert {key: written[key] for key in said} == said  # fields of later releases have defaults


def test_an_exported_bundle_verifies(nano_bundle: Bundle) -> None:
    nano_bundle.verify()
    assert nano_bundle.samplers()["dpmpp_2m", 10].prediction == "v_prediction"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), r"denoise.onnx is truncated \(\d+ bytes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"!"), "denoise.onnx is altered"),
        (lambda p: p.write_bytes(b"X" + p.read_bytes()[1:]), r"denoise.onnx is altered \(SHA-256"),
        (lambda p: p.unlink(), "denoise.onnx is missing or unreadable"),
        (lambda p: (p.unlink(), p.mkdir()), "denoise.onnx is"),
    ],
)
def test_a_damaged_file_is_named_with_the_fix(folder: Path, damage: Any, message: str) -> None:
    damage(folder / "denoise.onnx")
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(folder).verify()
    assert str(caught.value).endswith("copy or export the bundle again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), "schema_version 2 came; this release reads 1"),
        (lambda m: m.pop("size"), r"manifest.size is missing"),
        (lambda m: m.update(extra=1), r"manifest.extra is unknown"),
        (lambda m: m.update(size="big"), r"manifest.size: 'big' came; wanted int"),
        (lambda m: m.update(size=True), r"manifest.size: 'True' came; wanted int"),
        (lambda m: m.update(graphs=[]), r"manifest.graphs: '\[\]' came"),
        (lambda m: m["graphs"].pop("decode"), "graphs: decode missing"),
        (lambda m: m["files"].pop("samplers"), "files: samplers missing"),
        (lambda m: m["graphs"]["text"].pop("sha256"), r"graphs.text.sha256 is missing"),
        (lambda m: m["graphs"]["text"].update(bytes=2**40), "bytes; wanted 1 to"),
        (lambda m: m["graphs"]["text"].update(file="../../etc/passwd"), "leaves the folder"),
        (lambda m: m["graphs"]["text"].update(file="/etc/passwd"), "leaves the folder"),
        (lambda m: m["graphs"]["text"].update(file="..\\x"), "leaves the folder"),
        (lambda m: m["graphs"]["text"]["inputs"][0].update(shape=[-1]), "no static tensor"),
        (lambda m: m["graphs"]["text"]["inputs"][0].update(dtype="object"), "no static tensor"),
    ],
)
def test_a_wrong_manifest_says_which_field(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(folder)
    assert str(caught.value).startswith(f"bundle {folder}: manifest.json: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\x00", '"x"'])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(folder)


def test_no_bundle_and_too_large_a_manifest(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BundleError, match=r"no readable manifest.json .*heartbeat-export wrote"):
        Bundle.open(tmp_path / "nowhere")
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(module.MAX_MANIFEST + 1)
    with pytest.raises(BundleError, match="exceeds"):
        Bundle.open(folder)


def test_weights_outside_the_file_are_refused(folder: Path) -> None:
    path = folder / "time.onnx"
    model = onnx.load(path)
    weight = model.graph.initializer.add(name="w", data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(model.SerializeToString())
    edit(folder, lambda m: m["graphs"]["time"].update(vars(describe(path))))
    with pytest.raises(BundleError, match="keeps weights outside itself"):
        Bundle.open(folder).verify()


def test_replacing_takes_the_place_in_one_move(tmp_path: Path, folder: Path) -> None:
    with replacing(folder) as new:
        (new / "manifest.json").write_text("new")
        assert (folder / "text.onnx").exists()  # the old one serves until the end
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_after_an_error_nothing_has_changed(tmp_path: Path, folder: Path) -> None:
    def fill_the_disk() -> None:
        with replacing(folder) as new:
            (new / "text.onnx").write_text("half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BundleError, match=r"not written .No space left on device"):
        fill_the_disk()
    Bundle.open(folder).verify()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with (
        pytest.raises(BundleError, match="not a bundle, so it is not overwritten"),
        replacing(tmp_path / "thesis"),
    ):
        pass
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_a_copy_elsewhere_is_the_same_bundle(nano_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(nano_bundle.path, tmp_path / "moved")
    moved = Bundle.open(tmp_path / "moved")
    moved.verify()
    assert moved.manifest == nano_bundle.manifest
