"""The page in a real browser: it beats, it is drawn on, it asks nobody else for anything."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.generator import Generator
from tests.fixtures_web import Browser, chromium, serving

CLIPS = "Number(document.getElementById('clips').textContent)"


@pytest.fixture(scope="module")
def address(nano_bundle: Bundle) -> Iterator[str]:
    chromium()  # skips before a server is started
    with serving(Generator.open(nano_bundle, "onnxruntime")) as address:
        yield address


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=f"http://{address}/")
        browser.until("document.getElementById('clips')?.textContent > 0")
        yield browser
        assert browser.complaints() == []
    finally:
        browser.close()


def place(page: Browser, across: float, down: float) -> tuple[float, float]:
    """A place on the picture, as shares of its side."""
    left, top, side = page.js(
        "(({left, top, width}) => [left, top, width])"
        "(document.getElementById('picture').getBoundingClientRect())"
    )
    return left + across * side, top + down * side


def text(page: Browser, name: str) -> str:
    return str(page.js(f"document.getElementById('{name}').textContent"))


def test_page_beats_and_says_what_it_is(page: Browser, address: str) -> None:
    picture = "document.getElementById('picture')"
    page.until(f"{picture}.width > 100")
    seen = {page.js(f"{picture}.toDataURL()") for _ in range(40)}
    assert len(seen) > 1
    assert "not for diagnosis" in page.js("document.querySelector('.notice').innerText").lower()
    assert text(page, "engine") == "onnxruntime, fp32"
    assert text(page, "bundle") == "nano"
    shot = np.asarray(Image.open(BytesIO(page.screenshot())).convert("L"))
    assert shot.shape == (820, 1280)
    assert shot.mean() < 80, "the page is dark"
    assert all(url.startswith(f"http://{address}/") for url in page.requests())
    assert len(page.requests()) >= 6


def test_controls_fit_a_small_window(page: Browser) -> None:
    size = {"width": 800, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    assert page.js("document.documentElement.scrollWidth") <= 800


def test_sliders_make_a_new_clip(page: Browser) -> None:
    before = page.js(CLIPS)
    page.js(
        "(e => { e.value = 25; e.dispatchEvent(new Event('input')) })"
        "(document.getElementById('ef'))"
    )
    page.until(f"{CLIPS} > {before}")
    assert text(page, "ef-of") == "25 %"
    page.until("document.getElementById('latency').textContent.endsWith('s')")


def test_painting_changes_the_mask(page: Browser) -> None:
    page.js("document.querySelector('[data-tool=\"1\"]').click()")
    before = page.js(CLIPS)
    page.drag(*(place(page, 0.2 + 0.02 * k, 0.4) for k in range(8)))
    page.until(f"{CLIPS} > {before}")
    assert page.js("document.getElementById('reset').disabled") is False
    assert page.js("document.getElementById('error').hidden")
    before = page.js(CLIPS)
    page.js("document.getElementById('reset').click()")
    page.until(f"{CLIPS} > {before}")


def test_dragging_the_valve(page: Browser) -> None:
    page.js("document.querySelector('[data-tool=valve]').click()")
    before = page.js(CLIPS)
    page.drag(*(place(page, 0.5, 0.6 - 0.01 * k) for k in range(6)))
    page.until(f"{CLIPS} > {before}")
    assert page.js("document.getElementById('error').hidden")


def test_conditions_are_picked(page: Browser) -> None:
    before = page.js(CLIPS)
    page.js("document.querySelector('[data-use=mask]').click()")
    page.until(f"{CLIPS} > {before}")
    assert page.js("document.querySelector('[data-use=sketch]').disabled") is True
    page.js("document.getElementById('as-image').click()")
    page.until("!document.querySelector('[data-use=sketch]').disabled")
    before = page.js(CLIPS)
    page.js("document.querySelector('[data-use=sketch]').click()")
    page.until(f"{CLIPS} > {before}")
    assert page.js("document.getElementById('error').hidden")


def test_pause_holds_the_frame(page: Browser) -> None:
    page.js("document.getElementById('play').click()")
    held = page.js("document.getElementById('phase').value")
    page.js("new Promise(done => setTimeout(done, 400))")
    assert page.js("document.getElementById('phase').value") == held
