"""Pictures for the documents: phantom and generated beside each other, M-mode, conditions, ladder.

What is drawn from a real clip goes to out/ and never to docs/: the licences of such clips do not
let them into the repository. Legend: F frames, H W pixels.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from heartbeat_fast.clip import Clip, marked, save_images
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.formats import open_record
from heartbeat_fast.generator import Generator
from heartbeat_fast.preview import save_preview
from heartbeat_fast.record import Record
from heartbeat_training.evaluate import ALL, SETS, SWAPPED
from heartbeat_training.phantom import record

LOCAL = Path("out")
GAP, CAPTION = 6, 20  # pixels
DISTILLED = (("text",), ("text", "sketch"), ("text", "mask"), ("image", "skeleton"))

Frames = NDArray[np.uint8]


def draw(
    bundle: str | Path | None,
    folder: Path,
    *,
    engine: str = "auto",
    seed: int = 900_016,
    steps: int = 10,
    guidance: float = 1.0,
    real: Path | None = None,
    fast: str | None = None,
) -> list[Path]:
    """Write beside.gif, mmode.png, conditions.gif, ladder.png and phantoms.png into `folder`.

    Returns what was written. With a real clip also out/real_beside.gif and out/real_mmode.png:
    real, phantom, generated from the real clip's conditions. With `fast`, a bundle distilled from
    this one, also fast.gif and fast_sets.png: the teacher's 20 steps beside the student's.

    Raises: BundleError, EngineError, FileError as the generator and the readers do.
    """
    generator = Generator.open(bundle, engine)
    manifest = generator.bundle.manifest
    source = record(seed, frames=manifest.frames, size=manifest.size)
    given = source.conditions()

    def make(conditions: Conditions) -> Clip:
        clip = generator(conditions, steps=steps, guidance=guidance, seed=1)
        return replace(clip, fps=source.fps, spacing_mm=source.spacing_mm)

    sets = [name for name in SETS if name != SWAPPED]
    clips = {name: make(given.only(SETS[name])) for name in sets}
    full = clips[ALL]
    pair = {"phantom": source.frames, "generated": full.frames}
    middle = manifest.frames // 3  # about end-systole of a whole beat
    stills = {"phantom": source.frames[middle]} | {n: c.frames[middle] for n, c in clips.items()}
    written = [
        beside(folder / "beside.gif", pair, full),
        m_modes(folder / "mmode.png", pair, source, full),
        save_preview(folder / "conditions.gif", given, full),
        sheet(folder / "ladder.png", stills, full, per_row=3),
        sheet(folder / "phantoms.png", phantoms(manifest.frames, manifest.size), full),
    ]
    if fast is not None:
        student = Generator.open(fast, engine)
        written += distilled(folder, generator, student, source, full)
    if real is not None:
        patient = open_record(real).standardised(manifest.frames, manifest.size)
        answer = make(patient.conditions())
        trio = {"real": patient.frames, "phantom": source.frames, "generated": answer.frames}
        written.append(beside(LOCAL / "real_beside.gif", trio, answer))
        written.append(m_modes(LOCAL / "real_mmode.png", trio, patient, answer))
    return written


def distilled(
    folder: Path, teacher: Generator, student: Generator, source: Record, made: Clip
) -> list[Path]:
    """fast.gif under all conditions; fast_sets.png, a row for each of four sets."""
    ways = [(teacher, 20)] + [(student, n) for _, n in sorted(student.bundle.samplers())[::-1]]
    names = [f"{g.bundle.manifest.name}, {steps} step{'s' * (steps > 1)}" for g, steps in ways]
    given = source.conditions()

    def clips(conditions: Conditions) -> list[Frames]:
        return [g(conditions, steps=steps, seed=1).frames for g, steps in ways]

    full = {"phantom": source.frames} | dict(zip(names, clips(given), strict=True))
    stills = {
        f"{' + '.join(some)}: {name}": frames[0]
        for some in DISTILLED
        for name, frames in zip(names, clips(given.only(some)), strict=True)
    }
    return [
        beside(folder / "fast.gif", full, made),
        sheet(folder / "fast_sets.png", stills, made),
    ]


def beside(path: Path, clips: dict[str, Frames], made: Clip) -> Path:
    """A GIF of clips (F, H, W) in a row under their names."""
    rows = [
        _row({name: Image.fromarray(frames[t]) for name, frames in clips.items()})
        for t in range(len(made.frames))
    ]
    return save_images(path, rows, made.fps, made.note(), mark=False)


def m_modes(path: Path, clips: dict[str, Frames], where: Record, made: Clip) -> Path:
    """M-mode strips across the LV's widest row of `where`, time to the right, three beats."""
    line = _line(where)
    strips = {}
    for name, frames in clips.items():
        strip = np.tile(Clip(frames).mmode(line), (1, 3))
        height, width = strip.shape
        strips[name] = Image.fromarray(strip).resize(
            (width * 8, height * 2), Image.Resampling.BICUBIC
        )
    return save_images(path, [_row(strips)], made.fps, made.note(), mark=False)


def sheet(path: Path, stills: dict[str, NDArray[np.uint8]], made: Clip, per_row: int = 4) -> Path:
    """Single frames under their names, so many in a row."""
    row = _row({name: Image.fromarray(still) for name, still in stills.items()}, per_row)
    return save_images(path, [row], made.fps, made.note(), mark=False)


def phantoms(frames: int, size: int) -> dict[str, NDArray[np.uint8]]:
    """End-diastole of eight hearts in a row of seeds, as they come, by what they are."""
    hearts = [record(seed, frames=frames, size=size) for seed in range(900_020, 900_028)]
    return {f"{h.patient[-6:]} {h.view}, EF {h.ef:.0f} %": h.frames[0] for h in hearts}


def _line(where: Record) -> tuple[tuple[float, float], tuple[float, float]]:
    """A horizontal line through the LV's centre at its first frame, 40 pixels beyond its walls."""
    H, W = where.frames.shape[1:]
    row, left, right = H // 2, 0, W - 1
    if where.labels is not None and (where.labels[0] == 1).any():
        inside = np.argwhere(where.labels[0] == 1)
        row = int(inside[:, 0].mean())
        columns = inside[inside[:, 0] == row, 1]
        margin = 40 * W // 256
        left, right = max(0, columns.min() - margin), min(W - 1, columns.max() + margin)
    return (row, float(left)), (row, float(right))


def _row(pictures: dict[str, Image.Image], per_row: int = 9) -> Image.Image:
    """Named pictures of one size side by side, wrapped; what is not real carries the mark."""
    width, height = next(iter(pictures.values())).size
    columns = min(per_row, len(pictures))
    rows = -(-len(pictures) // columns)
    cell = width + GAP, height + CAPTION + GAP
    page = Image.new("L", (columns * cell[0] + GAP, rows * cell[1] + GAP), 18)
    for k, (name, picture) in enumerate(pictures.items()):
        x, y = GAP + k % columns * cell[0], GAP + k // columns * cell[1]
        ImageDraw.Draw(page).text((x, y), name, fill=225, font=ImageFont.load_default(13))
        page.paste(picture if name == "real" else marked(picture), (x, y + CAPTION))
    return page
