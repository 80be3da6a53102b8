"""Pictures for the games: playing cards, text and a felt table, drawn with Pillow alone.

Every card, letter and word is drawn once, four times too large, scaled down and kept ("a sprite");
a picture is then a NumPy canvas that sprites are copied onto, which is what makes the games fast.
No asset files: the only font is the one inside Pillow.

Does not handle: games (env.py), the resizing a model wants (vlm/families.py).
"""

from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 300                      # pictures are SIZE × SIZE × 3, uint8
CARD_W, CARD_H = 84, 118        # one card size in all games, so that reading learned in one helps in the others
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("clubs", "diamonds", "hearts", "spades")

FELT, PAPER, INK = (22, 110, 72), (252, 252, 248), (24, 24, 30)
RED, BLUE, GOLD, SKIN, LINE = (200, 22, 40), (34, 62, 140), (232, 178, 44), (244, 208, 172), (120, 120, 120)
_UP = 4                         # drawn four times too large: scaling down smooths the edges

# Where the pips of a number card sit, as (x, y) shares of the card; x columns and y rows as on real cards.
_L, _M, _R = 0.40, 0.50, 0.60
_PIPS = {
    1: [(_M, .5)], 2: [(_M, .2), (_M, .8)], 3: [(_M, .2), (_M, .5), (_M, .8)],
    4: [(_L, .2), (_R, .2), (_L, .8), (_R, .8)],
    5: [(_L, .2), (_R, .2), (_M, .5), (_L, .8), (_R, .8)],
    6: [(_L, .2), (_R, .2), (_L, .5), (_R, .5), (_L, .8), (_R, .8)],
    7: [(_L, .2), (_R, .2), (_M, .35), (_L, .5), (_R, .5), (_L, .8), (_R, .8)],
    8: [(_L, .2), (_R, .2), (_M, .35), (_L, .5), (_R, .5), (_M, .65), (_L, .8), (_R, .8)],
    9: [(x, y) for y in (.16, .39, .61, .84) for x in (_L, _R)] + [(_M, .5)],
    10: [(x, y) for y in (.16, .39, .61, .84) for x in (_L, _R)] + [(_M, .275), (_M, .725)],
}


def _suit(pen, suit, x, y, r):
    """Draw a suit symbol of half-height r centred on (x, y), in over-sized pixels."""
    color = RED if suit in ("hearts", "diamonds") else INK

    def disc(cx, cy, cr):
        pen.ellipse([cx - cr, cy - cr, cx + cr, cy + cr], fill=color)

    if suit == "diamonds":
        pen.polygon([(x, y - r), (x + .75 * r, y), (x, y + r), (x - .75 * r, y)], fill=color)
        return
    if suit == "hearts":
        disc(x - .45 * r, y - .4 * r, .5 * r)
        disc(x + .45 * r, y - .4 * r, .5 * r)
        pen.polygon([(x - .92 * r, y - .2 * r), (x + .92 * r, y - .2 * r), (x, y + r)], fill=color)
        return
    if suit == "spades":
        disc(x - .42 * r, y + .25 * r, .48 * r)
        disc(x + .42 * r, y + .25 * r, .48 * r)
        pen.polygon([(x - .88 * r, y + .1 * r), (x + .88 * r, y + .1 * r), (x, y - r)], fill=color)
    else:
        disc(x, y - .45 * r, .45 * r)
        disc(x - .5 * r, y + .2 * r, .45 * r)
        disc(x + .5 * r, y + .2 * r, .45 * r)
        disc(x, y, .25 * r)
    pen.polygon([(x, y), (x + .35 * r, y + r), (x - .35 * r, y + r)], fill=color)   # the stem


def _figure(pen, rank, x, y, r):
    """Draw the upper half of a court figure (shoulders, head, cap or crown) that stands on y."""
    cloth = {"J": BLUE, "Q": RED, "K": INK}[rank]
    pen.polygon([(x - 1.25 * r, y), (x - .8 * r, y - .7 * r), (x + .8 * r, y - .7 * r), (x + 1.25 * r, y)], fill=cloth)
    pen.polygon([(x - .3 * r, y - .7 * r), (x + .3 * r, y - .7 * r), (x, y - .1 * r)], fill=GOLD)
    if rank == "Q":                                                                # long hair
        pen.ellipse([x - .75 * r, y - 1.75 * r, x + .75 * r, y - .45 * r], fill=(110, 66, 30))
    pen.ellipse([x - .5 * r, y - 1.65 * r, x + .5 * r, y - .6 * r], fill=SKIN)
    if rank == "J":                                                                # a cap with a feather
        pen.polygon([(x - .6 * r, y - 1.4 * r), (x + .6 * r, y - 1.4 * r), (x + .2 * r, y - 1.95 * r)], fill=BLUE)
        pen.line([(x + .2 * r, y - 1.9 * r), (x + .9 * r, y - 2.1 * r)], fill=RED, width=int(.15 * r))
    else:                                                                          # a crown; the king's has a cross
        top = y - (2.1 if rank == "K" else 1.95) * r
        pen.polygon([(x - .6 * r, y - 1.4 * r), (x - .65 * r, top), (x - .25 * r, y - 1.65 * r), (x, top),
                     (x + .25 * r, y - 1.65 * r), (x + .65 * r, top), (x + .6 * r, y - 1.4 * r)], fill=GOLD)
    if rank == "K":                                                                # and a beard
        pen.pieslice([x - .5 * r, y - 1.5 * r, x + .5 * r, y - .5 * r], 20, 160, fill=(90, 60, 40))


def _blank():
    """An empty card, over-sized."""
    picture = Image.new("RGB", (CARD_W * _UP, CARD_H * _UP), LINE)
    ImageDraw.Draw(picture).rounded_rectangle([_UP, _UP, (CARD_W - 1) * _UP, (CARD_H - 1) * _UP], 6 * _UP, fill=PAPER)
    return picture


@cache
def card(rank, suit):
    """A face-up card as an array (CARD_H, CARD_W, 3): `card("10", "hearts")`."""
    picture, color = _blank(), RED if suit in ("hearts", "diamonds") else INK
    pen, w, h = ImageDraw.Draw(picture), CARD_W * _UP, CARD_H * _UP
    if rank in ("J", "Q", "K"):
        pen.rectangle([.345 * w, .11 * h, .655 * w, .89 * h], outline=GOLD, width=_UP)
        _figure(pen, rank, .5 * w, .5 * h, .12 * w)
    else:
        count = RANKS.index(rank) + 1
        for x, y in _PIPS[count]:
            _suit(pen, suit, x * w, y * h, (.16 if count == 1 else .06) * w)
    # The corner index, at most 25 px wide ("10" is squeezed), so that it fits the strip that a fanned card shows.
    font = ImageFont.load_default(33 * _UP)
    left, top, right, bottom = (int(v) for v in font.getbbox(rank, stroke_width=_UP // 2))
    letters = Image.new("RGB", (right - left, bottom - top), PAPER)
    ImageDraw.Draw(letters).text((-left, -top), rank, fill=color, font=font, stroke_width=_UP // 2, stroke_fill=color)
    letters = letters.resize((min(letters.width, 25 * _UP), 25 * _UP))
    picture.paste(letters, (15 * _UP - letters.width // 2, 4 * _UP))
    _suit(pen, suit, 15 * _UP, 39 * _UP, 8 * _UP)
    # The lower right corner is the upper left one turned round, and a court card's lower half its upper half.
    turned = picture.rotate(180)
    picture.paste(turned.crop((w - 28 * _UP, h - 50 * _UP, w, h)), (w - 28 * _UP, h - 50 * _UP))
    if rank in ("J", "Q", "K"):
        box = (int(.36 * w), h // 2, int(.64 * w), int(.88 * h))
        half = picture.crop((box[0], h - box[3], box[2], h - box[1])).rotate(180)
        picture.paste(half, box[:2])
    return np.asarray(picture.resize((CARD_W, CARD_H), Image.Resampling.LANCZOS))


@cache
def card_back():
    """A face-down card (CARD_H, CARD_W, 3): a lattice on blue."""
    picture = _blank()
    pen, w, h = ImageDraw.Draw(picture), CARD_W * _UP, CARD_H * _UP
    pen.rounded_rectangle([5 * _UP, 5 * _UP, w - 5 * _UP, h - 5 * _UP], 4 * _UP, fill=BLUE)
    inner = picture.crop((8 * _UP, 8 * _UP, w - 8 * _UP, h - 8 * _UP))
    pen = ImageDraw.Draw(inner)
    for k in range(-h, w + h, 10 * _UP):
        pen.line([(k, 0), (k + h, h)], fill=(200, 210, 240), width=_UP)
        pen.line([(k, 0), (k - h, h)], fill=(200, 210, 240), width=_UP)
    picture.paste(inner, (8 * _UP, 8 * _UP))
    return np.asarray(picture.resize((CARD_W, CARD_H), Image.Resampling.LANCZOS))


@cache
def _card_ends():
    """Two (7, CARD_W, 3) bool: the card's first and last 7 rows without the rounded corners."""
    mask = Image.new("RGB", (CARD_W, CARD_H))
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, CARD_W - 1, CARD_H - 1], 7, fill=(255, 255, 255))
    mask = np.asarray(mask) > 0
    return mask[:7], mask[-7:]


@lru_cache(maxsize=1024)
def word(text, size, color=PAPER, background=FELT):
    """A line of text as an array (height, width, 3), as wide as the text."""
    font = ImageFont.load_default(size)
    width, height = int(font.getlength(text)) + 1, int(size * 1.3)
    picture = Image.new("RGB", (width, height), background)
    ImageDraw.Draw(picture).text((0, size), text, fill=color, font=font, anchor="ls")
    return np.asarray(picture)


@cache
def _felt():
    picture = Image.new("RGB", (SIZE, SIZE), FELT)
    ImageDraw.Draw(picture).rounded_rectangle([3, 3, SIZE - 4, SIZE - 4], 12, outline=(196, 160, 84), width=2)
    return np.asarray(picture)


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
    place = canvas[y:y + CARD_H, x:x + CARD_W]
    place[7:-7] = sprite[7:-7]
    top, bottom = _card_ends()
    np.copyto(place[:7], sprite[:7], where=top)
    np.copyto(place[-7:], sprite[-7:], where=bottom)


def put_hand(canvas, cards, y):
    """Lay a row of cards, [(rank, suit), …], fanned so that every corner index stays visible.

    Seven cards fit side by side at 32 px each. The rare longer hand has rows of seven 40 px apart, each over the one
    before; y is the top of the first row for the dealer (upper half of the table), of the last row for the player.
    """
    rows = (len(cards) - 1) // 7
    top = y - 40 * rows if y > SIZE // 2 else y
    for i, (rank, suit) in enumerate(cards):
        row, column = divmod(i, 7)
        step = min(CARD_W + 6, (SIZE - 24 - CARD_W) // max(1, min(len(cards), 7) - 1))
        put_card(canvas, rank, suit, 12 + column * step, top + 40 * row)


def put_formula(canvas, text, y, size=24):
    """Write a formula on one line or two, symbol by symbol (any formula is made of 16 kept symbols)."""
    x = 14
    for symbol in text:
        sprite = word(symbol, size)
        if x + sprite.shape[1] > SIZE - 10:
            x, y = 14, y + size
        put(canvas, sprite[:max(0, SIZE - y)], x, y)        # of a second line blank rows are below the table
        x += sprite.shape[1] + 1
