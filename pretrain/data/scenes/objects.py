"""The things of the drawn scenes: sixteen kinds, each a few shapes in ink numbers.

Every kind draws itself in its own coordinates: x to the right from 0 to `width`, y down from 0 to `height`, the longer
of the two 100, facing right, standing on y = height. The shapes carry ink numbers, not colours: BODY, SHADE and LIGHT
become the thing's colour, the first two with its surface; the others are fixed details (a wheel, a window, a beak).
So one drawing serves all colours and surfaces, and a pixel belongs to the thing exactly where there is ink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pretrain.data.scenes.shapes import (
    BODY,
    CREAM,
    DARK,
    GLASS,
    GOLD,
    HEART,
    LEAF,
    LIGHT,
    METAL,
    OUTLINE,
    PINK,
    SHADE,
    WHITE,
    WOOD,
    Pen,
    Point,
    smooth,
)

# ---------------------------------------------------------------------------------------------------------------------
# The kinds. `look` is 0, 1 or 2: the same kind, drawn a little differently.


def _car(pen: Pen, look: int) -> None:
    if look == 1:  # an estate car
        pen.blob(BODY, (12, 28), (16, 8), (24, 2), (60, 2), (72, 8), (84, 26), (60, 32), (30, 32))
        windows = [((22, 22), (25, 8), (44, 8), (44, 22)), ((49, 22), (49, 8), (61, 8), (74, 22))]
    else:
        pen.blob(BODY, (14, 28), (27, 6), (38, 1), (58, 1), (70, 7), (84, 26), (60, 32), (34, 32))
        windows = [((25, 22), (33, 8), (47, 7), (47, 22)), ((52, 22), (52, 7), (62, 8), (74, 22))]
    pen.box(BODY, 1, 21, 99, 43, 9)
    for window in windows:
        pen.poly(GLASS, *window)
    pen.box(SHADE, 2, 35, 98, 43, 4)
    pen.line(SHADE, 1.6, (49.5, 24), (49.5, 35))
    pen.disc(GOLD, 95, 28, 3.6, 4.4)
    pen.box(DARK, 0, 36, 8, 42, 2)
    pen.box(DARK, 92, 36, 100, 42, 2)
    for x in (24, 76):
        pen.disc(DARK, x, 41, 11)
        pen.disc(METAL, x, 41, 5)


def _sofa(pen: Pen, look: int) -> None:
    for x in (9, 82):
        pen.box(WOOD, x, 54, x + 9, 66)
    pen.box(BODY, 7, 1, 93, 46, 12)
    if look != 1:
        pen.line(OUTLINE, 2, (50, 6), (50, 30))
    pen.box(SHADE, 12, 44, 88, 60)
    if look == 1:  # one long cushion
        pen.box(OUTLINE, 13, 29, 87, 48, 7)
        pen.box(LIGHT, 14, 30.5, 86, 46.5, 6)
    else:
        for left in (13, 49.5):
            pen.box(OUTLINE, left, 29, left + 37.5, 48, 7)
            pen.box(LIGHT, left + 1, 30.5, left + 36, 46.5, 6)
    for x in (0, 79):
        pen.box(OUTLINE, x, 18, x + 21, 60, 10)
        pen.box(BODY, x + 2, 20, x + 19, 59, 8)


def _dog(pen: Pen, look: int) -> None:
    pen.line(BODY, 7, (16, 42), (6, 34), (3, 20), smooth=True)
    pen.box(SHADE, 27, 50, 36, 81, 4)
    pen.box(SHADE, 57, 50, 66, 81, 4)
    pen.blob(BODY, (12, 44), (20, 35), (45, 37), (62, 30), (76, 38), (74, 54), (62, 62), (45, 60), (26, 63), (13, 57))
    pen.box(BODY, 14, 48, 24, 82, 4.5)
    pen.box(BODY, 66, 48, 76, 82, 4.5)
    pen.blob(BODY, (60, 34), (66, 16), (76, 7), (88, 11), (99, 22), (99, 29), (90, 33), (82, 36), (78, 48), (68, 50))
    pen.disc(DARK, 96, 22, 4.2, 3.6)
    pen.line(DARK, 1.6, (96, 29), (89, 30), (85, 27), smooth=True)
    pen.eye(84, 17, 4)
    if look == 1:  # ears up, folded over
        pen.poly(SHADE, (64, 18), (61, 0), (74, 3), (78, 12))
    else:
        pen.blob(SHADE, (65, 13), (73, 9), (75, 20), (73, 34), (66, 38), (61, 30))
    pen.line(METAL, 3.2, (64, 43), (78, 40))


def _cat(pen: Pen, look: int) -> None:
    if look == 1:
        pen.line(BODY, 9, (54, 92), (70, 92), (76, 80), (70, 66), smooth=True)
    else:
        pen.line(BODY, 9, (54, 92), (70, 88), (70, 72), (78, 58), smooth=True)
    pen.blob(BODY, (40, 40), (54, 52), (63, 74), (62, 95), (52, 99), (28, 99), (18, 95), (17, 74), (26, 52))
    pen.blob(LIGHT, (40, 56), (49, 66), (50, 86), (40, 92), (30, 86), (31, 66))
    for x in (31, 49):
        pen.disc(LIGHT, x, 96, 8, 5)
        pen.disc(SHADE, x, 98, 1)
    pen.poly(BODY, (13, 28), (14, 0), (38, 14))
    pen.poly(BODY, (67, 28), (66, 0), (42, 14))
    pen.poly(PINK, (18, 20), (18, 7), (29, 14))
    pen.poly(PINK, (62, 20), (62, 7), (51, 14))
    pen.disc(BODY, 40, 31, 27, 22)
    for x in (29, 51):
        pen.disc(WHITE, x, 28, 6.4)
        pen.disc(DARK, x, 28, 2.8, 5.6)
    pen.poly(PINK, (36, 36), (44, 36), (40, 41))
    for side in (-1, 1):
        pen.line(DARK, 1.5, (40, 41), (40 + 4 * side, 45), (40 + 10 * side, 43), smooth=True)
        for y in (37, 43):
            pen.line(METAL, 1.6, (40 + 13 * side, 39), (40 + 37 * side, y))


def _house(pen: Pen, look: int) -> None:
    if look != 1:
        pen.box(METAL, 64, 8, 76, 34)
    pen.box(BODY, 9, 42, 85, 100)
    pen.poly(SHADE, (0, 48), (47, 4), (94, 48))
    pen.box(WOOD, 38, 66, 56, 100, 2)
    pen.disc(GOLD, 52, 84, 2)
    for x in (15, 62):
        pen.box(WHITE, x, 56, x + 18, 76)
        pen.box(GLASS, x + 2.5, 58.5, x + 15.5, 73.5)
        pen.line(WHITE, 2, (x + 9, 58), (x + 9, 74))
        pen.line(WHITE, 2, (x + 2, 66), (x + 16, 66))
    if look == 2:
        pen.disc(WHITE, 47, 32, 8)
        pen.disc(GLASS, 47, 32, 5.5)


def _tree(pen: Pen, look: int) -> None:
    pen.poly(WOOD, (32, 55), (46, 55), (50, 100), (28, 100))
    if look == 1:  # a fir
        for top, foot, half in ((34, 82, 39), (16, 59, 32), (0, 36, 24)):
            pen.poly(SHADE, (39, top), (39 + half, foot), (39 - half, foot))
            pen.poly(BODY, (39, top), (39 + half - 3, foot - 5), (39 - half + 3, foot - 5))
        return
    pen.line(WOOD, 5, (40, 72), (58, 54))
    pen.disc(SHADE, 40, 52, 30, 20)
    for x, y, r in ((20, 44, 20), (58, 44, 20), (26, 24, 20), (52, 22, 21), (40, 38, 24)):
        pen.disc(BODY, x, y, r)
    pen.disc(LIGHT, 28, 20, 9, 7, -30)
    pen.disc(LIGHT, 54, 38, 7, 5, -30)


def _boat(pen: Pen, look: int) -> None:
    pen.line(WOOD, 3.6, (47, 66), (47, 3))
    pen.poly(BODY, *smooth((51, 3), (68, 22), (79, 40), (86, 57)), (51, 57))
    if look != 1:
        pen.poly(LIGHT, (43, 14), (43, 57), (12, 57))
    else:
        pen.poly(LIGHT, (43, 30), (43, 57), (22, 57))
    pen.poly(BODY, (0, 63), (100, 63), (86, 88), (16, 88))
    pen.poly(SHADE, (7, 77), (92.5, 77), (86, 88), (16, 88))
    pen.line(WOOD, 3.4, (2, 64), (98, 64))


def _ball(pen: Pen, look: int) -> None:
    pen.disc(SHADE, 50, 50, 50)
    pen.disc(BODY, 47, 47, 46)
    if look == 1:  # a football's patch and seams
        pen.poly(DARK, (50, 32), (66, 44), (60, 63), (40, 63), (34, 44))
        for end in ((50, 6), (90, 36), (76, 88), (24, 88), (10, 36)):
            pen.line(DARK, 3.5, (50, 48), end)
    else:
        pen.line(SHADE, 4, (14, 18), (38, 44), (44, 94), smooth=True)
        pen.line(SHADE, 4, (4, 54), (44, 58), (92, 30), smooth=True)
        pen.line(SHADE, 4, (62, 4), (66, 44), (88, 78), smooth=True)
    pen.disc(WHITE, 30, 22, 9, 6, -40)


def _cup(pen: Pen, look: int) -> None:
    pen.line(SHADE, 12, (68, 26), (90, 26), (94, 42), (84, 58), (62, 64), smooth=True)
    pen.line(BODY, 8, (68, 26), (90, 26), (94, 42), (84, 58), (62, 64), smooth=True)
    if look == 1:  # a tea cup on its saucer
        pen.disc(SHADE, 42, 84, 42, 7)
        pen.disc(LIGHT, 42, 82, 40, 5)
        pen.blob(BODY, (2, 10), (40, 8), (78, 10), (76, 44), (62, 74), (42, 82), (22, 74), (6, 44))
    else:
        pen.box(BODY, 4, 10, 76, 90, 12)
        pen.poly(BODY, (2, 10), (78, 10), (76, 60), (4, 60))
    pen.disc(LIGHT, 40, 11, 39, 10)
    pen.disc(WOOD, 40, 12, 32, 6.5)


def _chair(pen: Pen, look: int) -> None:
    for x in (14, 42):
        pen.box(SHADE, x, 60, x + 6, 92)
    if look == 1:  # two wide slats
        for x in (7, 49):
            pen.box(BODY, x, 0, x + 8, 54, 3)
        pen.box(BODY, 10, 4, 54, 18, 3)
        pen.box(BODY, 10, 25, 54, 39, 3)
    else:
        pen.box(BODY, 6, 0, 58, 48, 12)
        pen.box(BODY, 6, 20, 58, 54)
        pen.line(SHADE, 2, (14, 47), (50, 47))
    pen.poly(LIGHT, (8, 50), (56, 50), (63, 62), (1, 62))
    pen.box(BODY, 1, 61, 63, 70, 2)
    for x in (2, 54):
        pen.box(BODY, x, 64, x + 8, 100, 2)


def _bird(pen: Pen, look: int) -> None:
    for x in (48, 58):
        pen.line(GOLD, 3.4, (x, 64), (x, 83), (x + 9, 84))
    pen.poly(SHADE, (26, 44), (1, 30), (0, 44), (8, 54), (30, 60))
    pen.blob(BODY, (18, 46), (34, 32), (56, 24), (66, 8), (82, 4), (92, 14), (90, 28), (84, 44), (72, 64), (48, 72))
    pen.blob(LIGHT, (84, 34), (82, 50), (68, 66), (52, 70), (64, 54))
    if look == 1:  # wing up
        pen.poly(SHADE, (62, 44), (30, 2), (24, 6), (22, 20), (26, 34), (36, 50), (52, 54))
    else:
        pen.blob(SHADE, (66, 38), (56, 56), (38, 60), (14, 54), (32, 44), (50, 34))
    pen.poly(GOLD, (90, 14), (103, 21), (90, 26))
    pen.eye(80, 16, 4.4)


def _fish(pen: Pen, look: int) -> None:
    pen.poly(SHADE, (26, 18), (44, 1), (62, 3), (60, 20))
    pen.poly(SHADE, (40, 50), (44, 66), (58, 62), (62, 48))
    pen.poly(BODY, (30, 34), (12, 20), (0, 8), (4, 34), (0, 60), (12, 48))
    pen.blob(BODY, (22, 34), (34, 18), (58, 10), (82, 16), (99, 33), (82, 52), (58, 58), (34, 50))
    pen.line(SHADE, 2.6, (74, 18), (69, 33), (74, 50), smooth=True)
    pen.blob(SHADE, (60, 34), (48, 30), (40, 38), (50, 44))
    pen.eye(84, 27, 5.4)
    pen.line(DARK, 2, (96, 40), (90, 42), (86, 40), smooth=True)


def _lamp(pen: Pen, look: int) -> None:
    pen.disc(GOLD, 33, 45, 13, 8)
    if look == 1:  # a round foot
        pen.line(METAL, 5, (33, 44), (33, 60))
        pen.blob(BODY, (33, 56), (50, 68), (52, 86), (42, 97), (24, 97), (14, 86), (16, 68))
        pen.box(METAL, 20, 95, 46, 100, 2)
    else:
        pen.line(METAL, 6, (33, 44), (33, 94))
        pen.disc(SHADE, 33, 95, 22, 5.5)
        pen.disc(BODY, 33, 93, 21, 4.5)
    pen.poly(BODY, (17, 2), (49, 2), (66, 44), (0, 44))
    pen.poly(SHADE, (2, 39), (64, 39), (66, 45), (0, 45))
    pen.line(METAL, 3, (22, 1.5), (44, 1.5))


def _plane(pen: Pen, look: int) -> None:
    pen.poly(SHADE, (50, 26), (64, 26), (52, 3), (44, 3))
    pen.poly(BODY, (8, 30), (0, 2), (13, 2), (30, 26))
    pen.blob(BODY, (3, 26), (20, 19), (60, 18), (84, 20), (97, 28), (99, 34), (92, 41), (70, 45), (34, 43), (12, 35))
    pen.poly(SHADE, (0, 24), (16, 25), (8, 37), (-2, 37))
    pen.poly(GLASS, (82, 22), (93, 27), (84, 30), (79, 30))
    for x in (38, 48, 58, 68):
        pen.disc(GLASS, x, 28, 3.4)
    pen.poly(SHADE, (44, 36), (66, 36), (44, 60), (33, 60))
    if look == 1:
        pen.box(DARK, 46, 44, 62, 52, 4)


def _flower(pen: Pen, look: int) -> None:
    pen.line(LEAF, 5.5, (33, 40), (34, 70), (33, 99), smooth=True)
    pen.blob(LEAF, (33, 92), (44, 72), (62, 66), (56, 84))
    pen.blob(LEAF, (33, 86), (24, 66), (6, 60), (12, 78))
    if look == 1:  # a tulip
        pen.blob(SHADE, (8, 8), (26, 20), (33, 2), (40, 20), (58, 8), (58, 34), (46, 52), (33, 55), (20, 52), (8, 34))
        pen.blob(BODY, (33, 3), (46, 22), (45, 44), (33, 54), (21, 44), (20, 22))
        return
    count = 5 if look == 2 else 7
    for i in range(count):
        angle = 360 * i / count - 90
        x, y = 33 + 19 * math.cos(math.radians(angle)), 33 + 19 * math.sin(math.radians(angle))
        pen.disc(SHADE, x, y, 15, 13 if look == 2 else 9.5, angle)
        pen.disc(BODY, x, y, 13.5, 11.5 if look == 2 else 8, angle)
    pen.disc(HEART, 33, 33, 10.5)


def _mushroom(pen: Pen, look: int) -> None:
    pen.blob(CREAM, (34, 48), (62, 48), (61, 76), (66, 92), (48, 96), (30, 92), (35, 76))
    pen.disc(CREAM, 48, 50, 43, 9)
    if look == 1:  # a pointed cap
        pen.blob(BODY, (1, 50), (24, 24), (48, 1), (72, 24), (95, 50), (74, 54), (48, 50), (22, 54))
    else:
        pen.blob(BODY, (1, 46), (10, 20), (32, 4), (64, 4), (86, 20), (95, 46), (88, 54), (48, 48), (8, 54))
    pen.disc(LIGHT, 38 if look == 1 else 26, 24 if look == 1 else 22, 9, 6, -35)


@dataclass(frozen=True)
class Kind:
    """How a kind draws itself, how large it is, and where something that stands on it stands (all in its coordinates).

    `reach` is how far its largest extent goes of what its size word promises: a ball as tall as a house looks too big.
    """

    draw: Callable[[Pen, int], None]
    width: float
    height: float
    seat: Point
    reach: float = 1.0
    flies: bool = False
    plural: str = ""


KINDS: dict[str, Kind] = {
    "car": Kind(_car, 100, 52, (48, 3), 1.1),
    "sofa": Kind(_sofa, 100, 66, (50, 38), 1.12),
    "dog": Kind(_dog, 100, 82, (38, 39), 0.96),
    "house": Kind(_house, 94, 100, (47, 8)),
    "tree": Kind(_tree, 78, 100, (39, 4)),
    "boat": Kind(_boat, 100, 88, (50, 64)),
    "ball": Kind(_ball, 100, 100, (50, 3), 0.74),
    "cup": Kind(_cup, 100, 90, (40, 8), 0.8),
    "chair": Kind(_chair, 64, 100, (32, 57)),
    "bird": Kind(_bird, 102, 85, (40, 31), 0.92, flies=True),
    "fish": Kind(_fish, 100, 66, (56, 8), plural="fish"),
    "cat": Kind(_cat, 80, 100, (40, 11), 0.92),
    "lamp": Kind(_lamp, 66, 100, (33, 2)),
    "plane": Kind(_plane, 100, 60, (48, 16), 1.1, flies=True),
    "flower": Kind(_flower, 66, 100, (33, 10), 0.96),
    "mushroom": Kind(_mushroom, 96, 96, (48, 4), 0.86),
}
