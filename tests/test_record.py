from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.errors import ConditionError, RecordError
from heartbeat_fast.record import Record, view_in


def made(frames: int = 16, height: int = 64, width: int = 64, **fields: Any) -> Record:
    """Speckle with an LV over an LA, and exact line and motion."""
    shape = (frames, height, width)
    labels = np.zeros(shape, np.uint8)
    labels[:, 10:30, 20:40], labels[:, 30:50, 20:40] = 1, 3
    skeleton = np.zeros(shape, np.float32)
    skeleton[:, 30, 20:40] = 1
    fields = {
        "labels": labels,
        "skeleton": skeleton,
        "flow": np.ones((frames, 2, height, width), np.float32),
        "spacing_mm": (0.5, 0.5),
        "fps": 32.0,
        "view": "A4C",
        "ef": 55.0,
        **fields,
    }
    pixels = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    return Record(frames=pixels, **fields)


def test_padding_is_centred_and_spacing_follows() -> None:
    record = made(height=60, width=80).standardised(16, 40)
    assert record.frames.shape == (16, 40, 40)
    assert not record.frames[:, :5].any()  # 10 of 80 rows of padding on each side
    assert not record.frames[:, -5:].any()
    assert record.frames[:, 5:-5].all()
    assert record.spacing_mm == (1.0, 1.0)
    assert record.flow is not None
    assert np.allclose(record.flow[:, :, 8:-8], 0.5)  # half the size, half the pixels a frame


def test_frames_shrink_by_area_and_labels_by_nearest() -> None:
    original = made()
    record = original.standardised(16, 32)
    mean = original.frames.reshape(16, 32, 2, 32, 2).mean((2, 4))
    assert np.abs(record.frames - mean).max() <= 1  # two passes, each rounded
    assert record.labels is not None
    assert set(np.unique(record.labels)) == {0, 1, 3}
    assert np.array_equal(record.labels[:, 5:15, 10:20], np.full((16, 10, 10), 1))


def test_frames_are_picked_evenly_and_last_as_long() -> None:
    original = made(22)
    record = original.standardised(16, 64)
    picked = np.linspace(0, 21, 16).round().astype(int)
    assert np.array_equal(record.frames, original.frames[picked])
    assert record.fps == pytest.approx(32 * 15 / 21)
    assert record.flow is None  # it spans skipped frames no more
    assert record.skeleton is not None


def test_as_it_should_be_stays_as_it_is() -> None:
    record = made()
    assert record.standardised(16, 64).frames is record.frames
    assert record.standardised(16, 64).flow is record.flow


def test_a_still_becomes_a_still_clip() -> None:
    record = made(1).standardised(16, 64)
    assert (record.frames == record.frames[0]).all()
    assert record.fps == 32


@pytest.mark.parametrize("count", [3, 7, 65, 400])
def test_what_is_no_beat_is_refused(count: int) -> None:
    with pytest.raises(RecordError, match=rf"frames: {count} came; wanted 1 .* Record\.window"):
        made(count).standardised()


def test_window_cuts_a_beat_out() -> None:
    record = made(30).window(5, 21)
    assert len(record.frames) == 16
    assert record.flow is not None
    assert record.flow[:15].all()
    assert not record.flow[15].any()
    with pytest.raises(RecordError, match="window: 20:40 came; wanted within 0:30"):
        made(30).window(20, 40)


def test_exact_arrays_win_over_extraction() -> None:
    record = made()
    conditions = record.conditions()
    assert conditions.present == NAMES
    assert conditions.text == "An ECHO with 4-chamber view."
    assert np.array_equal(conditions.skeleton, record.skeleton)  # type: ignore[arg-type]
    assert (conditions.flow[:15] == 1).all()  # type: ignore[index]
    extracted = replace(record, skeleton=None, flow=None).conditions()
    assert extracted.present == NAMES
    assert not np.array_equal(extracted.skeleton, record.skeleton)  # type: ignore[arg-type]


def test_a_bare_clip_gives_what_it_can() -> None:
    bare = Record(frames=made().frames)
    assert bare.conditions().present == ("text", "image", "sketch", "flow")
    assert bare.conditions().text == "An ECHO."
    assert bare.conditions(["image"]).present == ("image",)
    with pytest.raises(ConditionError, match="mask asked for but not given; given: text"):
        bare.conditions(["text", "mask"])


def test_an_atrium_out_of_view_means_no_skeleton() -> None:
    record = replace(made(), skeleton=None, labels=made().labels % 2)  # type: ignore[operator]
    blind = replace(record, labels=np.where(record.labels == 3, 0, record.labels))  # type: ignore[arg-type]
    blind.labels[:, 30:50] = 0  # type: ignore[index]
    assert "skeleton" not in blind.conditions().present


def test_conditions_want_a_square() -> None:
    with pytest.raises(RecordError, match=r"64 x 80 came; wanted a square: use Record\.stand"):
        made(width=80).conditions()


PIXELS = np.zeros((4, 8, 8), np.uint8)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "float frames": ({"frames": PIXELS / 2}, "frames: float64"),
    "colour frames": (
        {"frames": np.zeros((4, 8, 8, 3), np.uint8)},
        r"frames: uint8 \(4, 8, 8, 3\)",
    ),
    "no frames": ({"frames": PIXELS[:0]}, "frames: uint8"),
    "labels of another size": ({"labels": PIXELS[:, :4]}, r"labels: shape \(4, 4, 8\) came"),
    "labels beyond": ({"labels": PIXELS + 9}, "labels: uint8 up to 9 came; wanted uint8 0 to 3"),
    "skeleton": ({"skeleton": PIXELS[:1]}, "skeleton: shape"),
    "flow": ({"flow": np.zeros((4, 8, 8))}, r"flow: shape .* wanted \(4, 2, 8, 8\)"),
    "fps": ({"fps": 0.0}, "fps: 0.0 came; wanted a positive"),
    "spacing": ({"spacing_mm": (0.3, float("nan"))}, "spacing_mm: nan came"),
    "view": ({"view": "PLAX"}, "view: 'PLAX' came; wanted A2C, A4C or unknown"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_inconsistent_records_are_refused(case: str) -> None:
    fields, message = WRONG[case]
    with pytest.raises(RecordError, match=message):
        Record(**{"frames": PIXELS, **fields})


@pytest.mark.parametrize(
    ("words", "view"),
    [
        ("patient0001_4CH_half_sequence", "A4C"),
        ("A2C", "A2C"),
        ("Apical four-chamber", "A4C"),
        ("An ECHO with 2-chamber view.", "A2C"),
        ("clip", "unknown"),
        ("frame 24", "unknown"),
    ],
)
def test_views_are_read_from_words(words: str, view: str) -> None:
    assert view_in(words) == view
