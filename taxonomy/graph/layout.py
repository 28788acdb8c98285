"""What the layouts share: text that is measured, boxes that can be compared, curves as SVG path data.

A layout turns a graph into a `Scene`: marks (one for each node that is drawn), links (edges as curves) and decoration, in
pixels, x to the right and y down. Nothing here knows about colours; `tools.drawing` writes a scene as SVG.
"""

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import networkx

    Graph: TypeAlias = networkx.MultiDiGraph[str]

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

TREE_RELATIONS = ("in", "described_by", "filed_under")
SYMMETRIC = ("alternative_to", "composes_with")

NARROW, SLIM, WIDE = set("ijl.,:;'|!`"), set('ftr()[]{}-/\\" *I'), set("mwMW@%—…")
BOLD = 1.08


@dataclass(frozen=True)
class Label:
    """A line of text, anchored at the middle of its height and turned clockwise by `angle` degrees about that point."""

    text: str
    x: float
    y: float
    size: float
    anchor: Anchor = "start"
    angle: float = 0.0
    style: str = ""

    def corners(self) -> list[Point]:
        """The four corners of its box, with the room above and below that a line of text needs."""
        width = text_width(self.text, self.size) * (BOLD if "strong" in self.style else 1)
        left = {"start": 0.0, "middle": -width / 2, "end": -width}[self.anchor]
        half = 0.55 * self.size
        cosine, sine = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        box = [(left, -half), (left + width, -half), (left + width, half), (left, half)]
        return [(self.x + dx * cosine - dy * sine, self.y + dx * sine + dy * cosine) for dx, dy in box]


@dataclass(frozen=True)
class Mark:
    """A node: a dot of radius `height / 2`, or a box if it has a width, around (x, y)."""

    node: str
    x: float
    y: float
    height: float
    width: float = 0.0
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Link:
    """An edge as path data; `head` is where its arrow points and the direction in which it does, in radians."""

    source: str
    target: str
    relation: str
    path: str
    head: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Decor:
    """A shape or text that stands for no node: a family's arc, a year's heading."""

    style: str
    path: str = ""
    label: Label | None = None


@dataclass(frozen=True)
class Scene:
    """A drawing in pixels; its box is (left, top, width, height)."""

    kind: Literal["layered", "radial"]
    box: tuple[float, float, float, float]
    marks: list[Mark] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    decor: list[Decor] = field(default_factory=list)

    def labels(self) -> list[Label]:
        """Every text in it."""
        return [label for mark in self.marks for label in mark.labels] + [d.label for d in self.decor if d.label]


def homes(graph: "Graph") -> dict[str, str]:
    """Category of every method, and of every paper: the first it is filed under, else its method's, else none."""
    homes = {node: data["category"] for node, data in graph.nodes(data=True) if data["kind"] == "method"}
    for node, data in graph.nodes(data=True):
        if data["kind"] == "paper":
            filed = [
                t.removeprefix("category:")
                for _, t, e in graph.out_edges(node, data=True)
                if e["relation"] == "filed_under"
            ]
            described = [homes[s] for s, _, e in graph.in_edges(node, data=True) if e["relation"] == "described_by"]
            homes[node] = [*filed, *described, "papers"][0]
    return homes


def is_covered(data: Mapping[str, object]) -> bool:
    """Whether a node counts as covered: what `select` found out, or for a method whether it runs."""
    return bool(data.get("covered", data.get("implemented", False)))


def text_width(text: str, size: float) -> float:
    """Width in pixels of text in a sans-serif face, from classes of characters, rather too wide than too narrow.

    Examples:
        >>> round(text_width("GPTQ", 10))
        31
    """
    return size * sum(map(_advance, text))


def _advance(character: str) -> float:
    """Advance width in em: Arial's and Helvetica's, rounded up by class so that other faces have some room too."""
    if character in NARROW:
        return 0.27
    if character in SLIM:
        return 0.37
    if character in WIDE:
        return 0.95
    if character.isascii():
        return 0.78 if character.isupper() else 0.59
    if unicodedata.combining(character):
        return 0.0
    return 1.0 if unicodedata.east_asian_width(character) in "WF" else 0.8


def elide(text: str, size: float, limit: float) -> str:
    """Text cut so that it fits into `limit` pixels, its end replaced by an ellipsis; empty if not even that fits.

    Examples:
        >>> elide("Speculative sampling", 10, 80)
        'Speculative s…'
    """
    if text_width(text, size) <= limit:
        return text
    room = limit - text_width("…", size)
    if room <= 0:
        return ""
    kept = 0
    for character in text:
        room -= _advance(character) * size
        if room < 0:
            break
        kept += 1
    return text[:kept].rstrip() + "…"


def wrap(text: str, size: float, limit: float, lines: int) -> list[str]:
    """Text broken at spaces into at most `lines` lines of at most `limit` pixels; the last line takes the rest, elided."""
    done: list[str] = []
    words = text.split()
    while words and len(done) < lines - 1:
        taken = 1
        while taken < len(words) and text_width(" ".join(words[: taken + 1]), size) <= limit:
            taken += 1
        done.append(elide(" ".join(words[:taken]), size, limit))
        words = words[taken:]
    return done + ([elide(" ".join(words), size, limit)] if words else [])


def spaced(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres as near to `wanted` as they can be, in this order, side by side without overlap, between low and high.

    The least-squares answer: subtracting the room taken so far turns it into isotonic regression, which merging runs of
    neighbours that press against each other (pool adjacent violators) solves in linear time.

    Examples:
        >>> spaced([5, 5, 20], [4, 4, 4], 0, 30)
        [3.0, 7.0, 20.0]
    """
    if not wanted:
        return []
    offsets, before = [], 0.0
    for size in sizes:
        offsets.append(before + size / 2)
        before += size
    runs: list[tuple[float, int]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        mean, count = want - offset, 1
        while runs and runs[-1][0] > mean:
            other, others = runs.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        runs.append((mean, count))
    shifts = [min(max(mean, low), max(low, high - before)) for mean, count in runs for _ in range(count)]
    return [float(shift + offset) for shift, offset in zip(shifts, offsets, strict=True)]


def around_zero(angle: float, radius: float) -> Point:
    """The point at a clockwise angle from the top, in radians."""
    return radius * math.sin(angle), -radius * math.cos(angle)


def spline(points: Sequence[Point]) -> str:
    """Path data of the uniform cubic B-spline that starts and ends at the outer points and is drawn to the inner ones."""
    if len(points) == 1:
        return f"M{_at(points[0])}"
    if len(points) == 2:
        return f"M{_at(points[0])}L{_at(points[1])}"
    parts = [f"M{_at(points[0])}L{_at(_mix(points[0], points[1], 1 / 6))}"]
    for before, here, after in zip(points, points[1:], [*points[2:], points[-1]], strict=False):
        knot = (before[0] + 4 * here[0] + after[0]) / 6, (before[1] + 4 * here[1] + after[1]) / 6
        parts.append(f"C{_at(_mix(before, here, 1 / 3))} {_at(_mix(before, here, 2 / 3))} {_at(knot)}")
    return "".join(parts) + f"L{_at(points[-1])}"


def curve(start: Point, first: Point, second: Point, end: Point) -> str:
    """Path data of one cubic Bézier curve."""
    return f"M{_at(start)}C{_at(first)} {_at(second)} {_at(end)}"


def line(points: Iterable[Point]) -> str:
    """Path data of straight lines from point to point."""
    return "M" + "L".join(map(_at, points))


def arc(radius: float, start: float, end: float) -> str:
    """Path data of a clockwise arc around the origin; a full turn is drawn as two halves."""
    middle = (start + end) / 2
    turns = [(start, middle), (middle, end)] if end - start > math.pi else [(start, end)]
    steps = "".join(f"A{number(radius)} {number(radius)} 0 0 1 {_at(around_zero(stop, radius))}" for _, stop in turns)
    return f"M{_at(around_zero(start, radius))}{steps}"


def number(value: float) -> str:
    """A coordinate in tenths of a pixel, without trailing zeros and without a negative zero.

    Examples:
        >>> number(-0.01), number(12.5), number(3)
        ('0', '12.5', '3')
    """
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _at(point: Point) -> str:
    return f"{number(point[0])},{number(point[1])}"


def _mix(first: Point, second: Point, share: float) -> Point:
    return first[0] + (second[0] - first[0]) * share, first[1] + (second[1] - first[1]) * share
