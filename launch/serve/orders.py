"""A drawing of two orders side by side: that of embeddings and that after re-ranking, with a line for each image that moved.

    draw_orders(results) -> Orders, which the page draws as SVG

It is laid out along the screen where that is wide, and down the screen where it is narrow. An image whose place in the other
order is behind the last one that is shown has a line that leaves the drawing.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.search.query import Result, Results

SHOWN = 24
"""Most places of each order that are drawn."""
CELL, STEP, BAND, LABEL = 80, 92, 76, 22
"""Pixels: side of an image, from one to the next, between the two orders, and of their titles."""


@dataclass(frozen=True)
class Place:
    """An image in one of the orders."""

    key: str
    caption: str
    position: int
    """From 0."""


@dataclass(frozen=True)
class Move:
    """A line between the two orders."""

    start: float
    """Pixels along the first order to the middle of the image."""
    end: float
    kind: str
    """up, down or same; out: no longer among the results; in: from behind the last place."""
    title: str


@dataclass(frozen=True)
class Orders:
    """Both orders, and the moves between them."""

    before: list[Place]
    after: list[Place]
    moves: list[Move]

    @property
    def length(self) -> int:
        """Pixels along the orders."""
        return STEP * max(len(self.before), len(self.after)) + (
            STEP // 2 if any(m.kind in ("in", "out") for m in self.moves) else 0
        )

    @property
    def breadth(self) -> int:
        """Pixels across both orders."""
        return 2 * (CELL + LABEL) + BAND


def draw_orders(results: Results) -> Orders | None:
    """Return the two orders of the results; None where nothing was re-ranked."""
    if not results.before:
        return None
    before, after = results.before[:SHOWN], results.results[:SHOWN]
    position_before = {result.hit.item.key: i for i, result in enumerate(before)}
    position_after = {result.hit.item.key: i for i, result in enumerate(after)}
    beyond = STEP * max(len(before), len(after)) + STEP / 2 - (STEP - CELL) / 2
    moves = []
    for i, result in enumerate(after):
        image, place = result.hit.item, position_before.get(result.hit.item.key)
        title = f"{image.caption or image.key}: from {result.rank} to {i + 1}"
        if place is None:
            moves.append(Move(beyond, _middle(i), "in", title))
        else:
            kind = "up" if i < place else "down" if i > place else "same"
            moves.append(Move(_middle(place), _middle(i), kind, title))
    for i, result in enumerate(before):
        if result.hit.item.key not in position_after:
            name = result.hit.item.caption or result.hit.item.key
            moves.append(Move(_middle(i), beyond, "out", f"{name}: from {i + 1} to behind {len(after)}"))
    return Orders(_list_places(before), _list_places(after), moves)


def _list_places(results: list[Result]) -> list[Place]:
    return [Place(result.hit.item.key, result.hit.item.caption, i) for i, result in enumerate(results)]


def _middle(position: int) -> float:
    return STEP * position + CELL / 2
