"""`heartbeat-bench real`: real patients' conditions in, what a segmenter sees of them in the clips
out.

Reads CAMUS' layout: patientXXXX/patientXXXX_4CH_half_sequence.nii.gz with its _gt beside. No pixel
of a patient is stored, only figures. The segmenter has seen phantoms alone, as has the model.
"""

from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_fast.errors import FileError
from heartbeat_fast.formats import open_record
from heartbeat_fast.generator import Generator
from heartbeat_training import metrics
from heartbeat_training.evaluate import Judge

CONDITIONS = ("text", "image", "sketch", "mask", "skeleton", "flow")


def run(
    bundle: str | Path | None, judge: Judge, folder: Path, patients: int, steps: int
) -> dict[str, Any]:
    """LV Dice and EF (area–length) of clips made from real conditions; one row a patient.

    Raises: FileError when the folder holds no such sequence; otherwise as the generator does.
    """
    generator = Generator.open(bundle)
    manifest = generator.bundle.manifest
    files = sorted(folder.glob("patient*/patient*_4CH_half_sequence.nii.gz"))[:patients]
    if not files:
        raise FileError(f"{folder}: no patient*/patient*_4CH_half_sequence.nii.gz in it")
    rows = []
    for file in track(files, description="patients", transient=True):
        record = open_record(file).standardised(manifest.frames, manifest.size)
        assert record.labels is not None
        clip = generator(record.conditions(CONDITIONS), steps=steps, seed=1)
        seen = judge(clip.frames)
        rows.append(
            {
                "patient": file.parent.name,
                "dice": metrics.dice(seen, record.labels),
                "ef": metrics.ef_area_length(seen),
                "ef_asked": metrics.ef_area_length(record.labels),
            }
        )
    dice, ef, asked = (np.array([row[k] for row in rows]) for k in ("dice", "ef", "ef_asked"))
    return {
        "fingerprint": fingerprint(generator.bundle),
        "workload": {"conditions": CONDITIONS, "steps": steps, "patients": len(rows)},
        "summary": {
            "dice_mean": float(dice.mean()),
            "dice_median": float(np.median(dice)),
            "dice_worst": float(dice.min()),
            "ef_r": metrics.pearson(ef, asked),
            "ef_bias": float((ef - asked).mean()),
        },
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The summary as one sentence."""
    s, count = result["summary"], result["workload"]["patients"]
    return (
        f"On the conditions of {count} interpolated CAMUS half sequences the LV segmented from the "
        f"generated frames meets the patients' masks with a Dice of {s['dice_mean']:.3f} (median "
        f"{s['dice_median']:.3f}, worst {s['dice_worst']:.3f}); EF by area–length against the "
        f"masks': r {s['ef_r']:.2f}, bias {s['ef_bias']:+.1f} points."
    )
