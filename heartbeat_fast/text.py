"""Prompts to tokens without torch: CLIP's framing over any byte-level BPE vocabulary."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from heartbeat_fast.conditions import TOKENS
from heartbeat_fast.errors import ConditionError, FileError
from heartbeat_fast.files import atomic, readable
from heartbeat_fast.untrusted import parse, regular

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_BYTES = 16 * 2**20  # CLIP's own 49,408 words take 4
# What a tokenizer.json may be made of: CLIP's parts, in our spelling and in transformers'.
SPACES = r"\s+"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
PATTERNS = (SPACES, WORDS, r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
PARTS = (
    *("BPE", "ByteLevel", "Sequence", "Split", "NFC", "Replace", "Strip", "Lowercase"),
    *("RobertaProcessing", "TemplateProcessing"),
)


class Tokenizer:
    """A prompt as TOKENS ids: start, the prompt, end, padding (with end unless the file differs).

    Build one with `open`, `from_clip_folder` or `train_tiny_tokenizer`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        start, end = backend.token_to_id(START), backend.token_to_id(END)
        if start is None or end is None:
            raise FileError(f"tokenizer: lacks {START} or {END}; wanted a CLIP-style vocabulary")
        self._start, self._end = start, end
        padding: dict[str, Any] | None = backend.padding
        self._pad = padding["pad_id"] if padding else end
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def open(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
            FileError: missing, not a tokenizer, or without start and end tokens.
        """
        try:
            content = regular(readable(path), MAX_BYTES)
            _check(parse(content, MAX_BYTES))
            return cls(tokenizers.Tokenizer.from_buffer(content))
        except FileError:
            raise
        except BaseException as error:  # bare Exception for every fault, and for Rust's panics less
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise FileError(f"{path}: not a tokenizer.json ({error})") from error

    @classmethod
    def from_clip_folder(cls, folder: str | Path) -> "Tokenizer":
        """CLIP's own vocabulary (Stable Diffusion 1.5's `tokenizer/`): vocab.json and merges.txt.

        Normalisation and splitting as in openai/CLIP `simple_tokenizer.py`.

        Raises:
            FileError: one of the two files is missing or malformed.
        """
        vocab, merges = (readable(Path(folder) / name) for name in ("vocab.json", "merges.txt"))
        try:
            model = models.BPE.from_file(
                str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=END
            )
        except Exception as error:  # the library raises bare Exception for every fault
            raise FileError(f"{folder}: not a CLIP vocabulary ({error})") from error
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = _clip_normalizer()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._backend.get_vocab_size())

    def encode(self, text: str) -> NDArray[np.int64]:
        """The prompt's ids, int64 (1,77).

        Raises:
            ConditionError: longer than 77 tokens with start and end.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if len(ids) > TOKENS - 2:
            raise ConditionError(
                f"text: {len(ids) + 2} tokens came; wanted at most {TOKENS}, start and end included"
            )
        out = np.full((1, TOKENS), self._pad, np.int64)
        out[0, : len(ids) + 2] = [self._start, *ids, self._end]
        return out

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json that `open` reads back.

        Raises:
            FileError: cannot be written; nothing is left half-written.
        """
        with atomic(path) as temporary:
            temporary.write_text(self._backend.to_str(pretty=True), encoding="utf-8")


def train_tiny_tokenizer(prompts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
    """A byte-level BPE over these prompts: lower case, and any other string encodes too.

    Args:
        prompts: the training prompts; the same prompts give the same vocabulary.
        vocab_size: 256 bytes, 2 special tokens, and merges for the rest.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = _clip_normalizer()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sorted(prompts), trainer)
    return Tokenizer(backend)


def _check(value: Any) -> None:
    """Refuses what a tokenizer file can ask for and CLIP's never does: slow or foreign patterns.

    A pattern is a program: one with nested repeats takes longer than anyone lives.

    Raises:
        FileError: an unknown part, pattern or special token.
    """
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo += item
        if not isinstance(item, dict):
            continue
        kind, pattern = item.get("type", "BPE"), item.get("Regex", SPACES)
        if not (isinstance(kind, str) and kind in PARTS):
            raise FileError(f"tokenizer: part {str(kind)[:40]!r} came; wanted {', '.join(PARTS)}")
        if kind == "Replace" and item.get("content") != " ":  # longer ones multiply
            raise FileError("tokenizer: a replacement other than one space came: refused")
        if pattern not in PATTERNS or "String" in item:
            raise FileError(f"tokenizer: pattern {str(pattern)[:40]!r} is none of CLIP's: refused")
        todo += [part for key, part in item.items() if key not in ("vocab", "merges")]
    for token in value.get("added_tokens", ()) if isinstance(value, dict) else ():
        if not isinstance(token, dict) or token.get("content") not in (START, END):
            raise FileError(
                f"tokenizer: special token {str(token)[:40]} came; wanted {START}, {END}"
            )


def _clip_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(SPACES), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
