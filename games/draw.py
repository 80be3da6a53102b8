"""Pictures for the games: playing cards, text and a felt table, drawn with Pillow alone.

    canvas = table()                                        # (300, 300, 3), uint8
    put_hand(canvas, [("A", "spades"), (None, None)], 24)   # None is a face-down card
    put(canvas, word("Dealer", 14), 14, 5)

Every card, letter and word is drawn once, four times too large, scaled down and kept ("a sprite").
A picture is then a NumPy canvas that sprites are copied onto, which is what makes the games fast.
No asset files: the only font is the one inside Pillow.

Does not handle: games (env.py), the resizing a model wants (families.py).
"""

from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 300                      # pictures are SIZE × SIZE × 3, uint8
# one card size in all games, so that reading learned in one helps in the others
CARD_W, CARD_H = 84, 118
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("clubs", "diamonds", "hearts", "spades")

FELT = (22, 110, 72)
PAPER = (252, 252, 248)
INK = (24, 24, 30)
RED = (200, 22, 40)
BLUE = (34, 62, 140)
GOLD = (232, 178, 44)
SKIN = (244, 208, 172)
LINE = (120, 120, 120)
_UP = 4                         # drawn four times too large: scaling down smooths the edges

# Where the pips of a number card sit, as (x, y) shares of the card; x columns and y rows as on
# real cards.
_L, _M, _R = 0.40, 0.50, 0.60
_CORNERS = [(_L, .2), (_R, .2), (_L, .8), (_R, .8)]
_SIX = [*_CORNERS, (_L, .5), (_R, .5)]
_EIGHT = [(x, y) for y in (.16, .39, .61, .84) for x in (_L, _R)]
_PIPS = {
    1: [(_M, .5)],
    2: [(_M, .2), (_M, .8)],
    3: [(_M, .2), (_M, .5), (_M, .8)],
    4: _CORNERS,
    5: [*_CORNERS, (_M, .5)],
    6: _SIX,
    7: [*_SIX, (_M, .35)],
    8: [*_SIX, (_M, .35), (_M, .65)],
    9: [*_EIGHT, (_M, .5)],
    10: [*_EIGHT, (_M, .275), (_M, .725)],
}

# The suit symbols, in half-heights from their centre: discs (x, y, radius), then polygons.
_STEM = [(0, 0), (.35, 1), (-.35, 1)]
_SYMBOLS = {
    "clubs": (
        [(0, -.45, .45), (-.5, .2, .45), (.5, .2, .45), (0, 0, .25)],
        [_STEM]),
    "diamonds": (
        [],
        [[(0, -1), (.75, 0), (0, 1), (-.75, 0)]]),
    "hearts": (
        [(-.45, -.4, .5), (.45, -.4, .5)],
        [[(-.92, -.2), (.92, -.2), (0, 1)]]),
    "spades": (
        [(-.42, .25, .48), (.42, .25, .48)],
        [[(-.88, .1), (.88, .1), (0, -1)], _STEM]),
}


# ---- parts of cards, over-sized ----------------------------------------------------------------
def _suit(pen, suit, x, y, r):
    """Draw a suit symbol of half-height r centred on (x, y), in over-sized pixels."""
    color = _color(suit)
    discs, polygons = _SYMBOLS[suit]
    for dx, dy, size in discs:
        pen.circle((x + dx * r, y + dy * r), size * r, fill=color)
    for corners in polygons:
        pen.polygon(_placed(corners, x, y, r), fill=color)


def _color(suit):
    return RED if suit in ("hearts", "diamonds") else INK


def _placed(points, x, y, r):
    """Points in multiples of r from (x, y), in over-sized pixels."""
    return [(x + dx * r, y + dy * r) for dx, dy in points]


def _figure(pen, rank, x, y, r):
    """Draw the upper half of a court figure that stands on y: shoulders, head, cap or crown."""
    def at(*points):
        return _placed(points, x, y, r)

    cloth = {"J": BLUE, "Q": RED, "K": INK}[rank]
    pen.polygon(at((-1.25, 0), (-.8, -.7), (.8, -.7), (1.25, 0)), fill=cloth)
    pen.polygon(at((-.3, -.7), (.3, -.7), (0, -.1)), fill=GOLD)

    if rank == "Q":
        # long hair
        pen.ellipse(at((-.75, -1.75), (.75, -.45)), fill=(110, 66, 30))
    pen.ellipse(at((-.5, -1.65), (.5, -.6)), fill=SKIN)

    if rank == "J":
        # a cap with a feather
        pen.polygon(at((-.6, -1.4), (.6, -1.4), (.2, -1.95)), fill=BLUE)
        pen.line(at((.2, -1.9), (.9, -2.1)), fill=RED, width=int(.15 * r))
    else:
        # a crown; the king's is higher, and he has a beard
        top = -2.1 if rank == "K" else -1.95
        crown = at(
            (-.6, -1.4), (-.65, top), (-.25, -1.65), (0, top), (.25, -1.65), (.65, top),
            (.6, -1.4))
        pen.polygon(crown, fill=GOLD)
    if rank == "K":
        pen.pieslice(at((-.5, -1.5), (.5, -.5)), 20, 160, fill=(90, 60, 40))


def sheet(width, height, color):
    """A picture of one colour, and the pen that draws on it."""
    picture = Image.new("RGB", (width, height), color)
    return picture, ImageDraw.Draw(picture)


def _blank():
    """An empty card, over-sized, and its pen."""
    picture, pen = sheet(CARD_W * _UP, CARD_H * _UP, LINE)
    edge = [_UP, _UP, (CARD_W - 1) * _UP, (CARD_H - 1) * _UP]
    pen.rounded_rectangle(edge, 6 * _UP, fill=PAPER)
    return picture, pen


# ---- sprites -----------------------------------------------------------------------------------
@cache
def card(rank, suit):
    """A face-up card as an array (CARD_H, CARD_W, 3): `card("10", "hearts")`."""
    picture, pen = _blank()
    color = _color(suit)
    w, h = picture.size
    if rank in ("J", "Q", "K"):
        pen.rectangle([.345 * w, .11 * h, .655 * w, .89 * h], outline=GOLD, width=_UP)
        _figure(pen, rank, .5 * w, .5 * h, .12 * w)
    else:
        count = RANKS.index(rank) + 1
        for x, y in _PIPS[count]:
            _suit(pen, suit, x * w, y * h, (.16 if count == 1 else .06) * w)

    # The corner index, at most 25 px wide ("10" is squeezed), so that it fits the strip that a
    # fanned card shows.
    font = ImageFont.load_default(33 * _UP)
    stroke = _UP // 2
    left, top, right, bottom = map(int, font.getbbox(rank, stroke_width=stroke))
    letters, letter_pen = sheet(right - left, bottom - top, PAPER)
    letter_pen.text((-left, -top), rank, fill=color, font=font, stroke_width=stroke)
    letters = letters.resize((min(letters.width, 25 * _UP), 25 * _UP))
    picture.paste(letters, (15 * _UP - letters.width // 2, 4 * _UP))
    _suit(pen, suit, 15 * _UP, 39 * _UP, 8 * _UP)

    # The lower right corner is the upper left one turned round, and a court card's lower half its
    # upper half.
    turned = picture.rotate(180)
    corner = (w - 28 * _UP, h - 50 * _UP)
    picture.paste(turned.crop((*corner, w, h)), corner)
    if rank in ("J", "Q", "K"):
        left, top, right, bottom = int(.36 * w), h // 2, int(.64 * w), int(.88 * h)
        half = picture.crop((left, h - bottom, right, h - top)).rotate(180)
        picture.paste(half, (left, top))
    return np.asarray(picture.resize((CARD_W, CARD_H), Image.Resampling.LANCZOS))


@cache
def card_back():
    """A face-down card (CARD_H, CARD_W, 3): a lattice on blue."""
    picture, pen = _blank()
    w, h = picture.size
    pen.rounded_rectangle([5 * _UP, 5 * _UP, w - 5 * _UP, h - 5 * _UP], 4 * _UP, fill=BLUE)

    # the lattice is drawn on a piece of its own, so that it leaves a blue rim
    inner = picture.crop((8 * _UP, 8 * _UP, w - 8 * _UP, h - 8 * _UP))
    pen = ImageDraw.Draw(inner)
    for k in range(-h, w + h, 10 * _UP):
        pen.line([(k, 0), (k + h, h)], fill=(200, 210, 240), width=_UP)
        pen.line([(k, 0), (k - h, h)], fill=(200, 210, 240), width=_UP)
    picture.paste(inner, (8 * _UP, 8 * _UP))
    return np.asarray(picture.resize((CARD_W, CARD_H), Image.Resampling.LANCZOS))


@cache
def _card_shape():
    """(CARD_H, CARD_W, 3) bool: a card without what is outside of its rounded corners."""
    mask, pen = sheet(CARD_W, CARD_H, "black")
    pen.rounded_rectangle([0, 0, CARD_W - 1, CARD_H - 1], 7, fill="white")
    return np.asarray(mask) > 0


@lru_cache(maxsize=1024)
def word(text, size):
    """A line of text, paper on felt, as an array (height, width, 3), as wide as the text."""
    font = ImageFont.load_default(size)
    width = int(font.getlength(text)) + 1
    height = int(size * 1.3)
    picture, pen = sheet(width, height, FELT)
    pen.text((0, size), text, fill=PAPER, font=font, anchor="ls")
    return np.asarray(picture)


@cache
def _felt():
    picture, pen = sheet(SIZE, SIZE, FELT)
    edge = [3, 3, SIZE - 4, SIZE - 4]
    pen.rounded_rectangle(edge, 12, outline=(196, 160, 84), width=2)
    return np.asarray(picture)


# ---- pictures ----------------------------------------------------------------------------------
def table():
    """A fresh empty table (SIZE, SIZE, 3), uint8, to draw on."""
    return _felt().copy()


def put(canvas, sprite, x, y):
    """Copy a sprite onto the canvas with its upper left corner at (x, y)."""
    height, width = sprite.shape[:2]
    canvas[y:y + height, x:x + width] = sprite


def put_card(canvas, rank, suit, x, y):
    """Put a card on the table; rank None is a face-down card."""
    sprite = card_back() if rank is None else card(rank, suit)
    # beside its rounded corners the table shows
    np.copyto(canvas[y:y + CARD_H, x:x + CARD_W], sprite, where=_card_shape())


def put_hand(canvas, cards, y):
    """Lay a row of cards, [(rank, suit), …], fanned so that every corner index stays visible.

    Seven cards fit side by side at 32 px each. The rare longer hand has rows of seven 40 px apart,
    each over the one before. y is the top of the first row for the dealer (upper half of the
    table), of the last row for the player.
    """
    rows = (len(cards) - 1) // 7
    top = y - 40 * rows if y > SIZE // 2 else y
    gaps = max(1, min(len(cards), 7) - 1)
    step = min(CARD_W + 6, (SIZE - 24 - CARD_W) // gaps)
    for i, (rank, suit) in enumerate(cards):
        row, column = divmod(i, 7)
        put_card(canvas, rank, suit, 12 + column * step, top + 40 * row)


def put_formula(canvas, text, y, size=24):
    """Write a formula on one line or two, symbol by symbol.

    Any formula is made of 16 symbols, whose sprites are kept.
    """
    x = 14
    for symbol in text:
        sprite = word(symbol, size)
        if x + sprite.shape[1] > SIZE - 10:
            x = 14
            y += size
        # of a second line blank rows are below the table
        put(canvas, sprite[:max(0, SIZE - y)], x, y)
        x += sprite.shape[1] + 1
