"""Real patients as training data: who is held out, and the whole chain on CAMUS' layout."""

import json
from pathlib import Path

import numpy as np
import pytest

from heartbeat_training.phantom import record
from heartbeat_training.real_data import DataError, RealData, changed, pairs, plain_frames

nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed (extra: formats)")


@pytest.fixture(scope="module")
def camus(tmp_path_factory: pytest.TempPathFactory) -> RealData:
    """Five phantoms as patients; the last has no sequence."""
    root = tmp_path_factory.mktemp("camus")
    for i in range(5):
        name = f"patient{i + 1:04d}"
        item = record(i, frames=4, size=64)
        assert item.labels is not None
        files = {"ED": item.frames[0], "ED_gt": item.labels[0]}
        files |= {"ES": item.frames[-1], "ES_gt": item.labels[-1]}
        if i < 4:
            files |= {"half_sequence": item.frames, "half_sequence_gt": item.labels}
        (root / name).mkdir()
        for suffix, values in files.items():
            image = nibabel.Nifti1Image(values.T, np.diag([-0.3, -0.3, 1, 1]))
            nibabel.save(image, root / name / f"{name}_4CH_{suffix}.nii.gz")
        (root / name / "Info_4CH.cfg").write_text("ED: 1\nES: 4\nNbFrame: 4\nEF: 55\n")
    return RealData(root, hold_out=1)


def test_the_last_patients_with_a_sequence_are_held_out_of_everything(camus: RealData) -> None:
    assert camus.held_out() == ["patient0004"]
    used = [record.patient for record in camus.sequences()]
    used += [record.patient for record in camus.stills()]
    assert "patient0004" not in used
    assert sorted(set(used)) == ["patient0001", "patient0002", "patient0003", "patient0005"]


def test_few_patients_are_few_for_stills_too(camus: RealData) -> None:
    few = RealData(camus.folder, hold_out=1, patients=2)
    assert [record.patient for record in few.stills()] == ["patient0001", "patient0002"]
    assert few.held_out() == camus.held_out()
    assert len(plain_frames(few, 64)) == 2 * 4 + 2 * 2


def test_nothing_left_to_learn_from_is_an_error(camus: RealData) -> None:
    with pytest.raises(DataError, match="no patient with a clip"):
        RealData(camus.folder, hold_out=4).learners()


def test_changed_copies_move_masks_with_frames(camus: RealData) -> None:
    item = next(pairs(camus, 4, 64, 1))
    assert item.frames.shape == (2, 64, 64)
    assert item.labels is not None
    cavity, wall = item.frames[item.labels == 1].mean(), item.frames[item.labels == 2].mean()
    assert wall > cavity + 10
    again = changed(item, np.random.Generator(np.random.PCG64(1)))
    assert not np.array_equal(again.frames, item.frames)
    assert again.labels is not None
    assert again.frames[again.labels == 2].mean() > again.frames[again.labels == 1].mean() + 10


def test_nano_trains_on_patients_from_a_phantom_model(camus: RealData, tmp_path: Path) -> None:
    from heartbeat_fast.models.config import PRESETS
    from heartbeat_fast.models.heartbeat import HeartBeat
    from heartbeat_training.pipeline import STAGES_REAL, run_stage, tokenizer

    start = tmp_path / "start"
    before = HeartBeat(PRESETS["nano"])
    before.save_pretrained(start)
    tokenizer(tmp_path).save(start / "tokenizer.json")
    run = tmp_path / "run"
    for stage in STAGES_REAL:
        model = run_stage(stage, "nano", run, data=camus, init=start)
    story = json.loads((run / "model-texture/provenance.json").read_text())
    assert story["init"] == "start"
    assert story["held_out"] == ["patient0004"]
    old, new = before.state_dict(), model.state_dict()
    moved = {key for key in new if not np.array_equal(new[key].numpy(), old[key].numpy())}
    # A trained encoder stays: the latents of denoiser and codec still are the same.
    assert not any(key.startswith("codec.encoder") for key in moved)
    assert any(key.startswith("codec.decoder") for key in moved)
    assert any("temporal" in key for key in moved)
