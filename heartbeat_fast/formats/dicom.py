"""DICOM ultrasound, single or multi-frame (PS3.3, C.8.5.5 US Region Calibration, C.7.6.5 Cine)."""

import hashlib
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import check_pixels
from heartbeat_fast.formats.limits import check_density, check_picture, reading
from heartbeat_fast.record import Record, view_in

CENTIMETRES = 3  # PhysicalUnitsXDirection
COLOURED = 48  # channels of a grey pixel differ by less, JPEG's chroma error included


def read(path: Path) -> Record:
    """The tissue region in grey: text outside it and coloured marks inside it are left out.

    The patient is a hash of PatientID: enough to split by, nothing to identify by.
    """
    dataset = _open(path)
    if "PixelData" not in dataset:
        raise FileError(f"{path}: no pixels in this DICOM object; wanted an ultrasound image")
    count = int(dataset.get("NumberOfFrames", 1) or 1)
    samples = int(dataset.SamplesPerPixel)
    check_pixels(path, count, dataset.Rows, dataset.Columns, samples)
    check_picture(path, dataset.Rows, dataset.Columns)
    announced = count * dataset.Rows * dataset.Columns * samples
    check_density(path, announced, len(dataset.PixelData))
    pixels = dataset.pixel_array.reshape(count, dataset.Rows, dataset.Columns, samples)
    frames = _grey(pixels, str(dataset.PhotometricInterpretation))
    rows, columns, spacing = _region(dataset)
    comments = str(dataset.get("ImageComments", "")).partition("{")[0]  # our own end in JSON
    words = f"{dataset.get('SeriesDescription', '')} {comments}"
    return Record(
        frames=np.ascontiguousarray(frames[:, rows, columns]),
        spacing_mm=spacing,
        fps=_fps(dataset),
        view=view_in(words),
        patient=_patient(dataset),
        source=path.name,
    )


def patient(path: Path) -> str:
    """The patient as `read` gives it, without reading pixels; "" where the file names none."""
    with reading(path, "dicom"):
        return _patient(_open(path, stop_before_pixels=True, specific_tags=["PatientID"]))


def _open(path: Path, **options: Any) -> Any:
    """The data set. From a file, pydicom would allocate any length an element announces; a map of
    the file ends where the file ends.
    """
    dcmread = optional("pydicom", "formats").dcmread
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return dcmread(content, **options)


def _patient(dataset: Any) -> str:
    identity = str(dataset.get("PatientID") or "").strip()
    return hashlib.sha256(identity.encode()).hexdigest()[:12] if identity else ""


def _grey(pixels: NDArray[Any], photometric: str) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8:
        pixels = (pixels.astype(np.float32) * (255 / max(int(pixels.max()), 1))).astype(np.uint8)
    if pixels.shape[-1] == 1:
        return 255 - pixels[..., 0] if photometric == "MONOCHROME1" else pixels[..., 0]
    low, high = pixels.min(-1), pixels.max(-1)
    return np.where(high - low < COLOURED, pixels[..., 1], np.uint8(0))


def _region(dataset: Any) -> tuple[slice, slice, tuple[float, float]]:
    """Rows, columns and spacing (rows, columns) in mm of the first 2-D tissue region."""
    whole = slice(0, int(dataset.Rows)), slice(0, int(dataset.Columns)), (1.0, 1.0)
    for region in dataset.get("SequenceOfUltrasoundRegions", ()):
        if region.get("RegionSpatialFormat") != 1 or region.get("RegionDataType") != 1:
            continue
        x0, x1 = int(region.RegionLocationMinX0), int(region.RegionLocationMaxX1)
        y0, y1 = int(region.RegionLocationMinY0), int(region.RegionLocationMaxY1)
        # A file shrunk after acquisition keeps its old coordinates: pydicom's own loop does.
        k = max(-(-(x1 + 1) // whole[1].stop), -(-(y1 + 1) // whole[0].stop), 1)
        if not (0 <= x0 < x1 and 0 <= y0 < y1 and k <= 8):
            continue
        spacing = 1.0, 1.0
        if region.get("PhysicalUnitsXDirection") == CENTIMETRES:
            spacing = (
                abs(float(region.PhysicalDeltaY)) * 10 * k,
                abs(float(region.PhysicalDeltaX)) * 10 * k,
            )
        return slice(y0 // k, (y1 + 1) // k), slice(x0 // k, (x1 + 1) // k), spacing
    return whole


def _fps(dataset: Any) -> float:
    for name in ("FrameTime", "FrameTimeVector"):
        milliseconds = np.atleast_1d(np.asarray(dataset.get(name) or 0, np.float64))
        if (milliseconds > 0).any():
            return float(1000 / milliseconds[milliseconds > 0].mean())
    return float(dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate") or 30)
