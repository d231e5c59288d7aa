"""Two processes, or micro-batches, compute what one process computes with the whole batch.

As a script (`test_parallel.py FOLDER`) this file is one of the two processes: it runs every case
and writes gradients and losses; the test compares them with those of one process.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heartbeat_fast.models.config import NANO
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import train_tiny_tokenizer
from heartbeat_training import parallel
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import Recipe, train
from heartbeat_training.parallel import Parallel
from heartbeat_training.processes import ParallelError, pieces, share
from heartbeat_training.stage_diffusion import DiffusionStage
from heartbeat_training.state import whole

BATCH, STEPS = 5, 3  # five rows on two processes: three and two
RECIPE = Recipe(steps=STEPS, batch=BATCH, lr=1e-3, warmup=1, bf16=False, picture_every=2)


class Small:
    """Convolutions, a BatchNorm and a frozen layer; rows differ in scale, so statistics matter."""

    name = "small"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU()
        )
        self.head = nn.Linear(8, 2)
        self.pictures: list[float] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        named = dict(self.model.named_parameters(prefix="model"))
        return named | {"head.weight": self.head.weight}

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        x = torch.from_numpy(rng.standard_normal((BATCH, 1, 8, 8), np.float32))
        return {"x": (x * torch.arange(1, BATCH + 1)[:, None, None, None])[rows]}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.head(self.model(batch["x"]).mean((2, 3)))
        wanted = torch.stack([batch["x"].mean((1, 2, 3)), batch["x"].std((1, 2, 3))], 1)
        error = ((out - wanted) ** 2).mean(1)
        loud = error[batch["x"].std((1, 2, 3)) > 3]  # a figure that the first process lacks
        return {"loss": error.mean()} | ({"loud": loud.mean()} if len(loud) else {})

    def picture(self, step: int) -> None:
        with torch.no_grad():
            out = self.head(self.model(torch.ones(1, 1, 8, 8)).mean((2, 3)))
        self.pictures.append(float(out[0, 0]))


def nano(folder: Path, stage: int) -> DiffusionStage:
    """The real stage on the nano model, every weight away from zero; latents are noise."""
    torch.manual_seed(1)
    model = HeartBeat(NANO)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    cache = ClipCache(folder / "clips")
    latents = np.load(folder / "latents.npy")
    tokenizer = train_tiny_tokenizer(["An ECHO with 2-chamber view.", "An ECHO."])
    return DiffusionStage(model, cache, latents, tokenizer, stage=stage, batch=BATCH)


def build(folder: Path) -> None:
    ClipCache.build(folder / "clips", phantoms(range(6), NANO.frames, NANO.size), 6)
    rng = np.random.default_rng(0)
    shape = (6, NANO.frames, NANO.codec.latent_channels, NANO.latent, NANO.latent)
    np.save(folder / "latents.npy", rng.standard_normal(shape).astype(np.float16))


@dataclass(frozen=True)
class Case:
    stage: str
    sharding: str = "ddp"
    micro_batch: int = 0
    checkpointing: bool = False
    resumed: bool = False  # from a checkpoint that one process wrote

    def make(self, folder: Path) -> Any:
        return Small() if self.stage == "small" else nano(folder, int(self.stage[-1]))

    @property
    def hardware(self) -> Hardware:
        options = {k: v for k, v in asdict(self).items() if k not in ("stage", "resumed")}
        return Hardware(device="cpu", **options)

    def __str__(self) -> str:
        extra = f"-micro{self.micro_batch}" * bool(self.micro_batch)
        extra += "-recompute" * self.checkpointing + "-resumed" * self.resumed
        return f"{self.stage}-{self.sharding}{extra}"


CASES = [
    Case("small"),
    Case("small", micro_batch=2),
    Case("small", "fsdp"),
    Case("small", "fsdp", micro_batch=1),
    Case("small", "fsdp", resumed=True),
    Case("stage1"),
    Case("stage1", "fsdp", micro_batch=2, checkpointing=True),
    Case("stage2", micro_batch=2, checkpointing=True),
    Case("stage2", "fsdp"),
]


def gradients(stage: Any, hardware: Hardware) -> dict[str, Tensor]:
    """Of the first step's loss, in full, and BatchNorm's statistics after it."""
    with Parallel(stage, BATCH, hardware, bf16=False) as split:
        torch.manual_seed(0)
        batch = stage.draw(0, np.random.default_rng(0), split.rows)
        sums = split.learn(batch)
        assert all(rows for _, rows in sums.values())
        found = {name: p.grad for name, p in split.parameters.items()}
        full = {name: whole(g).clone() for name, g in found.items() if g is not None}
        assert full.keys() == stage.parameters().keys()
        return full | {k: v.clone() for k, v in split.statistics.buffers().items()}


def run_case(case: Case, folder: Path, out: Path) -> None:
    """Gradients of one step, then a run of three; in every process, written by the first."""
    found = gradients(case.make(folder), case.hardware)
    stage = case.make(folder)
    mean = train(stage, RECIPE, out / "run", Console(quiet=True), case.hardware)
    after = {k: p.detach().clone() for k, p in stage.parameters().items()}
    assert all(type(p) is nn.Parameter for p in stage.parameters().values())
    if os.environ.get("RANK", "0") == "0":
        save_file(found, out / "gradients.safetensors")
        save_file(after, out / "after.safetensors")
        (out / "mean.json").write_text(json.dumps([mean, getattr(stage, "pictures", [])]))


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "run/losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """What one process makes of each stage with the whole batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for stage in ("small", "stage1", "stage2"):
        (folder / "alone" / stage).mkdir(parents=True)
        run_case(Case(stage), folder, folder / "alone" / stage)
    torch.set_num_threads(threads)
    return folder / "alone"


@pytest.fixture(scope="module")
def together(folder: Path) -> Path:
    """What two processes make of every case."""
    for case in CASES:
        if case.resumed:
            out = folder / "together" / str(case)
            one_step(case.make(folder), out / "run", folder)
            assert len(curve(out)) == 1
    for _ in processes(2, [sys.executable, __file__, str(folder)]):
        pass
    return folder / "together"


def one_step(stage: Any, run: Path, there: Path) -> None:
    """Train until the stop file is seen, which is there from the start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEARTBEAT_STOP", str(there))
        with pytest.raises(SystemExit):
            train(stage, RECIPE, run, Console(quiet=True), Hardware(device="cpu"))


def processes(world: int, command: list[str]) -> Iterator[str]:
    """Start processes as a launcher does; yields their output when all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=550)
            assert process.returncode == 0, output[-3000:]
            yield output
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_compute_what_one_does(case: Case, alone: Path, together: Path) -> None:
    one, two = alone / case.stage, together / str(case)
    wanted, found = (load_file(out / "gradients.safetensors") for out in (one, two))
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        # 1e-8 is for attention's key biases, whose gradient is zero but for rounding
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * largest + 1e-8)
    curves = [[(row["loss"], row["grad_norm"]) for row in curve(out)] for out in (one, two)]
    assert len(curves[1]) == STEPS
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    ends = [load_file(out / "after.safetensors") for out in (one, two)]
    for name, value in ends[0].items():
        # Adam divides by the gradient's size, which blows rounding up; a step is 1e-3
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=2e-4)
    means = [json.loads((out / "mean.json").read_text()) for out in (one, two)]
    assert means[1][0] == pytest.approx(means[0][0], rel=1e-5)
    assert means[1][1] == pytest.approx(means[0][1], rel=1e-4)  # of pictures


def test_one_process_takes_over_from_two(together: Path, tmp_path: Path) -> None:
    """What FSDP wrote is whole: finished there, it is read here without another step."""
    out = together / "small-fsdp"
    shutil.copytree(out / "run", tmp_path / "run")
    stage = Small()
    train(stage, RECIPE, tmp_path / "run", Console(quiet=True), Hardware(device="cpu"))
    for name, value in load_file(out / "after.safetensors").items():
        assert torch.equal(stage.parameters()[name], value)


@pytest.mark.parametrize(
    "setting",
    [
        Hardware(device="cpu", micro_batch=1, checkpointing=True),
        Hardware(device="cpu", micro_batch=2, compile=True, checkpointing=True),
    ],
    ids=["micro1-recompute", "all"],
)
def test_no_setting_changes_the_gradient(
    setting: Hardware, alone: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Graphs are captured and differentiated; every block, or their code, would take minutes.
    monkeypatch.setattr(parallel, "BACKEND", "aot_eager")
    if setting.compile:
        monkeypatch.setattr(parallel, "BLOCKS", ("Transformer",))
    wanted = load_file(alone / "stage2/gradients.safetensors")
    stage = nano(folder, 2)
    before = {name: vars(module).keys() for name, module in stage.model.named_modules()}
    for name, gradient in gradients(stage, setting).items():
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-5 * largest + 1e-8)
    assert before == {name: vars(module).keys() for name, module in stage.model.named_modules()}


def test_recomputation_keeps_less(folder: Path) -> None:
    kept = []
    for checkpointing in (False, True):
        stage, total = nano(folder, 2), [0]

        def pack(tensor: Tensor, total: list[int] = total) -> Tensor:
            total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients(stage, Hardware(device="cpu", checkpointing=checkpointing))
        kept.append(total[0])
    assert kept[1] < 0.5 * kept[0]


def test_batch_norm_follows_the_whole_batch() -> None:
    """Statistics of rows taken 2 and 2 and 1 at a time are torch's of all five."""
    stage = Small()
    x = stage.draw(0, np.random.default_rng(0), slice(0, BATCH))["x"]
    norm = nn.BatchNorm2d(8, momentum=1.0)
    with torch.no_grad():
        norm(stage.model[0](x))
    stage.model[1].momentum = 1.0
    found = gradients(stage, Hardware(device="cpu", micro_batch=2))
    assert norm.running_mean is not None
    torch.testing.assert_close(found["model.1.running_mean"], norm.running_mean)
    torch.testing.assert_close(found["model.1.running_var"], norm.running_var)
    assert int(found["model.1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [8, 9, 16])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 5])
def test_pieces_cover_every_row_once(batch: int, world: int, micro_batch: int) -> None:
    counts, seen = set(), []
    for rank in range(world):
        rows = range(batch)[share(batch, rank, world)]
        parts = pieces(batch, rank, world, micro_batch)
        counts.add(len(parts))
        assert all(len(rows[cut]) <= (micro_batch or batch) for cut, _ in parts)
        seen += [row for cut, count in parts if count for row in rows[cut]]
        assert all(count in (0, len(rows[cut])) for cut, count in parts)
    assert seen == list(range(batch))
    assert len(counts) == 1, "processes must meet in every pass"


def test_more_processes_than_rows_are_refused() -> None:
    with pytest.raises(ParallelError, match="3 processes for a batch of 2"):
        share(2, 0, 3)


def test_a_missing_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ParallelError, match="sees no CUDA device"):
        Parallel(Small(), BATCH, Hardware(device="cuda"), bf16=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for each in CASES:
        out = root / "together" / str(each)
        out.mkdir(parents=True, exist_ok=True)  # by both: the first to come makes it
        run_case(each, root, out)
