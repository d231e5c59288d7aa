"""A published autoencoder's decoder made small: distilled on frames, judged on held-out clips.

What `base` does with Stable Diffusion's decoder (few_steps.py) without `base`: any autoencoder that
`open_autoencoder` reads, any data set. Crops of frames are frames to an autoencoder, and a quarter
of the work. Legend: M crops, F frames, C channels, h w latents, H W pixels.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.autoencoders import load_small_decoder
from heartbeat_fast.models.codec import Codec, SmallDecoder
from heartbeat_training import metrics
from heartbeat_training.evaluation.cases import Case
from heartbeat_training.evaluation.distances import mean_interval
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import Recipe, train
from heartbeat_training.processes import main_first, pick_device
from heartbeat_training.stage_decoder import DecoderStage

Frames = NDArray[np.uint8]
DRAWS = 4  # places tried for a crop; the brightest is taken, or black corners would fill batches
REPEATS = 9  # timed decodes of one frame


@dataclass(frozen=True)
class Task:
    """What is distilled: the new decoder's width, and from crops of how many pixels.

    crops: of each frame. start: a decoder to begin with (TAESD's), or None for random weights.
    """

    width: int = 32
    crop: int = 128
    crops: int = 2
    start: Path | None = None


def distil_decoder(
    teacher: Codec,
    frames: Frames,
    task: Task,
    recipe: Recipe,
    run: Path,
    console: Console,
    hardware: Hardware | None = None,
) -> SmallDecoder:
    """Train to the recipe's end, resuming what `run` holds.

    Args:
        teacher: a frozen autoencoder. frames: (M, H, W) uint8 to learn from.

    Raises: HeartBeatError: the crop is no multiple of 8 or larger than a frame.
    """
    hardware = hardware or Hardware()
    if task.crop % 8 or not 16 <= task.crop <= min(frames.shape[1:]):
        raise HeartBeatError(
            f"crop {task.crop}: wanted a multiple of 8 up to {min(frames.shape[1:])}"
        )
    with main_first():
        latents = _latents(teacher, frames, task, run, pick_device(hardware.device))
    torch.manual_seed(recipe.seed)
    student = SmallDecoder(latents.shape[1], (task.width,) * 4)
    if task.start is not None:
        load_small_decoder(student.decoder, task.start)
    stage = DecoderStage(teacher, student, latents, recipe.batch)
    train(stage, recipe, run / "decoder", console, hardware)
    return student


def crops(frames: Frames, task: Task) -> Iterator[Frames]:
    """Crops (crops, crop, crop) of every frame, at places that depend on its number alone."""
    room = np.array(frames.shape[1:]) - task.crop + 1
    for i, frame in enumerate(frames):
        rng = np.random.Generator(np.random.PCG64([0xC809, i]))
        places = rng.integers(room, size=(task.crops, DRAWS, 2))
        yield np.stack([_crop(frame, task.crop, tried) for tried in places])


def _crop(frame: Frames, side: int, places: NDArray[np.int64]) -> Frames:
    """The brightest of the crops that begin at `places` (DRAWS, 2)."""
    tried = [frame[r : r + side, c : c + side] for r, c in places]
    return tried[int(np.argmax([crop.mean() for crop in tried]))]


def _latents(
    teacher: Codec, frames: Frames, task: Task, run: Path, device: torch.device
) -> NDArray[Any]:
    """Latents (M, C, h, w) float16 of the crops, made once."""
    file = run / f"latents-{task.crop}x{task.crops}.npy"
    if not file.exists():
        run.mkdir(parents=True, exist_ok=True)
        teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            made = [teacher.encode(_tensor(c).to(device)).cpu() for c in crops(frames, task)]
        teacher.to("cpu")
        with file.with_suffix(".part").open("wb") as part:
            np.save(part, torch.cat(made).half().numpy())
        file.with_suffix(".part").rename(file)
    return np.load(file, mmap_mode="r")


def judge(
    teacher: Codec, student: Codec, cases: list[Case], tick: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Figures of every case: what the student draws of encoded frames, beside the teacher's.

    …_teacher: against what the teacher draws of the same latents; …_frames: against the frames;
    a share is the student's figure over the teacher's.
    """
    rows = []
    for case in cases:
        drawn = decoded(teacher, student, case.frames)
        both = [_texture(frames, case) for frames in (*drawn, case.frames)]
        row: dict[str, Any] = {"patient": case.patient}
        for name, reference in (("teacher", drawn[0]), ("frames", case.frames)):
            row[f"psnr_{name}"] = psnr(drawn[1], reference)
            row[f"ssim_{name}"] = metrics.ssim(drawn[1], reference)
        row["teacher_psnr_frames"] = psnr(drawn[0], case.frames)
        row["teacher_ssim_frames"] = metrics.ssim(drawn[0], case.frames)
        for name, yardstick in (("teacher", both[0]), ("frames", both[2])):
            gaps = both[1]["spectrum"] - yardstick["spectrum"]
            row[f"spectrum_gap_{name}"] = float(np.abs(gaps).mean())
            row[f"spectrum_gaps_{name}"] = gaps.tolist()
            for figure in ("speckle", "flicker", "travel"):
                ours, theirs = both[1][figure], yardstick[figure]
                row[f"{figure}_share_{name}"] = ours / theirs if theirs else float("nan")
        rows.append(row)
        tick()
    return rows


@torch.no_grad()
def decoded(teacher: Codec, student: Codec, frames: Frames) -> tuple[Frames, Frames]:
    """What both draw of a clip's frames (F, H, W), encoded in bfloat16 as in training."""
    drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
    for frame in _tensor(frames).split(1):
        with torch.autocast("cpu", torch.bfloat16):
            z = teacher.encode(frame).float()
        for codec, made in zip((teacher, student), drawn, strict=True):
            made.append(codec.decode(z, torch.zeros(1, 0)))
    grey = [(torch.cat(made)[:, 0] * 255).round().byte().numpy() for made in drawn]
    return grey[0], grey[1]


def _texture(frames: Frames, case: Case) -> dict[str, Any]:
    """Spectrum (dB a band), speckle's mean/std, flicker (grey levels), speckle's travel."""
    return {
        "spectrum": metrics.power_spectrum(frames, case.tissue),
        "speckle": metrics.speckle_ratio(frames, case.tissue, case.dynamic_range),
        "flicker": metrics.flicker(frames, case.flow, case.tissue),
        "travel": metrics.speckle_correlation(frames, case.flow, case.tissue),
    }


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB, peak 255."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval over patients of every figure; the worst band of the mean spectrum."""
    patients = np.array([row["patient"] for row in rows])
    found = {}
    for name, value in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(value, float):
            mean, low, high = mean_interval(np.array(values), patients)
            found[name] = {"mean": mean, "low": low, "high": high}
        elif isinstance(value, list):
            known = np.array([v for v in values if np.isfinite(v).all()])
            worst = float(np.abs(known.mean(0)).max()) if len(known) else float("nan")
            found[name.replace("gaps", "worst")] = {"mean": worst}
    return found


@torch.no_grad()
def cost(codec: Codec, channels: int, side: int) -> dict[str, Any]:
    """Multiply-adds and milliseconds of decoding one frame of `side` pixels, float32; all times."""
    z, noise = torch.randn(1, channels, side // 8, side // 8), torch.zeros(1, 0)
    with FlopCounterMode(display=False) as counter:
        codec.decode(z, noise)
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        codec.decode(z, noise)
        seconds.append(time.perf_counter() - begin)
    return {
        "multiply_adds": int(counter.get_total_flops()) // 2,
        "milliseconds": float(np.median(seconds) * 1e3),
        "samples_ms": [1e3 * s for s in seconds],
    }


def picture(teacher: Codec, student: Codec, cases: list[Case], out: Path) -> None:
    """A frame of each case, the teacher's, the student's; below, the middle at three times."""
    columns = []
    for case in cases:
        one = case.frames[:1]
        three = [one[0], *(drawn[0] for drawn in decoded(teacher, student, one))]
        side = one.shape[-1]
        middle = slice(side // 3, side // 3 + side // 3)
        large = [cv2.resize(x[middle, middle], (side, side), interpolation=0) for x in three]
        columns.append(np.concatenate([np.concatenate(three, 1), np.concatenate(large, 1)]))
    out.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out), np.concatenate(columns))


def _tensor(frames: Frames) -> Tensor:
    """Grey frames as (N, 1, H, W) in [0, 1]."""
    return torch.from_numpy(frames.astype(np.float32) / 255)[:, None]
