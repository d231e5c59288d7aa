"""heartbeat-train plan: the arithmetic against what autograd really keeps."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from heartbeat_fast.models.config import BASE, NANO, CodecConfig, HeartBeatConfig, ImageConfig
from heartbeat_fast.models.heartbeat import HeartBeat, train_only
from heartbeat_training.activations import costs, weight_copies
from heartbeat_training.cli import main
from heartbeat_training.memory import GIB, PlanError, Request, kept, plan
from heartbeat_training.paper import learned

# base with its widths divided by five and a quarter of its size; text, SAM and VAE smaller still:
# they keep nothing for the backward pass.
NARROW = replace(
    BASE,
    name="base-narrow",
    frames=4,
    size=64,
    denoiser=replace(
        BASE.denoiser, channels=(64, 128, 256, 256), context_dim=32, local_channels=16, frames=4
    ),
    text=replace(NANO.text, layers=1),
    image=ImageConfig(size=64, hidden=32, layers=1, heads=2, window=3, channels=16, grid=4),
    codec=CodecConfig(widths=(32,) * 4),
)
STAGES = [("stage1", False), ("stage2", False), ("stage2", True), ("cmr", False)]


class WideNorms(TorchFunctionMode):
    """CUDA's autocast rule for norms, on a CPU: they take and give float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (functional.group_norm, functional.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def prepared(config: HeartBeatConfig, stage: str, cross: bool) -> HeartBeat:
    """A model with the stage's parameters trainable."""
    model = HeartBeat(config)
    train_only(model, learned(model, stage, cross))
    return model.train()


def conditions(config: HeartBeatConfig, rows: int, frames: int) -> dict[str, Tensor]:
    """A batch as PaperStage draws it: embeddings in the image's place."""
    side, patches = config.size, config.image.size // config.image.patch
    return {
        "tokens": torch.zeros(rows, 77, dtype=torch.long),
        "ef": torch.zeros(rows, 1),
        "image": torch.zeros(rows, config.image.channels, patches, patches),
        "sketch": torch.zeros(rows, 1, side, side),
        "mask": torch.zeros(rows, frames, 4, side, side),
        "skeleton": torch.zeros(rows, frames, 1, side, side),
        "flow": torch.zeros(rows, frames, 2, side, side),
        "present": torch.ones(rows, 7),
    }


def saved_bytes(model: HeartBeat, rows: int, stage: str, wide: bool) -> int:
    """Bytes that autograd, and checkpoints, hold at the end of a forward pass."""
    config = model.config
    frames = 1 if stage == "stage1" else config.frames
    batch = conditions(config, rows, frames)
    z = torch.zeros(rows, frames, config.codec.latent_channels, config.latent, config.latent)
    own = {key(t) for t in (*model.parameters(), *model.buffers(), *batch.values(), z)}
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if key(tensor) not in own:
            held[key(tensor)] = tensor
        return tensor

    for module in model.modules():
        module.__dict__["note"] = note
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
        WideNorms() if wide else contextlib.nullcontext(),
    ):
        loss = model.predict(z, torch.zeros(rows, dtype=torch.long), batch).float().mean()
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in held.values())


def key(tensor: Tensor) -> int:
    """Which memory a tensor lies in, as long as the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


def per_row(model: HeartBeat, stage: str, wide: bool) -> tuple[float, float]:
    """Bytes for a row, and those that do not grow with the rows."""
    two, three = (saved_bytes(model, rows, stage, wide) for rows in (2, 3))
    return three - two, 3 * two - 2 * three


def predicted(model: HeartBeat, stage: str, wide: bool, checkpointing: bool = False) -> float:
    """The arithmetic's bytes for a row."""
    layers = list(costs(model, 1 if stage == "stage1" else 2, wide))
    frames = 1 if stage == "stage1" else model.config.frames
    return frames * kept(layers, checkpointing)


@pytest.mark.parametrize("wide", [False, True], ids=["cpu", "cuda-rules"])
@pytest.mark.parametrize(("stage", "cross"), STAGES)
def test_activations_are_what_autograd_keeps(stage: str, cross: bool, wide: bool) -> None:
    """Real passes at reduced width: 3 % a row, and 3 % of the copies of weights."""
    model = prepared(NARROW, stage, cross)
    row, rest = per_row(model, stage, wide)
    assert predicted(model, stage, wide) == pytest.approx(row, rel=0.03)
    assert weight_copies(model, 1 if stage == "stage1" else 2) == pytest.approx(rest, rel=0.03)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_activations_of_base_itself(stage: str) -> None:
    """At full width without memory: the same pass over tensors that have shapes but no numbers."""
    with FakeTensorMode():
        model = prepared(BASE, stage, False)
        row, rest = per_row(model, stage, True)
    assert predicted(model, stage, True) == pytest.approx(row, rel=0.005)
    assert weight_copies(model, 1 if stage == "stage1" else 2) == pytest.approx(rest, rel=0.01)


def checkpointed(module: nn.Module) -> None:
    """Recomputes a block in the backward pass; its inputs, which stay, are noted."""
    plain = module.forward

    def forward(x: Tensor, step: Any) -> Any:
        for tensor in (x, *(t for kv in step.kv for t in kv)):
            module.__dict__["note"](tensor)
        return checkpoint(plain, x, step, use_reentrant=False)

    module.__dict__["forward"] = forward


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_checkpoints_keep_their_inputs_alone(stage: str) -> None:
    """Residual blocks and transformers recomputed: 15 %, as small things count for more."""
    model = prepared(NARROW, stage, False)
    whole = predicted(model, stage, False)
    for block in (*model.denoiser.resnets(), *(t for _, t in model.denoiser.transformers())):
        checkpointed(block)
    row, _ = per_row(model, stage, False)
    assert predicted(model, stage, False, checkpointing=True) == pytest.approx(row, rel=0.15)
    assert row < whole / 2


def test_base_stage_two_at_batch_16_fits_48_gb() -> None:
    """Without and with checkpoints, on one GPU; the parameters are those of the stages' test."""
    found = plan(BASE, Request())
    assert found.fits
    assert sum(found.trainable.values()) == 49_909_440
    assert found.micro_batch * found.accumulation == 16
    assert found.memory.total < 48 * GIB < found.totals[2 * found.micro_batch]
    recomputed = plan(BASE, Request(checkpointing=True))
    assert recomputed.micro_batch == 16
    assert recomputed.memory.total < 48 * GIB
    assert recomputed.step_flop == pytest.approx(found.step_flop * 4 / 3)


def test_fixed_memory_is_what_the_optimizer_holds() -> None:
    """Weights, gradients and moments of a narrow model, byte by byte."""
    model = prepared(NARROW, "stage2", True)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    adam = torch.optim.Adam(trained)
    adam.step()
    memory = plan(NARROW, Request(train_cross_attention=True)).memory
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == memory.average == sum(p.nbytes for p in trained)
    moments = [t for state in adam.state.values() for k, t in state.items() if k != "step"]
    assert memory.moments == sum(t.nbytes for t in moments)


def test_sharding_spreads_what_it_says() -> None:
    """fsdp divides weights and states, gathers two blocks; ddp adds buckets of gradients."""
    one = plan(NARROW, Request(stage="stage1", batch=8, micro_batch=1)).memory
    ddp = plan(NARROW, Request("stage1", 8, 4, "ddp", micro_batch=1)).memory
    fsdp = plan(NARROW, Request("stage1", 8, 4, "fsdp", micro_batch=1)).memory
    assert ddp.gathered == one.gradients
    assert one.gathered == 0
    for name in ("weights", "gradients", "moments", "average"):
        assert getattr(fsdp, name) == getattr(one, name) / 4
        assert getattr(ddp, name) == getattr(one, name)


def test_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Text, JSON, a GPU that is too small, and a batch that cannot be shared."""
    assert main(["plan"]) == 0
    text = capsys.readouterr().out
    assert "Fits: " in text
    assert "arithmetic, not a measurement" in text
    assert main(["plan", "--stage", "cmr", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"]
    assert answer["memory"]["total"] == answer["totals"][str(answer["micro_batch"])]
    assert answer["estimate"]["steps"] == 800
    assert main(["plan", "--stage", "1", "--gpu-memory", "12"]) == 1
    assert "Does not fit" in capsys.readouterr().out
    assert main(["plan", "--gpus", "3"]) == 2
    with pytest.raises(PlanError, match="wanted a divisor of 16"):
        Request(micro_batch=5)
