"""The sixteen object kinds of drawn scenes and the shapes that each consists of.

Each kind is drawn in its own coordinates: x to the right from 0 to `width`, y down from 0 to `height`. The longer of the two
is 100, and the object faces right and stands on y = height. Shapes are filled with palette indices, not colors. BODY, SHADE
and LIGHT become the object's color, the first two with its surface. The other indices are fixed details (a wheel, a window,
a beak). So one drawing serves all colors and surfaces, and a pixel belongs to the object exactly where its index is not EMPTY.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pretrain.data.scenes.shapes import (
    BODY,
    CENTER,
    CREAM,
    DARK,
    GLASS,
    GOLD,
    LEAF,
    LIGHT,
    METAL,
    OUTLINE,
    PINK,
    SHADE,
    WHITE,
    WOOD,
    Point,
    Tile,
    compute_curve,
)

# ---------------------------------------------------------------------------------------------------------------------
# How each kind is drawn. `variant` is 0, 1 or 2: the same kind with different details.


def _draw_car(tile: Tile, variant: int) -> None:
    if variant == 1:  # a station wagon
        tile.curve(BODY, (12, 28), (16, 8), (24, 2), (60, 2), (72, 8), (84, 26), (60, 32), (30, 32))
        windows = [((22, 22), (25, 8), (44, 8), (44, 22)), ((49, 22), (49, 8), (61, 8), (74, 22))]
    else:
        tile.curve(BODY, (14, 28), (27, 6), (38, 1), (58, 1), (70, 7), (84, 26), (60, 32), (34, 32))
        windows = [((25, 22), (33, 8), (47, 7), (47, 22)), ((52, 22), (52, 7), (62, 8), (74, 22))]
    tile.rectangle(BODY, 1, 21, 99, 43, 9)
    for window in windows:
        tile.polygon(GLASS, *window)
    tile.rectangle(SHADE, 2, 35, 98, 43, 4)
    tile.line(SHADE, 1.6, (49.5, 24), (49.5, 35))
    tile.ellipse(GOLD, 95, 28, 3.6, 4.4)
    tile.rectangle(DARK, 0, 36, 8, 42, 2)
    tile.rectangle(DARK, 92, 36, 100, 42, 2)
    for x in (24, 76):
        tile.ellipse(DARK, x, 41, 11)
        tile.ellipse(METAL, x, 41, 5)


def _draw_sofa(tile: Tile, variant: int) -> None:
    for x in (9, 82):
        tile.rectangle(WOOD, x, 54, x + 9, 66)
    tile.rectangle(BODY, 7, 1, 93, 46, 12)
    if variant != 1:
        tile.line(OUTLINE, 2, (50, 6), (50, 30))
    tile.rectangle(SHADE, 12, 44, 88, 60)
    if variant == 1:  # one long cushion
        tile.rectangle(OUTLINE, 13, 29, 87, 48, 7)
        tile.rectangle(LIGHT, 14, 30.5, 86, 46.5, 6)
    else:
        for left in (13, 49.5):
            tile.rectangle(OUTLINE, left, 29, left + 37.5, 48, 7)
            tile.rectangle(LIGHT, left + 1, 30.5, left + 36, 46.5, 6)
    for x in (0, 79):
        tile.rectangle(OUTLINE, x, 18, x + 21, 60, 10)
        tile.rectangle(BODY, x + 2, 20, x + 19, 59, 8)


def _draw_dog(tile: Tile, variant: int) -> None:
    tile.line(BODY, 7, (16, 42), (6, 34), (3, 20), smooth=True)
    tile.rectangle(SHADE, 27, 50, 36, 81, 4)
    tile.rectangle(SHADE, 57, 50, 66, 81, 4)
    tile.curve(BODY, (12, 44), (20, 35), (45, 37), (62, 30), (76, 38), (74, 54), (62, 62), (45, 60), (26, 63), (13, 57))
    tile.rectangle(BODY, 14, 48, 24, 82, 4.5)
    tile.rectangle(BODY, 66, 48, 76, 82, 4.5)
    tile.curve(BODY, (60, 34), (66, 16), (76, 7), (88, 11), (99, 22), (99, 29), (90, 33), (82, 36), (78, 48), (68, 50))
    tile.ellipse(DARK, 96, 22, 4.2, 3.6)
    tile.line(DARK, 1.6, (96, 29), (89, 30), (85, 27), smooth=True)
    tile.eye(84, 17, 4)
    if variant == 1:  # ears up, folded over
        tile.polygon(SHADE, (64, 18), (61, 0), (74, 3), (78, 12))
    else:
        tile.curve(SHADE, (65, 13), (73, 9), (75, 20), (73, 34), (66, 38), (61, 30))
    tile.line(METAL, 3.2, (64, 43), (78, 40))


def _draw_cat(tile: Tile, variant: int) -> None:
    if variant == 1:
        tile.line(BODY, 9, (54, 92), (70, 92), (76, 80), (70, 66), smooth=True)
    else:
        tile.line(BODY, 9, (54, 92), (70, 88), (70, 72), (78, 58), smooth=True)
    tile.curve(BODY, (40, 40), (54, 52), (63, 74), (62, 95), (52, 99), (28, 99), (18, 95), (17, 74), (26, 52))
    tile.curve(LIGHT, (40, 56), (49, 66), (50, 86), (40, 92), (30, 86), (31, 66))
    for x in (31, 49):
        tile.ellipse(LIGHT, x, 96, 8, 5)
        tile.ellipse(SHADE, x, 98, 1)
    tile.polygon(BODY, (13, 28), (14, 0), (38, 14))
    tile.polygon(BODY, (67, 28), (66, 0), (42, 14))
    tile.polygon(PINK, (18, 20), (18, 7), (29, 14))
    tile.polygon(PINK, (62, 20), (62, 7), (51, 14))
    tile.ellipse(BODY, 40, 31, 27, 22)
    for x in (29, 51):
        tile.ellipse(WHITE, x, 28, 6.4)
        tile.ellipse(DARK, x, 28, 2.8, 5.6)
    tile.polygon(PINK, (36, 36), (44, 36), (40, 41))
    for side in (-1, 1):
        tile.line(DARK, 1.5, (40, 41), (40 + 4 * side, 45), (40 + 10 * side, 43), smooth=True)
        for y in (37, 43):
            tile.line(METAL, 1.6, (40 + 13 * side, 39), (40 + 37 * side, y))


def _draw_house(tile: Tile, variant: int) -> None:
    if variant != 1:
        tile.rectangle(METAL, 64, 8, 76, 34)
    tile.rectangle(BODY, 9, 42, 85, 100)
    tile.polygon(SHADE, (0, 48), (47, 4), (94, 48))
    tile.rectangle(WOOD, 38, 66, 56, 100, 2)
    tile.ellipse(GOLD, 52, 84, 2)
    for x in (15, 62):
        tile.rectangle(WHITE, x, 56, x + 18, 76)
        tile.rectangle(GLASS, x + 2.5, 58.5, x + 15.5, 73.5)
        tile.line(WHITE, 2, (x + 9, 58), (x + 9, 74))
        tile.line(WHITE, 2, (x + 2, 66), (x + 16, 66))
    if variant == 2:
        tile.ellipse(WHITE, 47, 32, 8)
        tile.ellipse(GLASS, 47, 32, 5.5)


def _draw_tree(tile: Tile, variant: int) -> None:
    tile.polygon(WOOD, (32, 55), (46, 55), (50, 100), (28, 100))
    if variant == 1:  # a fir
        for top, bottom, half_width in ((34, 82, 39), (16, 59, 32), (0, 36, 24)):
            tile.polygon(SHADE, (39, top), (39 + half_width, bottom), (39 - half_width, bottom))
            tile.polygon(BODY, (39, top), (39 + half_width - 3, bottom - 5), (39 - half_width + 3, bottom - 5))
        return
    tile.line(WOOD, 5, (40, 72), (58, 54))
    tile.ellipse(SHADE, 40, 52, 30, 20)
    for x, y, r in ((20, 44, 20), (58, 44, 20), (26, 24, 20), (52, 22, 21), (40, 38, 24)):
        tile.ellipse(BODY, x, y, r)
    tile.ellipse(LIGHT, 28, 20, 9, 7, -30)
    tile.ellipse(LIGHT, 54, 38, 7, 5, -30)


def _draw_boat(tile: Tile, variant: int) -> None:
    tile.line(WOOD, 3.6, (47, 66), (47, 3))
    tile.polygon(BODY, *compute_curve((51, 3), (68, 22), (79, 40), (86, 57)), (51, 57))
    if variant != 1:
        tile.polygon(LIGHT, (43, 14), (43, 57), (12, 57))
    else:
        tile.polygon(LIGHT, (43, 30), (43, 57), (22, 57))
    tile.polygon(BODY, (0, 63), (100, 63), (86, 88), (16, 88))
    tile.polygon(SHADE, (7, 77), (92.5, 77), (86, 88), (16, 88))
    tile.line(WOOD, 3.4, (2, 64), (98, 64))


def _draw_ball(tile: Tile, variant: int) -> None:
    tile.ellipse(SHADE, 50, 50, 50)
    tile.ellipse(BODY, 47, 47, 46)
    if variant == 1:  # a football's patch and seams
        tile.polygon(DARK, (50, 32), (66, 44), (60, 63), (40, 63), (34, 44))
        for end in ((50, 6), (90, 36), (76, 88), (24, 88), (10, 36)):
            tile.line(DARK, 3.5, (50, 48), end)
    else:
        tile.line(SHADE, 4, (14, 18), (38, 44), (44, 94), smooth=True)
        tile.line(SHADE, 4, (4, 54), (44, 58), (92, 30), smooth=True)
        tile.line(SHADE, 4, (62, 4), (66, 44), (88, 78), smooth=True)
    tile.ellipse(WHITE, 30, 22, 9, 6, -40)


def _draw_cup(tile: Tile, variant: int) -> None:
    tile.line(SHADE, 12, (68, 26), (90, 26), (94, 42), (84, 58), (62, 64), smooth=True)
    tile.line(BODY, 8, (68, 26), (90, 26), (94, 42), (84, 58), (62, 64), smooth=True)
    if variant == 1:  # a tea cup on its saucer
        tile.ellipse(SHADE, 42, 84, 42, 7)
        tile.ellipse(LIGHT, 42, 82, 40, 5)
        tile.curve(BODY, (2, 10), (40, 8), (78, 10), (76, 44), (62, 74), (42, 82), (22, 74), (6, 44))
    else:
        tile.rectangle(BODY, 4, 10, 76, 90, 12)
        tile.polygon(BODY, (2, 10), (78, 10), (76, 60), (4, 60))
    tile.ellipse(LIGHT, 40, 11, 39, 10)
    tile.ellipse(WOOD, 40, 12, 32, 6.5)


def _draw_chair(tile: Tile, variant: int) -> None:
    for x in (14, 42):
        tile.rectangle(SHADE, x, 60, x + 6, 92)
    if variant == 1:  # two wide slats
        for x in (7, 49):
            tile.rectangle(BODY, x, 0, x + 8, 54, 3)
        tile.rectangle(BODY, 10, 4, 54, 18, 3)
        tile.rectangle(BODY, 10, 25, 54, 39, 3)
    else:
        tile.rectangle(BODY, 6, 0, 58, 48, 12)
        tile.rectangle(BODY, 6, 20, 58, 54)
        tile.line(SHADE, 2, (14, 47), (50, 47))
    tile.polygon(LIGHT, (8, 50), (56, 50), (63, 62), (1, 62))
    tile.rectangle(BODY, 1, 61, 63, 70, 2)
    for x in (2, 54):
        tile.rectangle(BODY, x, 64, x + 8, 100, 2)


def _draw_bird(tile: Tile, variant: int) -> None:
    for x in (48, 58):
        tile.line(GOLD, 3.4, (x, 64), (x, 83), (x + 9, 84))
    tile.polygon(SHADE, (26, 44), (1, 30), (0, 44), (8, 54), (30, 60))
    tile.curve(BODY, (18, 46), (34, 32), (56, 24), (66, 8), (82, 4), (92, 14), (90, 28), (84, 44), (72, 64), (48, 72))
    tile.curve(LIGHT, (84, 34), (82, 50), (68, 66), (52, 70), (64, 54))
    if variant == 1:  # wing up
        tile.polygon(SHADE, (62, 44), (30, 2), (24, 6), (22, 20), (26, 34), (36, 50), (52, 54))
    else:
        tile.curve(SHADE, (66, 38), (56, 56), (38, 60), (14, 54), (32, 44), (50, 34))
    tile.polygon(GOLD, (90, 14), (103, 21), (90, 26))
    tile.eye(80, 16, 4.4)


def _draw_fish(tile: Tile, variant: int) -> None:
    tile.polygon(SHADE, (26, 18), (44, 1), (62, 3), (60, 20))
    tile.polygon(SHADE, (40, 50), (44, 66), (58, 62), (62, 48))
    tile.polygon(BODY, (30, 34), (12, 20), (0, 8), (4, 34), (0, 60), (12, 48))
    tile.curve(BODY, (22, 34), (34, 18), (58, 10), (82, 16), (99, 33), (82, 52), (58, 58), (34, 50))
    tile.line(SHADE, 2.6, (74, 18), (69, 33), (74, 50), smooth=True)
    tile.curve(SHADE, (60, 34), (48, 30), (40, 38), (50, 44))
    tile.eye(84, 27, 5.4)
    tile.line(DARK, 2, (96, 40), (90, 42), (86, 40), smooth=True)


def _draw_lamp(tile: Tile, variant: int) -> None:
    tile.ellipse(GOLD, 33, 45, 13, 8)
    if variant == 1:  # a round foot
        tile.line(METAL, 5, (33, 44), (33, 60))
        tile.curve(BODY, (33, 56), (50, 68), (52, 86), (42, 97), (24, 97), (14, 86), (16, 68))
        tile.rectangle(METAL, 20, 95, 46, 100, 2)
    else:
        tile.line(METAL, 6, (33, 44), (33, 94))
        tile.ellipse(SHADE, 33, 95, 22, 5.5)
        tile.ellipse(BODY, 33, 93, 21, 4.5)
    tile.polygon(BODY, (17, 2), (49, 2), (66, 44), (0, 44))
    tile.polygon(SHADE, (2, 39), (64, 39), (66, 45), (0, 45))
    tile.line(METAL, 3, (22, 1.5), (44, 1.5))


def _draw_plane(tile: Tile, variant: int) -> None:
    tile.polygon(SHADE, (50, 26), (64, 26), (52, 3), (44, 3))
    tile.polygon(BODY, (8, 30), (0, 2), (13, 2), (30, 26))
    tile.curve(BODY, (3, 26), (20, 19), (60, 18), (84, 20), (97, 28), (99, 34), (92, 41), (70, 45), (34, 43), (12, 35))
    tile.polygon(SHADE, (0, 24), (16, 25), (8, 37), (-2, 37))
    tile.polygon(GLASS, (82, 22), (93, 27), (84, 30), (79, 30))
    for x in (38, 48, 58, 68):
        tile.ellipse(GLASS, x, 28, 3.4)
    tile.polygon(SHADE, (44, 36), (66, 36), (44, 60), (33, 60))
    if variant == 1:
        tile.rectangle(DARK, 46, 44, 62, 52, 4)


def _draw_flower(tile: Tile, variant: int) -> None:
    tile.line(LEAF, 5.5, (33, 40), (34, 70), (33, 99), smooth=True)
    tile.curve(LEAF, (33, 92), (44, 72), (62, 66), (56, 84))
    tile.curve(LEAF, (33, 86), (24, 66), (6, 60), (12, 78))
    if variant == 1:  # a tulip
        tile.curve(SHADE, (8, 8), (26, 20), (33, 2), (40, 20), (58, 8), (58, 34), (46, 52), (33, 55), (20, 52), (8, 34))
        tile.curve(BODY, (33, 3), (46, 22), (45, 44), (33, 54), (21, 44), (20, 22))
        return
    count = 5 if variant == 2 else 7
    for i in range(count):
        angle = 360 * i / count - 90
        x, y = 33 + 19 * math.cos(math.radians(angle)), 33 + 19 * math.sin(math.radians(angle))
        tile.ellipse(SHADE, x, y, 15, 13 if variant == 2 else 9.5, angle)
        tile.ellipse(BODY, x, y, 13.5, 11.5 if variant == 2 else 8, angle)
    tile.ellipse(CENTER, 33, 33, 10.5)


def _draw_mushroom(tile: Tile, variant: int) -> None:
    tile.curve(CREAM, (34, 48), (62, 48), (61, 76), (66, 92), (48, 96), (30, 92), (35, 76))
    tile.ellipse(CREAM, 48, 50, 43, 9)
    if variant == 1:  # a pointed cap
        tile.curve(BODY, (1, 50), (24, 24), (48, 1), (72, 24), (95, 50), (74, 54), (48, 50), (22, 54))
    else:
        tile.curve(BODY, (1, 46), (10, 20), (32, 4), (64, 4), (86, 20), (95, 46), (88, 54), (48, 48), (8, 54))
    tile.ellipse(LIGHT, 38 if variant == 1 else 26, 24 if variant == 1 else 22, 9, 6, -35)


@dataclass(frozen=True)
class ObjectKind:
    """One kind of object: how it is drawn and how large it is. Lengths are in the kind's coordinates."""

    draw: Callable[[Tile, int], None]
    """Draws the given variant (0, 1 or 2) into a tile."""
    width: float
    height: float
    support_point: Point
    """Where the base point of an object that stands on this one goes."""
    size_factor: float = 1.0
    """Multiplies the longer side that belongs to the size word, because a ball as tall as a house looks too big."""
    can_fly: bool = False
    plural: str = ""
    """The plural if it is not the name with an "s"."""


KINDS: dict[str, ObjectKind] = {
    "car": ObjectKind(_draw_car, 100, 52, (48, 3), 1.1),
    "sofa": ObjectKind(_draw_sofa, 100, 66, (50, 38), 1.12),
    "dog": ObjectKind(_draw_dog, 100, 82, (38, 39), 0.96),
    "house": ObjectKind(_draw_house, 94, 100, (47, 8)),
    "tree": ObjectKind(_draw_tree, 78, 100, (39, 4)),
    "boat": ObjectKind(_draw_boat, 100, 88, (50, 64)),
    "ball": ObjectKind(_draw_ball, 100, 100, (50, 3), 0.74),
    "cup": ObjectKind(_draw_cup, 100, 90, (40, 8), 0.8),
    "chair": ObjectKind(_draw_chair, 64, 100, (32, 57)),
    "bird": ObjectKind(_draw_bird, 102, 85, (40, 31), 0.92, can_fly=True),
    "fish": ObjectKind(_draw_fish, 100, 66, (56, 8), plural="fish"),
    "cat": ObjectKind(_draw_cat, 80, 100, (40, 11), 0.92),
    "lamp": ObjectKind(_draw_lamp, 66, 100, (33, 2)),
    "plane": ObjectKind(_draw_plane, 100, 60, (48, 16), 1.1, can_fly=True),
    "flower": ObjectKind(_draw_flower, 66, 100, (33, 10), 0.96),
    "mushroom": ObjectKind(_draw_mushroom, 96, 96, (48, 4), 0.86),
}
