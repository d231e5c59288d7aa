import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from heartbeat_fast.errors import ConditionError, FileError
from heartbeat_fast.text import Tokenizer, train_tiny_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
CLIP = SHARED / "data/sd15/runwayml-stable-diffusion-v1-5/tokenizer"
GOLDEN = SHARED / "data/clip/golden_tokens.json"
PROMPTS = ["An ECHO with 2-chamber view.", "An ECHO with 4-chamber view.", "An ECHO."]


@pytest.mark.skipif(not (CLIP.is_dir() and GOLDEN.is_file()), reason="no ../shared CLIP vocabulary")
def test_clip_ids_are_openai_s() -> None:
    tokenizer = Tokenizer.from_clip_folder(CLIP)
    assert tokenizer.vocab_size == 49408
    for case in json.loads(GOLDEN.read_text())["cases"]:
        if case["full_len"] > 77:
            with pytest.raises(ConditionError, match=rf"text: {case['full_len']} tokens came"):
                tokenizer.encode(case["text"])
            continue
        ids = tokenizer.encode(case["text"])
        assert (ids.shape, ids.dtype) == ((1, 77), np.int64)
        count = len(case["ids"])
        assert ids[0, :count].tolist() == case["ids"], case["text"]
        assert (ids[0, count:] == 49407).all()  # CLIP pads with its end token


def test_tiny_vocabulary_encodes_anything() -> None:
    tokenizer = train_tiny_tokenizer(PROMPTS)
    assert tokenizer.vocab_size <= 512
    ids = tokenizer.encode("")
    assert ids[0, 0] == 0
    assert (ids[0, 1:] == 1).all()
    assert len(np.flatnonzero(tokenizer.encode(PROMPTS[0])[0] > 1)) < 12  # merges were learnt
    for text in ("ÉCHO ½ µm — 心脏", "\x00 \x7f", "an echo"):
        assert tokenizer.encode(text).max() < tokenizer.vocab_size
    assert np.array_equal(tokenizer.encode("AN  echo"), tokenizer.encode("an ECHO"))
    assert not np.array_equal(tokenizer.encode(PROMPTS[0]), tokenizer.encode(PROMPTS[1]))


def test_saved_vocabulary_reads_back(tmp_path: Path) -> None:
    tokenizer = train_tiny_tokenizer(PROMPTS)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.open(tmp_path / "tokenizer.json")
    assert np.array_equal(again.encode(PROMPTS[0]), tokenizer.encode(PROMPTS[0]))
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_padding_token_of_the_file_wins(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tiny_tokenizer(PROMPTS).save(path)
    content = json.loads(path.read_text())
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 7,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    path.write_text(json.dumps(content))
    assert (Tokenizer.open(path).encode("")[0, 2:] == 7).all()


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from heartbeat_fast.text import train_tiny_tokenizer as t\n"
        f"t({PROMPTS!r}).save(sys.argv[1])"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_too_long_names_the_limit() -> None:
    with pytest.raises(ConditionError, match=r"text: \d+ tokens came; wanted at most 77"):
        train_tiny_tokenizer(PROMPTS).encode("mitral valve " * 40)


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": {}}', b"\xff\xfe"])
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"tokenizer\.json"):
        Tokenizer.open(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        Tokenizer.open(tmp_path / "tokenizer.json")
    with pytest.raises(FileError, match=r"vocab\.json"):
        Tokenizer.from_clip_folder(tmp_path)


def test_a_vocabulary_without_end_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tiny_tokenizer(PROMPTS).save(path)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|stop|>"))
    with pytest.raises(FileError, match="endoftext"):
        Tokenizer.open(path)
