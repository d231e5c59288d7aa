"""The house itself: import direction, a light runtime, packages without stray files."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANK = {
    "heartbeat_kernels": 0,
    "heartbeat_fast": 1,
    "heartbeat_export": 2,
    "heartbeat_training": 3,
    "heartbeat_benchmarks": 3,
}
FOLDERS = [
    ROOT / "heartbeat_fast",
    ROOT / "kernels/heartbeat_kernels",
    ROOT / "export/heartbeat_export",
    ROOT / "training/heartbeat_training",
    ROOT / "benchmarks/heartbeat_benchmarks",
]
SOURCES = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module a file imports, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = next(part for part in path.parts if part in RANK)
    for module in imported(path):
        other = module.split(".")[0]
        assert RANK.get(other, -1) <= RANK[package], f"{package} imports {module}"


LAYERS = {
    **dict.fromkeys(("conditions", "record", "extract", "clip", "bundle", "sampler"), 0),
    **dict.fromkeys(("anatomy", "heart", "carry", "sector", "speckle", "untrusted"), 0),
    **dict.fromkeys(("engines", "formats"), 1),
    **{"generator": 2, "warm": 3, "serve": 5, "cli": 6},
    **dict.fromkeys(("maker", "stream", "takes"), 4),
}


def test_runtime_layers_go_one_way() -> None:
    for path in sorted((ROOT / "heartbeat_fast").rglob("*.py")):
        mine = LAYERS.get(path.relative_to(ROOT / "heartbeat_fast").parts[0].removesuffix(".py"))
        if mine is None:
            continue
        for module in imported(path):
            other = module.removeprefix("heartbeat_fast.").split(".")[0]
            if module.startswith("heartbeat_fast."):
                assert LAYERS.get(other, -1) <= mine, f"{path.name} imports {module}"


@pytest.mark.parametrize(
    "module", ["heartbeat_fast", "heartbeat_fast.cli", "heartbeat_training.phantom"]
)
def test_import_is_light(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "onnx")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import heartbeat_fast

    for name in heartbeat_fast.__all__:
        assert getattr(heartbeat_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        heartbeat_fast.Nothing  # noqa: B018


@pytest.mark.parametrize("root", ["kernels", "export", "training", "benchmarks", "tests"])
def test_source_roots_are_no_packages(root: str) -> None:
    # an __init__.py in kernels/ would shadow Hugging Face's package of that name
    assert not (ROOT / root / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_packages_are_typed(folder: Path) -> None:
    assert (folder / "py.typed").exists()
    assert (folder / "__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_fit_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_wheel_holds_the_five_packages(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it comes with [dev]")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(RANK)
    assert any(name.startswith("heartbeat_fast/bundles/tiny/") for name in names)


def test_extras_never_pair_the_two_onnxruntimes() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    holders = {
        name: [d for d in deps if d.startswith("onnxruntime")] for name, deps in extras.items()
    }
    assert {name for name, deps in holders.items() if deps} == {"cpu", "gpu"}
