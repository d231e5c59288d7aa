"""What several test files share: a nano model with random weights, and its exported bundle."""

from collections.abc import Iterator

import pytest
import torch

from heartbeat_export.build import build_bundle
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.models.config import NANO
from heartbeat_fast.models.graphs import round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer, train_tiny_tokenizer

PROMPTS = ["An ECHO with 2-chamber view.", "An ECHO with 4-chamber view.", "An ECHO."]


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled graphs and verdicts of tests stay out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEARTBEAT_CACHE", str(tmp_path_factory.mktemp("cache") / "engines"))
        yield


@pytest.fixture(scope="session")
def nano_model() -> HeartBeat:
    """Random weights in every layer: what starts at zero could not show a difference."""
    torch.manual_seed(0)
    model = HeartBeat(NANO).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return round_to_half(model)


@pytest.fixture(scope="session")
def nano_tokenizer() -> Tokenizer:
    return train_tiny_tokenizer(PROMPTS, vocab_size=300)


@pytest.fixture(scope="session")
def nano_bundle(
    nano_model: HeartBeat, nano_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The nano model, exported; tests that alter a bundle copy it first."""
    folder = tmp_path_factory.mktemp("bundle") / "nano"
    provenance = {"data": "none: random weights"}
    build_bundle(nano_model, nano_tokenizer, folder, revision="test", provenance=provenance)
    return Bundle.open(folder)
