"""The maps of `moebox stats` as a PNG, with a rectangle for every expert."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moebox.errors import RequestError
from moebox.instruments.stats import heat_map
from moebox.instruments.stats.heat_map import Map, Scale
from moebox.instruments.stats.report import StatsReport

MAP_PIXELS = (1536, 720)
"""Width and height that a map is drawn to fill, as far as `CELL_PIXELS` allow."""
CELL_PIXELS = (4, 6), (48, 32)
"""Least, and largest, width and height of an expert's rectangle."""
MARGIN = 64
LINE = 24
FONT_SIZE = 14
PAPER, INK = (255, 255, 255), (30, 30, 30)


def write_png(report: StatsReport, path: Path) -> None:
    """Draw how often every expert is used, and where it lies or would lie.

    Raises:
        RequestError: `path` cannot be written.
    """
    data = io.BytesIO()
    _draw(report, heat_map.maps_of(report)).save(data, format="PNG", optimize=True)
    try:
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None


def cell_pixels(layers: int, n_experts: int) -> tuple[int, int]:
    """Width and height of an expert's rectangle."""
    wanted = MAP_PIXELS[0] // n_experts, MAP_PIXELS[1] // layers
    least, most = CELL_PIXELS
    return min(max(wanted[0], least[0]), most[0]), min(max(wanted[1], least[1]), most[1])


def _draw(report: StatsReport, maps: list[Map]) -> Image.Image:
    layers, experts = maps[0].values.shape
    width, height = cell_pixels(layers, experts)
    block = 3 * LINE + height * layers + MARGIN // 2  # title, legend, map, numbers of the experts
    size = (max(width * experts, 720) + 2 * MARGIN, MARGIN + LINE + block * len(maps))
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN // 2), _title(report), INK, _font(FONT_SIZE + 2))
    for number, drawn in enumerate(maps):
        _draw_map(image, pen, drawn, report.layers, MARGIN + LINE + number * block)
    return image


def _draw_map(image: Image.Image, pen: ImageDraw.ImageDraw, drawn: Map, layers: list[int], top: int) -> None:
    width, height = cell_pixels(*drawn.values.shape)
    pen.text((MARGIN, top), drawn.title, INK, _font(FONT_SIZE))
    _draw_legend(pen, drawn.scale, top + LINE)
    top += 2 * LINE
    colours = np.array(drawn.scale.colours, np.uint8)[drawn.levels()]
    cells = colours.repeat(height, axis=0).repeat(width, axis=1)
    image.paste(Image.fromarray(cells), (MARGIN, top))
    for row, layer in enumerate(layers):
        if row % max(1, LINE // height) == 0:
            pen.text((MARGIN - 8, top + row * height + height // 2), str(layer), INK, _font(11), anchor="rm")
    for expert in range(0, drawn.values.shape[1], max(1, 4 * LINE // width)):
        at = MARGIN + expert * width + width // 2, top + height * len(layers) + 4
        pen.text(at, str(expert), INK, _font(11), anchor="mt")


def _draw_legend(pen: ImageDraw.ImageDraw, scale: Scale, top: int) -> None:
    left = MARGIN
    for name, colour in zip(scale.names, scale.colours, strict=True):
        pen.rectangle((left, top, left + FONT_SIZE, top + FONT_SIZE), colour, INK)
        pen.text((left + FONT_SIZE + 6, top), name, INK, _font(12))
        left += FONT_SIZE + 24 + int(pen.textlength(name, _font(12)))


def _title(report: StatsReport) -> str:
    return (
        f"{report.model}: {len(report.layers)} MoE layers of {report.n_experts} experts, "
        f"top {report.top_k}, {report.tokens:,} tokens"
    )


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
