"""What is in a drawn scene and where: a pure function of (seed, split, index), before anything is drawn.

Things stand in columns, one or two (one on the other) to a column. So every two things have one relation that nobody
can dispute: "on" or "under" within a column, "left of" or "right of" across columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.data.scenes.backgrounds import PLACES
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.rng import Dice
from pretrain.data.scenes.shapes import matrix

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SURFACES = ("plain", "striped", "leather")
SIZES = {"small": 0.25, "medium": 0.34, "large": 0.46}  # the longer side of a thing, as a part of the picture's side
CLASSES = tuple(KINDS)  # the field `label` of a sample is a position in here
SPLITS = ("train", "val", "test", "unseen", "hard")

# Colour-thing pairs that only the split `unseen` shows: one colour of each kind, two kinds of each colour. The same for
# all seeds, so that a model trained on one data set can be tried on another.
UNSEEN = frozenset((COLORS[(5 * i + i // 8 + 2) % 8], kind) for i, kind in enumerate(CLASSES))

GROUP = 4  # scenes of `hard` come in fours: one, and the same with another colour, another thing, places exchanged
OPPOSITE = {"on": "under", "under": "on", "left of": "right of", "right of": "left of"}
_EDGE = 0.025  # free border of the picture, a part of its side
_GAP = 0.01  # between columns
_HIDDEN = 0.28  # what stands on a thing hides no more of it


@dataclass(frozen=True)
class Look:
    """What a thing is, apart from where it stands."""

    kind: str
    color: str
    surface: str
    size: str
    flip: bool
    variant: int


@dataclass(frozen=True)
class Thing:
    """A thing in its place. Lengths and places are parts of the picture's side, y down."""

    look: Look
    x: float
    """Its foot, the middle of its lower edge."""
    y: float
    extent: float
    """Its longer side as drawn."""
    tilt: float
    """Turn about the foot, radians."""
    stretch: float
    column: int
    on: int | None
    """The thing it stands on, as its position in `Scene.things`."""
    flies: bool
    texture: int
    """Seeds the surface's direction and phase."""


@dataclass(frozen=True)
class Scene:
    """A scene: where it belongs in the data set, its place, and its things column by column, each from below."""

    seed: int
    split: str
    index: int
    place: str
    things: tuple[Thing, ...]
    changed: str = ""
    """In `hard`: what differs from the first scene of the group ("colour", "kind", "relation")."""

    def dice(self, purpose: str) -> Dice:
        """The scene's own dice for one purpose; scenes of one `hard` group share them."""
        return Dice(self.seed, self.split, _base(self.split, self.index), purpose)


def relation(scene: Scene, a: int, b: int) -> str:
    """How thing `a` stands to thing `b`: "on", "under", "left of" or "right of"."""
    first, second = scene.things[a], scene.things[b]
    if first.column == second.column:
        return "on" if first.on == b else "under"
    return "left of" if first.column < second.column else "right of"


def shows(split: str, color: str, kind: str) -> bool:
    """Whether a split's pictures may hold this pair: `unseen` holds nothing else, the others everything else."""
    return ((color, kind) in UNSEEN) == (split == "unseen")


def speaks_of(split: str, color: str, kind: str) -> bool:
    """Whether a split's words may name this pair, be it only to ask for it in vain."""
    return split == "unseen" or (color, kind) not in UNSEEN


def plan(seed: int, split: str, index: int, scale: float = 1.0, things: tuple[int, int] = (1, 4)) -> Scene:
    """The scene of that number.

    Args:
        scale: multiplies the size of every thing, for small things in large pictures.
        things: how few and how many things a scene may hold, within 1 to 4.
    """
    base = _base(split, index)
    dice = Dice(seed, split, base, "plan")
    least, most = (min(max(things[0], 2), things[1]), min(things[1], 3)) if split == "hard" else things
    count = least + dice.below(most - least + 1)
    place = dice.pick(tuple(PLACES))
    columns = _columns(_looks(split, count, dice), dice)
    changed = ("", "colour", "kind", "relation")[index - base]
    if changed:
        columns = change(columns, changed, split, Dice(seed, split, base, changed)) or columns
    arranged = _arrange(columns, place, scale, Dice(seed, split, base, "arrange"))
    return Scene(seed, split, index, place, arranged, changed)


def change(columns: list[list[Look]], what: str, split: str, dice: Dice) -> list[list[Look]] | None:
    """The same but for one colour, one kind, or two things that exchange places; None where that changes nothing."""
    cells = [(c, r) for c, column in enumerate(columns) for r in range(len(column))]
    out = [list(column) for column in columns]
    if what == "relation":
        pairs = [(a, b) for i, a in enumerate(cells) for b in cells[:i] if _told(columns, a) != _told(columns, b)]
        if not pairs:
            return None
        (c, r), (d, s) = dice.pick(pairs)
        out[c][r], out[d][s] = out[d][s], out[c][r]
        return out
    c, r = dice.pick(cells)
    look = out[c][r]
    if what == "colour":
        others = [color for color in COLORS if color != look.color and speaks_of(split, color, look.kind)]
        out[c][r] = replace(look, color=dice.pick(others))
    else:
        kinds = [kind for kind in CLASSES if kind != look.kind and speaks_of(split, look.color, kind)]
        out[c][r] = replace(look, kind=dice.pick(kinds))
    return out


def columns_of(scene: Scene) -> list[list[Look]]:
    """The things' looks column by column, each from below: what `change` takes."""
    out: list[list[Look]] = [[] for _ in range(scene.things[-1].column + 1)]
    for thing in scene.things:
        out[thing.column].append(thing.look)
    return out


def _base(split: str, index: int) -> int:
    return index - index % GROUP if split == "hard" else index


def _told(columns: list[list[Look]], cell: tuple[int, int]) -> tuple[str, str, str]:
    look = columns[cell[0]][cell[1]]
    return (look.color, look.surface, look.kind)


def _looks(split: str, count: int, dice: Dice) -> list[Look]:
    """Things at random; in many scenes some share their kind, colour or surface, or counting would be trivial."""
    plain = split == "hard" or count == 1 or dice.chance(0.4)
    shared = "" if plain else dice.pick(("kind", "color", "surface"), (4, 4, 1))
    group = 2 + dice.below(count - 1) if shared else 0
    looks: list[Look] = []
    while len(looks) < count:
        kind, color, surface = dice.pick(CLASSES), dice.pick(COLORS), dice.pick(SURFACES)
        if 0 < len(looks) < group:
            first = looks[0]
            kind = first.kind if shared == "kind" else kind
            color = first.color if shared == "color" else color
            surface = first.surface if shared == "surface" else surface
        if shows(split, color, kind):
            size = dice.pick(tuple(SIZES), (1, 2, 3) if count == 1 else (1, 1, 1))
            looks.append(Look(kind, color, surface, size, dice.chance(0.5), dice.below(3)))
    return dice.shuffled(looks)


def _columns(looks: list[Look], dice: Dice) -> list[list[Look]]:
    shapes: dict[int, Sequence[tuple[int, ...]]] = {
        1: [(1,)],
        2: [(1, 1), (2,)],
        3: [(1, 1, 1), (2, 1), (1, 2)],
        4: [(1, 1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2), (2, 2)],
    }
    rest = iter(looks)
    return [[next(rest) for _ in range(high)] for high in dice.pick(shapes[len(looks)])]


# ---------------------------------------------------------------------------------------------------------------------
# Where things stand


def _arrange(columns: list[list[Look]], place: str, scale: float, dice: Dice) -> tuple[Thing, ...]:
    """Sizes made to fit, columns spread over the width, feet set on the ground or on the thing below."""
    low, high = PLACES[place].ground
    columns = [_stackable(column) for column in columns]
    room = 1 - 2 * _EDGE - _GAP * (len(columns) - 1)
    while True:  # the tallest or widest column gives way until all fit
        widths = [scale * sum(_reach(column)) for column in columns]
        heights = [scale * _height(column) for column in columns]
        tall = [c for c in range(len(columns)) if heights[c] > high - _EDGE]
        if not tall and sum(widths) <= room:
            break
        c = tall[0] if tall else max(range(len(columns)), key=lambda i: (_reduced(columns[i]) != columns[i], widths[i]))
        smaller = _reduced(columns[c])
        scale *= 0.97 if smaller == columns[c] else 1.0
        columns[c] = smaller
    spare = [dice.random() + 0.05 for _ in range(len(columns) + 1)]
    left, slack = _EDGE, room - sum(widths)
    out: list[Thing] = []
    for c, column in enumerate(columns):
        left += slack * spare[c] / sum(spare)
        x = left + scale * _reach(column)[0]
        left += widths[c] + _GAP
        flies = len(column) == 1 and KINDS[column[0].kind].flies and dice.chance(0.6)
        highest = heights[c] + _EDGE
        y = dice.between(highest, max(0.5, highest)) if flies else max(dice.between(low, high), highest)
        for row, look in enumerate(column):
            tilt = dice.between(-0.06, 0.06) if len(column) == 1 else 0.0
            on = len(out) - 1 if row else None
            stretch, texture = dice.between(0.95, 1.03), dice.below(1 << 16)
            out.append(Thing(look, x, y, scale * _extent(look), tilt, stretch, c, on, flies, texture))
            if row + 1 < len(column):
                dx, dy = _seat(look, column[row + 1])
                x, y = x + scale * dx, y + scale * dy
    return tuple(out)


def _stackable(column: list[Look]) -> list[Look]:
    """Sizes so that what stands on a thing does not hide it: never larger, and smaller where it stands in front."""
    if len(column) < 2:
        return column
    order = tuple(SIZES)
    below, above = column
    upper, lower = sorted((order.index(below.size), order.index(above.size)))
    out = [replace(below, size=order[lower]), replace(above, size=order[upper])]
    while _hidden(*out) > _HIDDEN and (upper or lower < len(order) - 1):
        lower, upper = (lower + 1, upper) if lower < len(order) - 1 else (lower, upper - 1)
        out = [replace(below, size=order[lower]), replace(above, size=order[upper])]
    return out


def _hidden(below: Look, above: Look) -> float:
    """About which part of the lower thing the upper one hides when it stands on its seat."""
    kind = KINDS[below.kind]
    across = KINDS[above.kind].width * _extent(above) / (kind.width * _extent(below))
    return min(1.0, across) * kind.seat[1] / kind.height


def _reduced(column: list[Look]) -> list[Look]:
    """The column with its largest things a size smaller; one on the other no longer cares how much it hides."""
    order = tuple(SIZES)
    largest = max(order.index(look.size) for look in column)
    return [replace(x, size=order[max(0, largest - 1)]) if order.index(x.size) == largest else x for x in column]


def _extent(look: Look) -> float:
    return SIZES[look.size] * KINDS[look.kind].reach


def _seat(below: Look, above: Look) -> tuple[float, float]:
    """From a thing's foot to the foot of what stands on it: on its seat, or higher where it would hide too much."""
    kind = KINDS[below.kind]
    depth = kind.seat[1] * min(1.0, _HIDDEN / max(_hidden(below, above), 1e-9))
    a, b, c, d = matrix(_extent(below) / 100, below.flip, 0.0, 1.0)
    x, y = kind.seat[0] - kind.width / 2, depth - kind.height
    return a * x + b * y, c * x + d * y


def _reach(column: list[Look]) -> tuple[float, float]:
    """How far a column goes to the left and to the right of its lowest thing's foot, a little tilt included."""
    left = right = x = 0.0
    for row, look in enumerate(column):
        kind, unit = KINDS[look.kind], _extent(look) / 100
        half = (1.03 * kind.width / 2 + (3.0 if len(column) > 1 else 6.0)) * unit
        left, right = max(left, half - x), max(right, half + x)
        x += _seat(look, column[row + 1])[0] if row + 1 < len(column) else 0.0
    return left, right


def _height(column: list[Look]) -> float:
    y = top = 0.0
    for row, look in enumerate(column):
        kind, unit = KINDS[look.kind], _extent(look) / 100
        top = max(top, (kind.height + 4) * unit - y)
        y += _seat(look, column[row + 1])[1] if row + 1 < len(column) else 0.0
    return top
