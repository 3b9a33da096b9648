"""What a scene contains and where each object stands, as a pure function of (seed, split, index).

Objects stand in columns: one object, or two with one on the other. So each pair of objects has exactly one relation: "on" or
"under" within a column, "left of" or "right of" across columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.data.scenes.backgrounds import BACKGROUNDS
from pretrain.data.scenes.objects import KINDS
from pretrain.data.scenes.rng import KeyedRandom
from pretrain.data.scenes.shapes import build_matrix

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SURFACES = ("plain", "striped", "leather")
SIZES = {"small": 0.25, "medium": 0.34, "large": 0.46}  # the longer side of an object, as a fraction of the image's side
CLASSES = tuple(KINDS)  # the field `label` of a sample is an index into this
SPLITS = ("train", "val", "test", "unseen", "hard")

# Pairs of color and kind that only the split `unseen` shows: one color of each kind, two kinds of each color. They are the same
# for all seeds, so that a model trained on one data set can be tested on another.
UNSEEN = frozenset((COLORS[(5 * i + i // 8 + 2) % 8], kind) for i, kind in enumerate(CLASSES))

# `hard` has groups of four scenes: an original, then the same with another color, another kind, and two objects swapped
GROUP_SIZE = 4
OPPOSITE = {"on": "under", "under": "on", "left of": "right of", "right of": "left of"}
_MARGIN = 0.025  # free border of the image, as a fraction of its side
_GAP = 0.01  # between columns, as a fraction of the image's side
_MAX_HIDDEN = 0.28  # an object hides at most this fraction of the one it stands on


@dataclass(frozen=True)
class ObjectSpec:
    """What an object is, without where it stands."""

    kind: str
    color: str
    surface: str
    size: str
    flip: bool
    """Whether it faces left."""
    variant: int
    """0, 1 or 2: which variant of the kind is drawn."""


@dataclass(frozen=True)
class SceneObject:
    """An object at its position. Lengths and coordinates are fractions of the image's side, y down."""

    spec: ObjectSpec
    x: float
    """x of its base point, the middle of its lower edge."""
    y: float
    """y of its base point."""
    longer_side: float
    """The longer of its width and height as drawn."""
    tilt: float
    """Rotation about the base point, in radians."""
    stretch: float
    """Multiplies its width."""
    column: int
    supported_by: int | None
    """Index into `Scene.objects` of the object it stands on, or None."""
    is_flying: bool
    texture: int
    """Seed of the surface's direction and phase."""


@dataclass(frozen=True)
class Scene:
    """A scene: its position in the data set, its background and its objects.

    Objects are in order of their columns, and within a column from the bottom up.
    """

    seed: int
    split: str
    index: int
    background: str
    objects: tuple[SceneObject, ...]
    changed: str = ""
    """In `hard`: how it differs from the first scene of its group ("colour", "kind", "relation"), else ""."""

    def build_rng(self, purpose: str) -> KeyedRandom:
        """Return the scene's random generator for one purpose. Scenes of one `hard` group share it."""
        return KeyedRandom(self.seed, self.split, _find_group_start(self.split, self.index), purpose)


def get_relation(scene: Scene, a: int, b: int) -> str:
    """Return the relation of object `a` to object `b`: "on", "under", "left of" or "right of"."""
    first, second = scene.objects[a], scene.objects[b]
    if first.column == second.column:
        return "on" if first.supported_by == b else "under"
    return "left of" if first.column < second.column else "right of"


def can_show(split: str, color: str, kind: str) -> bool:
    """Return whether images of the split may show this pair.

    `unseen` shows only pairs in UNSEEN; the other splits show none of them.
    """
    return ((color, kind) in UNSEEN) == (split == "unseen")


def can_mention(split: str, color: str, kind: str) -> bool:
    """Return whether texts of the split may name this pair, including questions whose answer is no."""
    return split == "unseen" or (color, kind) not in UNSEEN


def build_scene(seed: int, split: str, index: int, scale: float = 1.0, num_objects: tuple[int, int] = (1, 4)) -> Scene:
    """Build scene number `index` of a split.

    Args:
        scale: multiplies the size of every object, for small objects in large images.
        num_objects: least and largest number of objects in a scene, within 1 to 4.
    """
    base = _find_group_start(split, index)
    rng = KeyedRandom(seed, split, base, "plan")
    least, most = (min(max(num_objects[0], 2), num_objects[1]), min(num_objects[1], 3)) if split == "hard" else num_objects
    count = least + rng.randbelow(most - least + 1)
    background = rng.choice(tuple(BACKGROUNDS))
    columns = _group_in_columns(_choose_specs(split, count, rng), rng)
    changed = ("", "colour", "kind", "relation")[index - base]
    if changed:
        columns = change_columns(columns, changed, split, KeyedRandom(seed, split, base, changed)) or columns
    arranged = _place_objects(columns, background, scale, KeyedRandom(seed, split, base, "arrange"))
    return Scene(seed, split, index, background, arranged, changed)


def change_columns(
    columns: list[list[ObjectSpec]], changed: str, split: str, rng: KeyedRandom
) -> list[list[ObjectSpec]] | None:
    """Return the columns with one color changed, one kind changed, or two objects swapped.

    Args:
        changed: "colour", "kind" or "relation".
    Returns:
        None if all objects that could be swapped have the same names.
    """
    cells = [(c, r) for c, column in enumerate(columns) for r in range(len(column))]
    out = [list(column) for column in columns]
    if changed == "relation":
        pairs = [(a, b) for i, a in enumerate(cells) for b in cells[:i] if _get_names(columns, a) != _get_names(columns, b)]
        if not pairs:
            return None
        (c, r), (d, s) = rng.choice(pairs)
        out[c][r], out[d][s] = out[d][s], out[c][r]
        return out
    c, r = rng.choice(cells)
    spec = out[c][r]
    if changed == "colour":
        others = [color for color in COLORS if color != spec.color and can_mention(split, color, spec.kind)]
        out[c][r] = replace(spec, color=rng.choice(others))
    else:
        kinds = [kind for kind in CLASSES if kind != spec.kind and can_mention(split, spec.color, kind)]
        out[c][r] = replace(spec, kind=rng.choice(kinds))
    return out


def get_columns(scene: Scene) -> list[list[ObjectSpec]]:
    """Return the specs of a scene's objects, column by column, each from the bottom up."""
    out: list[list[ObjectSpec]] = [[] for _ in range(scene.objects[-1].column + 1)]
    for item in scene.objects:
        out[item.column].append(item.spec)
    return out


def _find_group_start(split: str, index: int) -> int:
    return index - index % GROUP_SIZE if split == "hard" else index


def _get_names(columns: list[list[ObjectSpec]], cell: tuple[int, int]) -> tuple[str, str, str]:
    spec = columns[cell[0]][cell[1]]
    return (spec.color, spec.surface, spec.kind)


def _choose_specs(split: str, count: int, rng: KeyedRandom) -> list[ObjectSpec]:
    """Choose random objects.

    In many scenes some of them share a kind, color or surface, because counting would be trivial otherwise.
    """
    plain = split == "hard" or count == 1 or rng.bernoulli(0.4)
    shared = "" if plain else rng.choice(("kind", "color", "surface"), (4, 4, 1))
    group = 2 + rng.randbelow(count - 1) if shared else 0
    specs: list[ObjectSpec] = []
    while len(specs) < count:
        kind, color, surface = rng.choice(CLASSES), rng.choice(COLORS), rng.choice(SURFACES)
        if 0 < len(specs) < group:
            first = specs[0]
            kind = first.kind if shared == "kind" else kind
            color = first.color if shared == "color" else color
            surface = first.surface if shared == "surface" else surface
        if can_show(split, color, kind):
            size = rng.choice(tuple(SIZES), (1, 2, 3) if count == 1 else (1, 1, 1))
            specs.append(ObjectSpec(kind, color, surface, size, rng.bernoulli(0.5), rng.randbelow(3)))
    return rng.shuffled(specs)


def _group_in_columns(specs: list[ObjectSpec], rng: KeyedRandom) -> list[list[ObjectSpec]]:
    shapes: dict[int, Sequence[tuple[int, ...]]] = {
        1: [(1,)],
        2: [(1, 1), (2,)],
        3: [(1, 1, 1), (2, 1), (1, 2)],
        4: [(1, 1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2), (2, 2)],
    }
    rest = iter(specs)
    return [[next(rest) for _ in range(high)] for high in rng.choice(shapes[len(specs)])]


# ---------------------------------------------------------------------------------------------------------------------
# Positions of the objects


def _place_objects(columns: list[list[ObjectSpec]], background: str, scale: float, rng: KeyedRandom) -> tuple[SceneObject, ...]:
    """Shrink objects until all fit, spread the columns over the width, and set each object on its base."""
    low, high = BACKGROUNDS[background].base_range
    columns = [_shrink_to_stack(column) for column in columns]
    available = 1 - 2 * _MARGIN - _GAP * (len(columns) - 1)
    while True:  # shrink the tallest or widest column until all fit
        widths = [scale * sum(_measure_extents(column)) for column in columns]
        heights = [scale * _measure_height(column) for column in columns]
        tall = [c for c in range(len(columns)) if heights[c] > high - _MARGIN]
        if not tall and sum(widths) <= available:
            break
        c = tall[0] if tall else max(range(len(columns)), key=lambda i: (_shrink_largest(columns[i]) != columns[i], widths[i]))
        smaller = _shrink_largest(columns[c])
        scale *= 0.97 if smaller == columns[c] else 1.0
        columns[c] = smaller
    spare = [rng.random() + 0.05 for _ in range(len(columns) + 1)]
    left, slack = _MARGIN, available - sum(widths)
    out: list[SceneObject] = []
    for c, column in enumerate(columns):
        left += slack * spare[c] / sum(spare)
        x = left + scale * _measure_extents(column)[0]
        left += widths[c] + _GAP
        is_flying = len(column) == 1 and KINDS[column[0].kind].can_fly and rng.bernoulli(0.6)
        highest = heights[c] + _MARGIN
        y = rng.uniform(highest, max(0.5, highest)) if is_flying else max(rng.uniform(low, high), highest)
        for row, spec in enumerate(column):
            tilt = rng.uniform(-0.06, 0.06) if len(column) == 1 else 0.0
            supported_by = len(out) - 1 if row else None
            stretch, texture = rng.uniform(0.95, 1.03), rng.randbelow(1 << 16)
            out.append(
                SceneObject(spec, x, y, scale * _compute_longer_side(spec), tilt, stretch, c, supported_by, is_flying, texture)
            )
            if row + 1 < len(column):
                dx, dy = _compute_support_offset(spec, column[row + 1])
                x, y = x + scale * dx, y + scale * dy
    return tuple(out)


def _shrink_to_stack(column: list[ObjectSpec]) -> list[ObjectSpec]:
    """Return the column with the upper object no larger than the lower one and not hiding too much of it."""
    if len(column) < 2:
        return column
    order = tuple(SIZES)
    below, above = column
    upper, lower = sorted((order.index(below.size), order.index(above.size)))
    out = [replace(below, size=order[lower]), replace(above, size=order[upper])]
    while _estimate_hidden_fraction(*out) > _MAX_HIDDEN and (upper or lower < len(order) - 1):
        lower, upper = (lower + 1, upper) if lower < len(order) - 1 else (lower, upper - 1)
        out = [replace(below, size=order[lower]), replace(above, size=order[upper])]
    return out


def _estimate_hidden_fraction(below: ObjectSpec, above: ObjectSpec) -> float:
    """Estimate which fraction of the lower object the upper one hides when it stands on the support point."""
    kind = KINDS[below.kind]
    across = KINDS[above.kind].width * _compute_longer_side(above) / (kind.width * _compute_longer_side(below))
    return min(1.0, across) * kind.support_point[1] / kind.height


def _shrink_largest(column: list[ObjectSpec]) -> list[ObjectSpec]:
    """Return the column with its largest objects one size smaller, whatever the upper one hides then."""
    order = tuple(SIZES)
    largest = max(order.index(spec.size) for spec in column)
    return [replace(x, size=order[max(0, largest - 1)]) if order.index(x.size) == largest else x for x in column]


def _compute_longer_side(spec: ObjectSpec) -> float:
    return SIZES[spec.size] * KINDS[spec.kind].size_factor


def _compute_support_offset(below: ObjectSpec, above: ObjectSpec) -> tuple[float, float]:
    """Return the offset from the lower object's base point to the upper one's.

    The upper object stands on the support point, or higher if it would hide too much there.
    """
    kind = KINDS[below.kind]
    depth = kind.support_point[1] * min(1.0, _MAX_HIDDEN / max(_estimate_hidden_fraction(below, above), 1e-9))
    a, b, c, d = build_matrix(_compute_longer_side(below) / 100, below.flip, 0.0, 1.0)
    x, y = kind.support_point[0] - kind.width / 2, depth - kind.height
    return a * x + b * y, c * x + d * y


def _measure_extents(column: list[ObjectSpec]) -> tuple[float, float]:
    """Return how far a column extends left and right of its lowest base point, with an allowance for tilt."""
    left = right = x = 0.0
    for row, spec in enumerate(column):
        kind, unit = KINDS[spec.kind], _compute_longer_side(spec) / 100
        half = (1.03 * kind.width / 2 + (3.0 if len(column) > 1 else 6.0)) * unit
        left, right = max(left, half - x), max(right, half + x)
        x += _compute_support_offset(spec, column[row + 1])[0] if row + 1 < len(column) else 0.0
    return left, right


def _measure_height(column: list[ObjectSpec]) -> float:
    y = top = 0.0
    for row, spec in enumerate(column):
        kind, unit = KINDS[spec.kind], _compute_longer_side(spec) / 100
        top = max(top, (kind.height + 4) * unit - y)
        y += _compute_support_offset(spec, column[row + 1])[1] if row + 1 < len(column) else 0.0
    return top
