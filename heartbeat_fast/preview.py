"""A clip with its conditions beside it: what was asked for, and what came."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from heartbeat_fast.clip import Clip, marked, save_images
from heartbeat_fast.conditions import Conditions

Rgb = NDArray[np.uint8]

PANEL, GAP, CAPTION = 192, 12, 22  # pixels
BACKGROUND, INK, DIM = (17, 20, 24), (226, 230, 235), (104, 112, 122)
# Okabe and Ito's colours, told apart by colour-blind readers: LV cavity, myocardium, left atrium.
COLOURS = np.array([(0, 0, 0), (213, 94, 0), (0, 158, 115), (86, 180, 233)], np.uint8)
VALVE = np.array([255, 214, 70], np.float32)


def save_preview(
    path: str | Path, conditions: Conditions, clip: Clip, *, mark: bool = True
) -> Path:
    """Writes `conditions_sheet` as .gif, .mp4, .webp or .png strip, as `Clip.save` does.

    Raises:
        FileError, MissingDependency: as `Clip.save`.
    """
    sheet = conditions_sheet(conditions, clip, mark=mark)
    if Path(path).suffix.lower() == ".gif":
        palette = _palette()
        sheet = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in sheet]
    return save_images(path, sheet, clip.fps, clip.note(), mark=False)


def conditions_sheet(conditions: Conditions, clip: Clip, *, mark: bool = True) -> list[Image.Image]:
    """One picture a frame: prompt and EF above, five condition panels left, the clip right.

    Absent conditions keep their place, empty. Mask: LV cavity orange, myocardium green, left
    atrium blue. Flow: hue is direction (see the wheel), brightness is speed.

    Returns:
        F images, mode RGB, all of one size.
    """
    panels = _panels(conditions, len(clip.frames))
    big = 2 * PANEL + CAPTION + GAP
    top = CAPTION + GAP
    size = GAP + 3 * (PANEL + GAP) + big + GAP, top + CAPTION + big + GAP
    page = Image.new("RGB", size, BACKGROUND)
    _words(page, (GAP, GAP), _headline(conditions), 15, INK)
    places = {
        name: (GAP + k % 3 * (PANEL + GAP), top + k // 3 * (PANEL + CAPTION + GAP))
        for k, name in enumerate(panels)
    }
    for name, (x, y) in places.items():
        _words(page, (x, y + 4), name, 13, INK if panels[name] is not None else DIM)
        _frame(page, (x, y + CAPTION), PANEL, None)
    legend = GAP + 2 * (PANEL + GAP), top + PANEL + 2 * CAPTION + GAP
    _legend(page, legend, conditions)
    right = GAP + 3 * (PANEL + GAP), top
    _words(page, (right[0], top + 4), "generated", 13, INK)
    sheet = []
    for t, frame in enumerate(clip.frames):
        picture = page.copy()
        for name, (x, y) in places.items():
            stack = panels[name]
            if stack is not None:
                _frame(picture, (x, y + CAPTION), PANEL, stack[t % len(stack)])
        large = Image.fromarray(frame).resize((big, big), Image.Resampling.BICUBIC)
        picture.paste(marked(large) if mark else large, (right[0], top + CAPTION))
        sheet.append(picture)
    return sheet


def _panels(conditions: Conditions, frames: int) -> dict[str, Rgb | None]:
    """Caption -> (1 or F,H,W,3), or None where absent."""
    c = conditions
    skeleton = None if c.skeleton is None else c.skeleton[..., None] * VALVE
    return {
        "image prior": None if c.image is None else _grey(c.image[None]),
        "sketch": None if c.sketch is None else _grey(c.sketch[None]),
        "mask": None if c.mask is None else COLOURS[c.mask],
        "valve skeleton": None if skeleton is None else skeleton.astype(np.uint8),
        "flow": None if c.flow is None else _flow_colours(c.flow, _fastest(c.flow)),
    }


def _headline(conditions: Conditions) -> str:
    prompt = textwrap.shorten(conditions.text or "no prompt", 70, placeholder=" …")
    ef = "not given" if conditions.ef is None else f"{conditions.ef:.0f} %"
    return f"{prompt}    EF {ef}"


def _grey(stack: NDArray[np.float32]) -> Rgb:
    return np.repeat((stack * 255).astype(np.uint8)[..., None], 3, -1)


def _fastest(flow: NDArray[np.float32]) -> float:
    """The speed shown brightest: the 98th percentile of the moving pixels."""
    speed = np.hypot(flow[:, 0], flow[:, 1])
    moving = speed[speed > 0.05]
    return float(np.percentile(moving, 98)) if moving.size else 1.0


def _flow_colours(flow: NDArray[np.float32], fastest: float) -> Rgb:
    """(F,2,H,W) -> (F,H,W,3), hue by direction, value by speed."""
    speed = np.minimum(np.hypot(flow[:, 0], flow[:, 1]) / fastest, 1)
    hue = np.arctan2(-flow[:, 1], flow[:, 0]) / (2 * np.pi) % 1
    # The hexagonal colour model, one phase-shifted triangle wave per channel.
    wave = np.abs((hue[..., None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    colour = 1 - 0.85 * (1 - np.clip(wave, 0, 1))
    return (colour * np.sqrt(speed)[..., None] * 255).astype(np.uint8)


def _palette() -> Image.Image:
    """256 colours for every frame alike: an adaptive palette would flicker and band the flow."""
    greys = np.repeat(np.linspace(0, 255, 90).astype(np.uint8)[:, None], 3, 1)
    angle, speed = np.meshgrid(np.arange(18) / 18 * 2 * np.pi, np.linspace(0.12, 1, 8) ** 2)
    wheel = (np.stack([np.cos(angle), np.sin(angle)]) * speed).astype(np.float32)[None]
    valve = (np.linspace(0.2, 1, 6)[:, None] * VALVE).astype(np.uint8)
    pages = np.array([BACKGROUND, DIM], np.uint8)
    colours = [greys, _flow_colours(wheel, 1.0)[0].reshape(-1, 3), valve, COLOURS[1:], pages]
    image = Image.new("P", (1, 1))
    image.putpalette(np.concatenate(colours).tobytes())
    return image


def _legend(page: Image.Image, corner: tuple[int, int], conditions: Conditions) -> None:
    x, y = corner
    names = ("LV cavity", "myocardium", "left atrium")
    for k, name in enumerate(names if conditions.mask is not None else ()):
        square = (x + 4, y + 20 * k + 3, x + 16, y + 20 * k + 15)
        ImageDraw.Draw(page).rectangle(square, tuple(COLOURS[k + 1].tolist()))
        _words(page, (x + 24, y + 20 * k), name, 13, INK)
    if conditions.flow is None:
        return
    side = 96
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side, dtype=np.float32)] * 2))
    wheel = _flow_colours(np.where(np.hypot(*grid) <= 1, grid, 0)[None], 1.0)[0]
    page.paste(Image.fromarray(wheel), (x + 4, y + 70))
    fastest = _fastest(conditions.flow)
    _words(page, (x, y + side + 74), f"rim: {fastest:.1f} pixels a frame", 13, INK)


def _frame(page: Image.Image, corner: tuple[int, int], side: int, picture: Rgb | None) -> None:
    if picture is None:
        box = (*corner, corner[0] + side - 1, corner[1] + side - 1)
        ImageDraw.Draw(page).rectangle(box, outline=(44, 50, 57))
        return
    page.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), corner)


def _words(page: Image.Image, corner: tuple[int, int], text: str, size: int, ink: Any) -> None:
    ImageDraw.Draw(page).text(corner, text, fill=ink, font=ImageFont.load_default(size))
