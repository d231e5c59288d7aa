"""A running generator takes new weights up between clips, and bad ones never."""

import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from heartbeat_export import store
from heartbeat_export.parity import beating_ring
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.generator import Generator


@pytest.fixture
def bundle(nano_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(nano_bundle.path, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def ring(nano_bundle: Bundle) -> Conditions:
    return beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)


def switch(bundle: Bundle, factor: float) -> Bundle:
    """A version whose denoiser has other weights, put in place as a rebuild does."""
    now = Bundle.open(bundle.path)
    spec = now.manifest.graphs["denoise"]
    proto = onnx.load_from_string(now.read(spec))
    tensor = next(t for t in proto.graph.initializer if "conv_out.weight" in t.name)
    tensor.CopyFrom(
        numpy_helper.from_array(
            (numpy_helper.to_array(tensor) * factor).astype(numpy_helper.to_array(tensor).dtype),
            tensor.name,
        )
    )
    file = store.put(now.path, "denoise.onnx", proto.SerializeToString(), store.kept(now))
    graphs = {**now.manifest.graphs, "denoise": store.named(spec, file)}
    prints = {**now.manifest.fingerprints, "weights": f"{factor}"}
    with store.locked(now.path):
        return store.commit(now, replace(now.manifest, graphs=graphs, fingerprints=prints))


def test_new_weights_come_in_between_two_clips(bundle: Bundle, ring: Conditions) -> None:
    generator = Generator.open(bundle, "onnxruntime")
    first = generator(ring, steps=2)
    after = switch(bundle, 0.5)
    second = generator(ring, steps=2)
    assert second.provenance["weights"] == "0.5"
    assert not np.array_equal(second.frames, first.frames)
    fresh = Generator.open(after, "onnxruntime")(ring, steps=2)
    assert np.array_equal(second.frames, fresh.frames)
    store.rollback(bundle.path)
    assert np.array_equal(generator(ring, steps=2).frames, first.frames)


def test_a_clip_keeps_its_weights_to_the_end(bundle: Bundle, ring: Conditions) -> None:
    """Switched after the first of two steps, in this thread and asked for in another."""
    generator = Generator.open(bundle, "onnxruntime")
    wanted = generator(ring, steps=2).frames

    def other(done: int, steps: int) -> None:
        if done == 1:
            switch(bundle, 0.5)
            asked = threading.Thread(target=lambda: generator.turn().__enter__())
            asked.start()
            asked.join()

    assert np.array_equal(generator(ring, steps=2, progress=other).frames, wanted)


def test_a_version_replaced_while_it_was_opened_is_noticed(
    bundle: Bundle, ring: Conditions
) -> None:
    switch(bundle, 0.5)
    generator = Generator.open(bundle, "onnxruntime")  # the bundle as it was
    assert generator(ring, steps=2).provenance["weights"] == "0.5"


def altered(after: Bundle) -> str:
    file = after.path / after.manifest.graphs["denoise"].file
    file.write_bytes(file.read_bytes()[:-1])
    return "truncated"


def no_numbers(after: Bundle) -> str:
    switch(after, float("nan"))
    return "denoise: gives no numbers"


def unreadable(after: Bundle) -> str:
    (after.path / "manifest.json").write_text("{")
    return "manifest.json"


@pytest.mark.parametrize("damage", [altered, no_numbers, unreadable])
def test_bad_versions_are_passed_over_with_one_warning(
    damage: Callable[[Bundle], str], bundle: Bundle, ring: Conditions
) -> None:
    generator = Generator.open(bundle, "onnxruntime")
    before = generator(ring, steps=2)
    message = damage(switch(bundle, 0.5))
    with pytest.warns(UserWarning, match="new weights passed over, the old go on") as said:
        assert np.array_equal(generator(ring, steps=2).frames, before.frames)
    assert message in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert np.array_equal(generator(ring, steps=2).frames, before.frames)


def test_clips_of_another_length_need_a_restart(
    bundle: Bundle, ring: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator.open(bundle, "onnxruntime")
    longer = replace(switch(bundle, 0.5).manifest, frames=8)
    monkeypatch.setattr(Bundle, "open", lambda path: Bundle(path, longer))
    with pytest.warns(UserWarning, match=r"frames and size were \(4, 64\), are \(8, 64\): restart"):
        generator(ring, steps=2)


def test_a_bundle_that_goes_away_is_not_missed(bundle: Bundle, ring: Conditions) -> None:
    generator = Generator.open(bundle, "onnxruntime")
    before = generator(ring, steps=2).frames
    shutil.rmtree(bundle.path)
    assert np.array_equal(generator(ring, steps=2).frames, before)
