"""A clip as DICOM Ultrasound Multi-frame that viewers take, and nobody takes for a patient's.

PS3.3 A.7.4: the patient, study, series, equipment, image, pixel, cine, multi-frame, US region
calibration, US image and SOP common modules. The standard has no place for a sector's edges: with
all other provenance they go as JSON into ImageComments, after the words (validators warn of
private tags).
"""

from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heartbeat_fast import __version__
from heartbeat_fast.clip import Clip, marked
from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import atomic
from heartbeat_fast.formats.dicom import CENTIMETRES

MAKER = "heartbeat_fast (synthetic)"
WARNING = "Synthetic image made by a generative model; not of a patient, not for diagnosis."
LONGEST_SIDE = 65535  # Rows and Columns are 16 bits wide
LONGEST_TEXT = 10240  # characters of an LT value


def write(path: Path, clip: Clip, *, mark: bool) -> None:
    """Writes one object, whole or not at all. Only UIDs and times differ between two writings.

    Args:
        mark: burn a visible SYNTHETIC into the pixels; BurnedInAnnotation follows it.

    Raises:
        FileError: the clip is too large for the format, its provenance too long, or the file cannot
            be written.
        MissingDependency: pydicom is not installed.
    """
    pydicom = optional("pydicom", "dicom")
    if max(clip.frames.shape[1:]) > LONGEST_SIDE:
        raise FileError(f"{path}: {clip.frames.shape[1:]} pixels came; wanted below 65536 a side")
    if len(note := clip.note()) > LONGEST_TEXT - 2500:  # the prompt is repeated in words
        raise FileError(f"{path}: {len(note)} characters of provenance; wanted at most 7740")
    data = pydicom.Dataset()
    _identify(pydicom, data)
    _describe(pydicom, data, clip, mark)
    _time(pydicom, data, clip)
    _place(pydicom, data, clip)
    _fill(data, _drawn(clip) if mark else clip.frames)
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    content = BytesIO()  # pydicom wraps a full disk's error in a page of traceback
    data.save_as(content, enforce_file_format=True)
    with atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _drawn(clip: Clip) -> NDArray[np.uint8]:
    return np.stack([np.asarray(marked(Image.fromarray(frame))) for frame in clip.frames])


def _identify(pydicom: Any, data: Any) -> None:
    """Patient, study, series, equipment, SOP common: a series of its own for every file."""
    now = datetime.now(UTC)
    uid = pydicom.uid.generate_uid
    data.SOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
    data.SOPInstanceUID, data.StudyInstanceUID, data.SeriesInstanceUID = uid(), uid(), uid()
    data.SyntheticData = "YES"
    data.PatientName, data.PatientID = (
        "SYNTHETIC^HeartBeat",
        f"SYNTHETIC-{data.StudyInstanceUID[-12:]}",
    )
    data.PatientBirthDate = data.PatientSex = ""
    data.ReferringPhysicianName = data.AccessionNumber = ""
    for what in ("Study", "Series", "Content", "InstanceCreation"):
        setattr(data, f"{what}Date", now.strftime("%Y%m%d"))
        setattr(data, f"{what}Time", now.strftime("%H%M%S"))
    data.TimezoneOffsetFromUTC = "+0000"
    data.StudyID, data.SeriesNumber, data.InstanceNumber = "SYNTHETIC", 1, 1
    data.Modality, data.PatientOrientation = "US", ""
    data.Manufacturer, data.ManufacturerModelName = MAKER, "heartbeat_fast"
    data.DeviceSerialNumber, data.SoftwareVersions = "none", __version__


def _describe(pydicom: Any, data: Any, clip: Clip, mark: bool) -> None:
    """What it shows, in words, and the anatomy in codes."""
    text = str(clip.provenance.get("text") or "An ECHO.")
    made = clip.provenance
    data.StudyDescription = "SYNTHETIC echocardiogram, not for diagnosis"
    data.SeriesDescription = f"SYNTHETIC {_plain(text)}"[:64]
    data.DerivationDescription = (
        f"{WARNING} Bundle {made.get('bundle')}, engine {made.get('engine')}, "
        f"sampler {made.get('sampler')}, {made.get('steps')} steps, seed {made.get('seed')}."
    )[:1024]
    ef = made.get("ef")
    words = f"{WARNING} {_plain(text)}" + (f" EF {ef:.0f} %." if ef is not None else "")
    data.ImageComments = f"{words}\n{clip.note()}"
    data.ImageType = ["DERIVED", "PRIMARY", "TTE", "0001"]
    data.ContentQualification = "RESEARCH"
    data.BurnedInAnnotation = "YES" if mark else "NO"
    data.LossyImageCompression = "00"
    data.BodyPartExamined = "HEART"
    heart = pydicom.Dataset()
    heart.CodeValue, heart.CodingSchemeDesignator, heart.CodeMeaning = "80891009", "SCT", "Heart"
    data.AnatomicRegionSequence = [heart]


def _plain(text: str) -> str:
    """Within the default character repertoire, without the separator of values."""
    return " ".join(text.encode("ascii", "replace").decode().replace("\\", "/").split())


def _time(pydicom: Any, data: Any, clip: Clip) -> None:
    """Cine and multi-frame modules."""
    data.NumberOfFrames = len(clip.frames)
    data.FrameIncrementPointer = pydicom.tag.Tag("FrameTime")
    data.FrameTime = pydicom.valuerep.DSfloat(1000 / clip.fps, auto_format=True)
    data.CineRate = data.RecommendedDisplayFrameRate = max(1, round(clip.fps))
    data.StartTrim, data.StopTrim = 1, len(clip.frames)
    if (rate := clip.provenance.get("heart_rate")) is not None:
        data.HeartRate = round(float(rate))


def _place(pydicom: Any, data: Any, clip: Clip) -> None:
    """Region calibration: the whole picture is one tissue region in cm, from the sector's apex."""
    H, W = clip.frames.shape[1:]
    region = pydicom.Dataset()
    region.RegionSpatialFormat = region.RegionDataType = 1  # 2D, tissue
    region.RegionFlags = 2  # scale protected: the calibration is of this picture
    region.RegionLocationMinX0 = region.RegionLocationMinY0 = 0
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = W - 1, H - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = CENTIMETRES
    region.PhysicalDeltaX, region.PhysicalDeltaY = clip.spacing_mm[1] / 10, clip.spacing_mm[0] / 10
    column, row = clip.geometry.apex if clip.geometry else (0, 0)
    region.ReferencePixelX0, region.ReferencePixelY0 = round(column), round(row)
    region.ReferencePixelPhysicalValueX = region.ReferencePixelPhysicalValueY = 0.0
    data.SequenceOfUltrasoundRegions = [region]
    if clip.geometry:
        depth = round(clip.geometry.far * clip.spacing_mm[0])
        data.DepthOfScanField = depth


def _fill(data: Any, frames: NDArray[np.uint8]) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = frames.shape[1:]
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    pixels = frames.tobytes()
    data.PixelData = pixels + b"\0" * (len(pixels) % 2)
