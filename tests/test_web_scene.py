"""What the page's controls mean: painted labels travel with the heart, a dragged valve takes tissue
along.
"""

import base64
from typing import Any

import numpy as np
import pytest

from heartbeat_fast.anatomy import sample_anatomy
from heartbeat_fast.errors import ConditionError
from heartbeat_fast.heart import Shape, move
from heartbeat_fast.serve.scene import Controls, Paint, carried, scene

F, SIDE = 8, 96


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("frame", [0, 3, 7])
def test_painted_labels_follow_the_motion(frame: int) -> None:
    """The heart's own labels of one frame, as if painted, give back those of all others."""
    shape = Shape(sample_anatomy(3, coverage=1.0, ef=0.68), SIDE)
    motion = move(shape, F)
    labels = carried(Paint(motion.labels[frame].copy(), frame), shape, motion)
    assert np.array_equal(labels[frame], motion.labels[frame])
    for label in (1, 2, 3):
        agreement = dice(labels == label, motion.labels == label)
        assert agreement > 0.95, f"label {label}: Dice {agreement:.3f}"
    still = dice(np.repeat(motion.labels[:1], F, 0) == 1, motion.labels == 1)
    assert still < 0.92, "a heart that hardly moves would prove nothing"


def test_painted_labels_are_copied() -> None:
    painted = np.zeros((SIDE, SIDE), np.uint8)
    painted[10:20, 30:40] = 1
    message = {"frame": 2, "labels": base64.b64encode(painted).decode(), "carry": "copy"}
    made = scene(Controls().updated({"paint": message}, F, SIDE), F, SIDE)
    assert (made.labels == painted).all()
    assert made.conditions.mask is not None
    assert (made.conditions.mask == painted).all()


def test_dragged_valve_takes_its_surroundings_along() -> None:
    plain, moved = (scene(Controls(valve=by), F, SIDE) for by in ((0.0, 0.0), (6.0, -5.0)))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for t in range(F):
        centres = [
            np.array([(line * columns).sum(), (line * rows).sum()]) / line.sum()
            for line in (plain.skeleton[t], moved.skeleton[t])
        ]
        assert centres[1] - centres[0] == pytest.approx([6.0, -5.0], abs=1)
    border = [int((s.labels[0] == 3).any(1).argmax()) for s in (plain, moved)]
    assert border[1] < border[0], "the atrium's roof rises with the valve"
    apex = [int((s.labels[0] == 1).any(1).argmax()) for s in (plain, moved)]
    assert apex[1] == apex[0], "the far apex stays"


def test_beat_lasts_as_long_as_the_heart_rate_says() -> None:
    made = scene(Controls(heart_rate=75.0), F, SIDE)
    assert (F - 1) / made.fps == pytest.approx(0.8)
    assert made.conditions.present == ("text", "ef", "mask", "skeleton", "flow")
    assert made.conditions.text == "An ECHO with 4-chamber view."


def test_lower_ejection_fraction_empties_less() -> None:
    def stroke(ef: float) -> float:
        area = (scene(Controls(ef=ef), F, SIDE).labels == 1).sum((1, 2))
        return float(1 - area.min() / area[0])

    assert stroke(25) < stroke(45) < stroke(65)


def test_image_gives_a_sketch() -> None:
    image = base64.b64encode(np.full((SIDE, SIDE), 90, np.uint8)).decode()
    controls = Controls().updated({"image": image, "use": ["sketch", "image"]}, F, SIDE)
    assert scene(controls, F, SIDE).conditions.present == ("image", "sketch")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"colour": 1}, "'colour' unknown"),
        ({"ef": True}, "ef: True came; wanted 15 to 80"),
        ({"ef": float("nan")}, "ef: nan came"),
        ({"steps": 2.5}, "steps: 2.5 came"),
        ({"view": "PLAX"}, "wanted one of A2C, A4C"),
        ({"use": "mask"}, "use: 'mask' came"),
        ({"use": ["masks"]}, "masks unknown"),
        ({"valve": [1]}, r"valve: \[1\] came"),
        ({"valve": [99, 0]}, "valve: 99 came"),
        ({"paint": {"frame": 0, "labels": "AAAA"}}, "paint.labels: 3 bytes came"),
        ({"paint": {"frame": 0, "labels": "*"}}, "paint.labels: not base64"),
        (
            {"paint": {"frame": 99, "labels": base64.b64encode(bytes(SIDE**2)).decode()}},
            "frame: 99",
        ),
        ({"paint": {"frame": 0, "labels": base64.b64encode(b"\4" * SIDE**2).decode()}}, "4 came"),
        ({"image": 3}, "image: 0 bytes came"),
        ({"text": 3}, "text: 3 came"),
    ],
)
def test_wrong_controls_are_named(message: Any, says: str) -> None:
    with pytest.raises(ConditionError, match=says):
        Controls().updated(message, F, SIDE)
