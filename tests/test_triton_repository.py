"""A model repository for NVIDIA's server: its configs by the server's own schema, and whole."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from heartbeat_export.cli import main
from heartbeat_export.errors import ExportError
from heartbeat_export.triton_repository import write_repository
from heartbeat_fast.bundle import GRAPHS, Bundle
from heartbeat_fast.errors import BundleError
from heartbeat_fast.sampler import load_tables


def read_config(path: Path) -> Any:
    """A config.pbtxt as the server's ModelConfig message; unknown fields and types are errors."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed: config.pbtxt was NOT held to its schema")
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)  # needs no grpc
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(path.read_text(), module.ModelConfig())


@pytest.fixture(scope="module")
def repository(nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    assert main(["triton-repository", str(nano_bundle.path), "--out", str(out)]) == 0
    return out


def test_every_config_fits_the_schema_and_its_graph(repository: Path, nano_bundle: Bundle) -> None:
    names = {path.name for path in (repository / "models").iterdir()}
    assert names == {f"nano_{graph}" for graph in (*GRAPHS, "conditions")}
    for graph in GRAPHS:
        home = repository / "models" / f"nano_{graph}"
        config = read_config(home / "config.pbtxt")
        assert (config.name, config.backend, config.max_batch_size) == (home.name, "onnxruntime", 0)
        assert [group.kind for group in config.instance_group] == [2]  # KIND_CPU
        model = onnx.load(home / "1" / "model.onnx").graph
        for said, found in ((config.input, model.input), (config.output, model.output)):
            assert [tensor.name for tensor in said] == [value.name for value in found]
            for tensor, value in zip(said, found, strict=True):
                kind = value.type.tensor_type
                assert list(tensor.dims) == [dim.dim_value for dim in kind.shape.dim]
                assert tensor.data_type == {1: 11, 7: 9}[kind.elem_type]  # TYPE_FP32, TYPE_INT64
        weights = config.parameters["heartbeat_weights"].string_value
        assert weights == nano_bundle.manifest.fingerprints["weights"]


def test_the_ensemble_makes_what_the_loop_takes(repository: Path) -> None:
    models = repository / "models"
    config = read_config(models / "nano_conditions" / "config.pbtxt")
    assert config.platform == "ensemble"
    ready = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input}
    assert set(ready) == {
        *("tokens", "ef", "present", "image", "sketch", "mask", "skeleton", "flow")
    }
    for step in config.ensemble_scheduling.step:  # in an order in which each finds its inputs
        model = read_config(models / step.model_name / "config.pbtxt")
        assert {t.name for t in model.input} == set(step.input_map)
        for tensor in model.input:
            assert ready[step.input_map[tensor.name]] == (tensor.data_type, list(tensor.dims))
        for tensor in model.output:
            ready[step.output_map[tensor.name]] = (tensor.data_type, list(tensor.dims))
    for tensor in config.output:
        assert ready[tensor.name] == (tensor.data_type, list(tensor.dims))
    loop = {tensor.name for tensor in read_config(models / "nano_denoise" / "config.pbtxt").input}
    assert loop == {tensor.name for tensor in config.output} | {"z", "temb"}


def test_the_client_finds_its_files_and_the_start_is_local(repository: Path) -> None:
    tables = load_tables((repository / "client" / "samplers.json").read_bytes())
    assert np.isfinite(tables["dpmpp_2m", 10].init_sigma)
    assert (repository / "client" / "tokenizer.json").is_file()
    readme = (repository / "README.md").read_text()
    start = readme[readme.index("    tritonserver") : readme.index("By itself")]
    for service in ("http", "grpc", "metrics"):
        assert f"--{service}-address=127.0.0.1" in start
    assert "0.0.0.0" not in start


def test_what_is_refused(nano_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="not empty"):
        write_repository(nano_bundle, tmp_path / "full")
    with pytest.raises(ExportError, match="with --name"):
        write_repository(nano_bundle, tmp_path / "new", name='x" backend: "python')
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_damaged_bundle_leaves_nothing(
    nano_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Bundle, spec: Any) -> bytes:
        raise BundleError("altered")

    monkeypatch.setattr(Bundle, "read", refuse)
    with pytest.raises(BundleError, match="altered"):
        write_repository(nano_bundle, tmp_path / "new")
    assert not list(tmp_path.iterdir())
