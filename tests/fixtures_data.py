"""Small releases in the official layouts, written by the tests: real ones may not be passed on."""

import csv
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
from numpy.typing import NDArray

SIZE = 112
CHANCE = np.random.default_rng(3)


def write_avi(
    path: Path, frames: NDArray[np.uint8], codec: str = "mjpeg", pixels: str = "yuvj420p"
) -> None:
    """Motion JPEG in AVI at 50 frames per second, as EchoNet stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=50)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = pixels
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, -1), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def chords(top: float, bottom: float, half: float, centre: float = 56.0) -> list[list[float]]:
    """21 rows of a tracing: the long axis, then 20 chords of a box (top..bottom, centre±half)."""
    rows = [[centre, top, centre, bottom]]
    rows += [[centre - half, y, centre + half, y] for y in np.linspace(top, bottom, 20)]
    return rows


def moving(count: int) -> NDArray[np.uint8]:
    """Frames whose brightness is their number times ten, plus an edge: they survive JPEG."""
    frames = np.zeros((count, SIZE, SIZE), np.uint8)
    frames[:] = (np.arange(count) * 10)[:, None, None]
    return frames


def echonet(root: Path) -> Path:
    """Four videos: names with and without `.avi`, one ES before ED, one with half its tracing."""
    rows = [
        {"FileName": "0XA", "EF": 50, "FPS": 50, "Split": "TRAIN"},
        {"FileName": "0XB.avi", "EF": 60, "FPS": 40, "Split": "TEST"},
        {"FileName": "0XC", "EF": 40, "FPS": 50, "Split": "VAL"},
        {"FileName": "0XD", "EF": 40, "FPS": 50, "Split": "TRAIN"},
    ]
    small, large = chords(40, 60, 10), chords(30, 70, 20)
    traced = {"0XA": {14: small, 4: large}, "0XB": {9: small, 2: large}}
    traced |= {"0XC": {3: small, 12: large}, "0XD": {3: small}}
    write_table(root / "FileList.csv", rows)
    tracings = [
        dict(zip(("X1", "Y1", "X2", "Y2"), row, strict=True), FileName=f"{name}.avi", Frame=frame)
        for name, frames in traced.items()
        for frame, chord in frames.items()
        for row in chord
    ]
    write_table(
        root / "VolumeTracings.csv", tracings, ["FileName", "X1", "Y1", "X2", "Y2", "Frame"]
    )
    for i, name in enumerate(traced):
        write_avi(root / "Videos" / f"{name}.avi", moving(18) + np.uint8(i))
    return root


def write_table(path: Path, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def mnms(root: Path) -> Path:
    """Two training cases, one unlabelled, one test case whose labels lie in another split."""
    base = root / "OpenDataset"
    for case, image, labels in (
        ("A0S9V9", "Training/Labeled", "Training/Labeled"),
        ("B1T0W0", "Training/Labeled", "Training/Labeled"),
        ("C2U1X1", "Training/Unlabeled", "Training/Unlabeled"),
        ("J9L6N9", "Testing", "Validation"),
    ):
        values, truth = heart(empty=case == "C2U1X1")
        save_4d(base / image / case / f"{case}_sa.nii.gz", values)
        save_4d(base / labels / case / f"{case}_sa_gt.nii.gz", truth)
    rows = [
        {"": i, "External code": case, "VendorName": "Siemens", "ED": ed, "ES": es, "Age": 50}
        for i, (case, ed, es) in enumerate(
            [
                ("A0S9V9", 0, 3),
                ("B1T0W0", 1, 2),
                ("C2U1X1", 0, 0),
                ("J9L6N9", 0, 3),
                ("K0M7O0", 0, 3),
            ]
        )
    ]
    write_table(base / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv", rows)
    return root


def heart(empty: bool = False) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """(x,y,z,t) 24×20×5×4: brightness rises with z and t; LV, myocardium and RV in a row."""
    x, y, z, t = np.meshgrid(*map(np.arange, (24, 20, 5, 4)), indexing="ij")
    values = (100 * z + 10 * t + CHANCE.integers(0, 5, x.shape)).astype(np.int16)
    truth = np.zeros(x.shape, np.uint8)
    for label, left in ((1, 2), (2, 8), (3, 14)):
        truth[(x >= left) & (x < left + 5) & (y >= 4) & (y < 12)] = label
    if empty:
        truth[:] = 0
    return values, truth


def save_4d(path: Path, values: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.diag([1.25, 1.5, 10, 1]))
    image.header.set_zooms((1.25, 1.5, 10.0, 1.0))
    nibabel.save(image, path)
