from typing import Any

import numpy as np
import pytest

from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.errors import ConditionError

F, S = 4, 64
LABELS = np.zeros((F, S, S), np.uint8)
LABELS[:, 10:30, 20:40], LABELS[:, 30:50, 20:40] = 1, 3
LINE = np.zeros((F, S, S), np.float32)
LINE[:, 30, 20:40] = 1
FULL: dict[str, Any] = {
    "text": "An ECHO with 4-chamber view.",
    "ef": 55,
    "image": np.full((S, S), 128, np.uint8),
    "sketch": np.full((S, S), 0.5),
    "mask": LABELS,
    "skeleton": LINE,
    "flow": np.ones((F, 2, S, S), np.float32),
}


def make(**given: Any) -> Conditions:
    return Conditions(**given, frames=F, size=S)


def test_arrays_have_the_graphs_shapes() -> None:
    for conditions in (make(), make(**FULL)):
        arrays = conditions.arrays()
        assert {name: array.shape for name, array in arrays.items()} == {
            "ef": (1, 1),
            "image": (1, 3, S, S),
            "sketch": (1, 1, S, S),
            "mask": (1, F, 4, S, S),
            "skeleton": (1, F, 1, S, S),
            "flow": (1, F, 2, S, S),
            "present": (1, 7),
        }
        assert all(array.dtype == np.float32 for array in arrays.values())
    assert Conditions().arrays()["flow"].shape == (1, 16, 2, 256, 256)


def test_values_arrive() -> None:
    arrays = make(**FULL).arrays()
    assert arrays["ef"][0, 0] == np.float32(0.55)
    assert np.allclose(arrays["image"], 128 / 255)
    assert np.array_equal(arrays["mask"][0].argmax(1), LABELS)
    assert (arrays["mask"].sum(2) == 1).all()
    assert np.array_equal(arrays["skeleton"][0, :, 0], LINE)
    assert (arrays["flow"][0, :-1] == 1).all()
    assert (arrays["flow"][0, -1] == 0).all()  # the last frame moves to nowhere
    assert (arrays["present"] == 1).all()


def test_absent_is_zero_and_flagged() -> None:
    conditions = make(ef=40, text="  ")
    assert conditions.present == ("ef",)  # the empty prompt is the absent prompt
    arrays = conditions.arrays()
    assert arrays["present"].tolist() == [[0, 1, 0, 0, 0, 0, 0]]
    assert not any(arrays[name].any() for name in NAMES[2:])


@pytest.mark.parametrize("name", NAMES)
def test_only_keeps_what_is_named(name: str) -> None:
    one = make(**FULL).only([name])
    assert one.present == (name,)
    assert (one.frames, one.size) == (F, S)


def test_only_refuses_what_is_not_there() -> None:
    with pytest.raises(ConditionError, match="conditions: valve unknown; wanted any of text, ef"):
        make(**FULL).only(["valve"])
    with pytest.raises(ConditionError, match="conditions: mask, flow asked for but not given"):
        make(text="a").only(["flow", "mask", "text"])


def test_a_single_frame_holds_for_the_clip() -> None:
    one = make(mask=LABELS[0], skeleton=LINE[:1], flow=np.ones((2, S, S)))
    for name in ("mask", "skeleton", "flow"):
        assert getattr(one, name).shape[0] == F
    assert np.array_equal(one.mask, LABELS)  # type: ignore[arg-type]
    assert one.flow is not None
    assert one.flow[-1].any() == 0


def test_every_accepted_form_is_the_same_condition() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (S, S), np.uint8)
    forms = (grey, np.stack([grey] * 3, -1), np.stack([grey] * 3), grey / 255)
    for form in forms:
        assert np.allclose(make(image=form).image, grey / 255, atol=1e-6)  # type: ignore[arg-type]
    one_hot = np.moveaxis(np.eye(4)[LABELS], -1, 1)
    for mask in (LABELS, LABELS.astype(np.int64), LABELS.astype(float), one_hot):
        assert np.array_equal(make(mask=mask).mask, LABELS)  # type: ignore[arg-type]


def test_the_callers_arrays_are_copied() -> None:
    flow, line = np.ones((F, 2, S, S), np.float32), LINE.copy()
    conditions = make(flow=flow, skeleton=line)
    line[:] = 0
    assert (flow == 1).all()
    assert conditions.skeleton is not None
    assert conditions.skeleton.any()


def changed(array: Any, index: Any, value: float) -> np.ndarray[Any, Any]:
    copy = np.array(array, np.float32)
    copy[index] = value
    return copy


WRONG: dict[str, tuple[str, Any, str]] = {
    "text not a string": ("text", 3, "text: a int came; wanted a string"),
    "text of a novel": ("text", "a" * 5000, "text: 5000 characters came; wanted at most 77"),
    "ef above": ("ef", 130, "ef: 130 came; wanted percent"),
    "ef as words": ("ef", "high", "ef: 'high' came; wanted percent"),
    "ef nan": ("ef", float("nan"), "ef: nan came"),
    "image of four channels": ("image", np.zeros((S, S, 4)), r"image: shape \(64, 64, 4\) came"),
    "image size": ("image", np.zeros((48, 64, 3)), "image: 48 rows x 64 columns came; wanted 64"),
    "image range": (
        "image",
        np.full((S, S), 128.0),
        "image: values 128 to 128 came; wanted 0 to 1",
    ),
    "image nan": ("image", changed(np.zeros((S, S)), 0, np.nan), "image: 64 NaN or infinite"),
    "image of objects": ("image", np.array([None]), "image: object of shape"),
    "image empty": ("image", np.zeros((0, S)), "image: float64 of shape"),
    "sketch sequence": ("sketch", np.zeros((F, S, S)), r"sketch: shape \(4, 64, 64\) came"),
    "sketch uint8": ("sketch", np.full((S, S), 255, np.uint8), "sketch: values 255 to 255 came"),
    "mask 3 frames": ("mask", LABELS[:3], r"mask: 3 frames came.*standardised\(frames=4\)"),
    "mask 400 frames": ("mask", np.tile(LABELS, (100, 1, 1)), "mask: 400 frames came; wanted 1 or"),
    "mask labels": ("mask", LABELS + 2, "mask: values 5 came; wanted labels 0 background"),
    "mask negative": ("mask", changed(LABELS, 0, -1), "mask: values -1 came"),
    "mask interpolated": ("mask", LABELS * 0.5, "mask: values 0.5, 1.5 came"),
    "mask all zero": ("mask", LABELS * 0, "mask: every frame came all zero"),
    "mask one frame zero": ("mask", changed(LABELS, 2, 0), "mask: frame 2 came all zero"),
    "mask nan": ("mask", changed(LABELS, (0, 0, 0), np.nan), "mask: 1 NaN or infinite"),
    "mask size": ("mask", np.ones((F, 32, 32)), "mask: 32 rows x 32 columns came.*standardised"),
    "mask classes": ("mask", np.ones((F, 3, S, S)), r"mask: shape \(4, 3, 64, 64\) came"),
    "mask soft": ("mask", np.full((F, 4, S, S), 0.25), "mask: soft or overlapping classes came"),
    "skeleton range": ("skeleton", LINE * 255, "skeleton: values 0 to 255 came; wanted 0 to 1"),
    "skeleton frames": ("skeleton", LINE[:2], "skeleton: 2 frames came; wanted 1 or 4: resample"),
    "flow shape": ("flow", np.ones((F, S, S)), r"flow: shape .* came; wanted \(4,2,64,64\)"),
    "flow channels last": ("flow", np.ones((F, S, S, 2)), r"flow: shape \(4, 64, 64, 2\) came"),
    "flow infinite": ("flow", np.full((F, 2, S, S), np.inf), "flow: .* NaN or infinite"),
    "flow too fast": ("flow", np.full((F, 2, S, S), 900.0), "flow: 900 pixels a frame came"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_wrong_input_names_field_and_wish(case: str) -> None:
    name, value, message = WRONG[case]
    with pytest.raises(ConditionError, match=message) as caught:
        make(**{name: value})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{name}:")
