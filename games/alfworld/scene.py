"""What an agent sees in ALFWorld, as a drawing of 300 × 300.

    picture = draw_scene(info)          # (SIZE, SIZE, 3) uint8

A drawing, not a room: it shows what the engine's words say of the present place and of the hands,
and nothing that is hidden. Above are the house's receptacles, small, the present one lit; in the
middle is that one, large, shut or open, with what lies there; below is the hand, with what it
holds.

Does not handle: what is there (games/alfworld/game.py), canvases and how sprites are put onto them
(games/draw.py).
"""

import zlib
from functools import cache, lru_cache

import numpy as np
from PIL import ImageFont

from games.draw import GOLD, INK, PAPER, SIZE, SKIN, put, sheet

ROOM = (206, 214, 222)
FLOOR = (184, 192, 200)
WOOD = (164, 122, 80)
DARK = (96, 70, 46)
METAL = (150, 160, 170)
GLASS = (238, 244, 250)
BADGE_COLORS = {"hot": (214, 52, 32), "cool": (36, 120, 220), "clean": (46, 160, 92)}
TILE_W, TILE_H = 66, 54


def draw_scene(info: dict) -> np.ndarray:
    """Return the picture (SIZE, SIZE, 3) uint8 of what the game's info says.

    Of info it reads: receptacles, all names; at, the present one or None; shut, whether its door
    is; inside, the names of what is seen there, None where nothing can be seen; holding, a name or
    None; badges, "hot", "cool", "clean" of what is held.
    """
    receptacles, at, inside, holding = (
        info[key] for key in ("receptacles", "at", "inside", "holding"))
    canvas = _room().copy()

    # above, as many as there is room for
    width = min(56, (SIZE - 12) // max(1, len(receptacles)))
    for i, name in enumerate(receptacles[:(SIZE - 12) // width]):
        put(canvas, _small(name, name == at, width - 4), 6 + i * width, 6)

    # in the middle, two rows of four: there is room for no more
    if at is not None:
        put(canvas, _place(at, info["shut"], inside is not None), 10, 44)
        for i, name in enumerate((inside or ())[:8]):
            row, column = divmod(i, 4)
            put(canvas, _tile(name), 18 + column * (TILE_W + 1), 80 + row * (TILE_H + 2))

    # below
    if holding is not None:
        put(canvas, _tile(holding), 100, 232)
        for i, badge in enumerate(BADGE_COLORS):
            if badge in info["badges"]:
                put(canvas, _badge(badge), 176 + 40 * i, 238)
    return canvas


# ---- sprites: drawn once, then kept, as in games/draw.py ----------------------------------------
def _font(text, size, width):
    """The largest font up to size in which the text is at most so wide."""
    # a font's width grows with its size; below 5 nothing can be read
    length = ImageFont.load_default(size).getlength(text)
    return ImageFont.load_default(max(5, min(size, int(size * width / length))))


def _label(pen, text, box, size, fill):
    """Write a text in the middle of a box, as large as fits."""
    x0, y0, x1, y1 = box
    centre = ((x0 + x1) / 2, (y0 + y1) / 2)
    pen.text(centre, text, fill=fill, font=_font(text, size, x1 - x0 - 4), anchor="mm")


@cache
def _room():
    picture, pen = sheet(SIZE, SIZE, ROOM)
    pen.rectangle([0, 222, SIZE, SIZE], fill=FLOOR)
    hand = [(8, 300), (30, 252), (76, 236), (90, 262), (60, 300)]
    pen.polygon(hand, fill=SKIN, outline=INK)
    return np.asarray(picture)


@lru_cache(maxsize=512)
def _small(name, lit, width):
    """A receptacle in the row above: its kind, its number below."""
    picture, pen = sheet(width, 30, GOLD if lit else PAPER)
    pen.rectangle([0, 0, width - 1, 29], outline=INK, width=2 if lit else 1)
    kind, _, number = name.rpartition(" ")
    _label(pen, kind, (0, 2, width, 16), 11, INK)
    _label(pen, number, (0, 15, width, 28), 11, INK)
    return np.asarray(picture)


@lru_cache(maxsize=512)
def _place(name, shut, visible):
    """The present receptacle, large.

    A door with a handle where it is shut, an open box or a surface where one sees in.
    """
    picture, pen = sheet(SIZE - 20, 172, ROOM)
    pen.rectangle([0, 0, SIZE - 21, 30], fill=DARK)
    _label(pen, name, (0, 0, SIZE - 20, 30), 20, PAPER)
    body = [0, 30, SIZE - 21, 171]
    if shut:
        pen.rectangle(body, fill=WOOD, outline=INK, width=3)
        pen.rectangle([12, 44, SIZE - 34, 158], outline=DARK, width=4)
        pen.ellipse([SIZE - 66, 90, SIZE - 46, 110], fill=METAL, outline=INK)
    else:
        pen.rectangle(body, fill=GLASS if visible else ROOM, outline=INK, width=3)
    return np.asarray(picture)


@lru_cache(maxsize=2048)
def _tile(name):
    """An object: a shape and a colour that go with its kind, its name below."""
    # a checksum, for Python's own hash of a text differs from process to process
    kind = zlib.crc32(name.rpartition(" ")[0].encode())
    # 60 to 219: neither as dark as ink nor as light as paper
    color = tuple(60 + (kind >> shift) % 160 for shift in (0, 8, 16))
    picture, pen = sheet(TILE_W, TILE_H, PAPER)
    pen.rectangle([0, 0, TILE_W - 1, TILE_H - 1], outline=INK)
    x, y = TILE_W // 2, 4
    shapes = (
        (pen.ellipse, [x - 15, y, x + 15, y + 30]),
        (pen.rectangle, [x - 15, y, x + 15, y + 30]),
        (pen.polygon, [(x, y), (x + 17, y + 30), (x - 17, y + 30)]),
        (pen.rectangle, [x - 24, y + 8, x + 24, y + 24]),
        (pen.rectangle, [x - 7, y, x + 7, y + 30]),
    )
    draw, corners = shapes[kind % len(shapes)]
    draw(corners, fill=color, outline=INK)
    _label(pen, name, (0, 36, TILE_W, TILE_H), 12, INK)
    return np.asarray(picture)


@cache
def _badge(badge):
    """What was done to the object that is held: a disc in its colour."""
    picture, pen = sheet(36, 44, FLOOR)
    pen.ellipse([1, 1, 35, 35], fill=BADGE_COLORS[badge], outline=INK, width=2)
    _label(pen, badge, (0, 0, 36, 36), 13, PAPER)
    return np.asarray(picture)
