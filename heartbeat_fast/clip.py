"""Clip: generated frames, and writing them so that nobody takes them for a patient's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import FileError, RecordError, optional
from heartbeat_fast.files import atomic
from heartbeat_fast.sector import Sector, estimate

MARK = "SYNTHETIC"
Point = tuple[float, float]


def to_grey(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames of any shape in [0, 1] as 8-bit grey, rounded; what lies outside is clipped."""
    grey = frames.clip(0, 1)
    grey *= 255  # in place: 0.3 ms a clip where temporaries take 3.3
    grey += np.float32(0.5)
    return grey.astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Clip:
    """A generated clip.

    Args:
        frames: grey (F,H,W) uint8.
        spacing_mm: millimetres per pixel along (rows, columns).
        fps: frames per second.
        provenance: how it was made (seed, bundle, engine, timings, ...), JSON values.
        conditions: what it was made from; an npz holds them.
        sector: the scanned sector where it is known; `geometry` estimates it where not.

    Raises:
        RecordError: frames are not grey uint8 (F,H,W), or fps or spacing is not positive.
    """

    frames: NDArray[np.uint8]
    spacing_mm: tuple[float, float] = (1.0, 1.0)
    fps: float = 25.0
    provenance: dict[str, Any] = field(default_factory=dict)
    conditions: Conditions | None = None
    sector: Sector | None = None

    def __post_init__(self) -> None:
        if self.frames.ndim != 3 or self.frames.dtype != np.uint8 or self.frames.size == 0:
            raise RecordError(
                f"frames: {self.frames.dtype} {self.frames.shape} came; wanted uint8 (F,H,W)"
            )
        if not 0 < self.fps < np.inf:
            raise RecordError(f"fps: {self.fps} came; wanted a positive number")
        if not (len(self.spacing_mm) == 2 and all(0 < mm < np.inf for mm in self.spacing_mm)):
            raise RecordError(f"spacing_mm: {self.spacing_mm} came; wanted two positive numbers")

    @cached_property
    def geometry(self) -> Sector | None:
        """The scanned sector: known, else estimated from the frames; None where there is none."""
        return self.sector or estimate(self.frames)

    def save(self, path: str | Path, *, mark: bool = True) -> Path:
        """Writes .dcm, .nii, .nii.gz, .mp4, .gif, .webp, .png or .npz, whole or not at all.

        A .png is all frames side by side. With NIfTI the labels, if the clip has any, go into a
        `_gt` file beside it. docs/files.md says what each holds.

        Args:
            mark: draw a small visible SYNTHETIC into pictures and DICOM. The metadata says so in
                any case.

        Raises:
            FileError: unknown suffix, or the file cannot be written.
            MissingDependency: .mp4 without PyAV, .dcm without pydicom, NIfTI without nibabel.
        """
        path = writable(path)
        suffix = _suffix(path)
        if suffix in _FORMATS:  # by name: these modules stand above this one and know it
            import_module(_FORMATS[suffix]).write(path, self, mark=mark)
        elif suffix == ".npz":
            self._save_arrays(path)
        else:
            images = [Image.fromarray(frame) for frame in self.frames]
            save_images(path, images, self.fps, self.note(), mark=mark)
        return path

    def note(self) -> str:
        """The metadata every file carries, as JSON: provenance, rate, spacing and sector."""
        sector = self.geometry
        return json.dumps(
            {
                **self.provenance,
                "synthetic": True,
                "not_for_diagnosis": True,
                "generator": "heartbeat_fast",
                "fps": self.fps,
                "spacing_mm": self.spacing_mm,
                "sector": sector and sector.facts(self.spacing_mm),
            },
            default=str,
        )

    def mmode(self, line: int | tuple[Point, Point]) -> NDArray[np.uint8]:
        """An M-mode strip: the pixels on one line, over time.

        Args:
            line: a column, or two (row, column) ends; one sample a pixel, nearest neighbour.

        Returns:
            (samples, F) uint8.
        """
        H, W = self.frames.shape[1:]
        ends = ((0, line), (H - 1, line)) if isinstance(line, int) else line
        start, stop = np.asarray(ends, np.float64)
        samples = round(float(np.hypot(*(stop - start)))) + 1
        rows, columns = np.rint(np.linspace(start, stop, samples)).astype(int).T
        if min(rows.min(), columns.min()) < 0 or rows.max() >= H or columns.max() >= W:
            raise RecordError(f"line: {line} came; wanted inside {H} rows x {W} columns")
        return self.frames[:, rows, columns].T

    def _save_arrays(self, path: Path) -> None:
        given = self.conditions
        arrays: dict[str, Any] = {
            "frames": self.frames,
            "spacing_mm": np.asarray(self.spacing_mm, np.float64),
            "fps": np.float64(self.fps),
            "provenance": np.str_(self.note()),
        }
        if self.geometry:
            arrays["sector_mask"] = self.geometry.mask(*self.frames.shape[1:])
        for name in given.present if given else ():
            arrays[name] = np.asarray(getattr(given, name))
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)


def writable(path: str | Path, suffixes: Sequence[str] = ()) -> Path:
    """The path, if `Clip.save` (or what writes only these suffixes) can: ask before the work.

    Raises:
        FileError: unknown suffix.
    """
    path = Path(path)
    wanted = suffixes or SUFFIXES
    if _suffix(path) not in wanted:
        raise FileError(f"{path}: unknown suffix; wanted one of {', '.join(wanted)}")
    return path


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def save_images(
    path: str | Path, images: Sequence[Image.Image], fps: float, note: str, *, mark: bool = True
) -> Path:
    """Writes pictures of one size as .gif, .mp4, .webp or .png strip, atomically, with metadata.

    Args:
        images: mode L or RGB; for .gif also P, with a palette of the caller's choice.
        note: the metadata, kept as comment (gif, mp4), text chunk (png) or EXIF (webp).
        mark: draw SYNTHETIC into the lower left corner.

    Raises:
        FileError, MissingDependency: as `Clip.save`.
    """
    path = writable(path, PICTURES)
    drawn = [marked(image) for image in images] if mark else list(images)
    with atomic(path) as temporary:
        _WRITERS[path.suffix.lower()](temporary, drawn, fps, note)
    return path


def marked(image: Image.Image) -> Image.Image:
    """A copy with a small SYNTHETIC in its lower left corner; mode L or RGB."""
    image = image.copy()
    size = max(8, image.height // 25)
    ink, edge = ("white", "black") if image.mode == "RGB" else (215, 0)
    ImageDraw.Draw(image).text(
        (size // 2, image.height - size // 2),
        MARK,
        fill=ink,
        stroke_fill=edge,
        stroke_width=1,
        font=ImageFont.load_default(size),
        anchor="lb",
    )
    return image


def _durations(count: int, fps: float, tick: int, least: int) -> list[int]:
    """Milliseconds of each frame in whole ticks, so spread that none starts half a tick off."""
    starts = np.rint(np.arange(count + 1) * (1000 / (fps * tick))).astype(int)
    return [max(least, int(ticks)) * tick for ticks in np.diff(starts)]


def _gif(path: Path, images: list[Image.Image], fps: float, note: str) -> None:
    # A GIF counts in hundredths of a second, and browsers slow down what asks for less than two.
    durations = _durations(len(images), fps, 10, 2)
    options = {"duration": durations, "loop": 0, "comment": note.encode(), "optimize": False}
    _save_all(path, "GIF", images, **options)


def _webp(path: Path, images: list[Image.Image], fps: float, note: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = note  # ImageDescription
    # Lossless: the lossy encoder merges frames that differ by a few grey levels.
    durations = _durations(len(images), fps, 1, 1)
    options = {"duration": durations, "loop": 0, "lossless": True, "exif": exif.tobytes()}
    _save_all(path, "WEBP", images, **options)


def _save_all(path: Path, kind: str, images: list[Image.Image], **options: Any) -> None:
    with path.open("wb") as file:
        images[0].save(file, kind, save_all=True, append_images=images[1:], **options)


def _png(path: Path, images: list[Image.Image], fps: float, note: str) -> None:
    strip = np.concatenate([np.asarray(image) for image in images], 1)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", note)
    with path.open("wb") as file:
        Image.fromarray(strip).save(file, "PNG", pnginfo=text)


def _mp4(path: Path, images: list[Image.Image], fps: float, note: str) -> None:
    av = optional("av", "media")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    try:
        with av.open(str(path), "w", format="mp4") as container:
            container.metadata.update(title=MARK, comment=note)
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height = (side + side % 2 for side in images[0].size)
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "16"} if codec == "libx264" else {"qscale": "2"}
            for image in images:
                canvas = Image.new("RGB", (stream.width, stream.height))
                canvas.paste(image)
                container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


_WRITERS = {".gif": _gif, ".mp4": _mp4, ".webp": _webp, ".png": _png}
_FORMATS = {
    ".dcm": "heartbeat_fast.formats.dicom_writer",
    ".nii": "heartbeat_fast.formats.nifti_writer",
    ".nii.gz": "heartbeat_fast.formats.nifti_writer",
}
PICTURES = tuple(_WRITERS)
SUFFIXES = (*PICTURES, ".npz", *_FORMATS)
