"""The tree around a circle: categories inside, methods on the rim in tree order, relations as curves through the middle.

Text stands on the rim only, along the radius, and reads like a table of contents: each category's name heads its methods.
Inside, where the curves run, a category is a dot on the ring of its depth. Papers, where there are any, stand small on a
second rim, in the sector of their category. The radius is the smallest at which every line of text has its own room.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from taxonomy.graph.layout import (
    BOLD,
    SYMMETRIC,
    TREE_RELATIONS,
    Decor,
    Label,
    Link,
    Mark,
    Point,
    Scene,
    arc,
    around_zero,
    curve,
    elide,
    is_covered,
    line,
    spline,
    text_width,
)
from taxonomy.graph.sectors import BESIDE, LINE, METHOD, Sector, sectors

if TYPE_CHECKING:
    from taxonomy.graph.layout import Graph

PAPER, FAMILY = 8.0, 15.0
LONGEST_METHOD, LONGEST_PAPER = 180.0, 170.0
DOT, PAPER_DOT = 7.0, 4.0
LEADER = 46.0
STRAIGHTEN = 0.12
HEAD = 6.0


def radial(graph: "Graph") -> Scene:
    """The scene of a graph in tree order; methods bring their categories with them, drawn or not."""
    return _Circle(graph).scene()


class _Circle:
    """One drawing: sectors, the radii, and the angle and radius of every entry."""

    def __init__(self, graph: "Graph") -> None:
        self.graph = graph
        self.tops = sectors(graph)
        self.sectors = [sector for top in self.tops for sector in top.walk()]
        self.by_category = {sector.category: sector for sector in self.sectors}
        self.texts = {node: _text(graph, node) for node in graph}
        self.rings = 2 + max((s.depth for s in self.sectors), default=0)
        widths = [text_width(text, METHOD) * BOLD for s in self.sectors for text in s.heading]
        widths += [text_width(self.texts[method], METHOD) for s in self.sectors for method in s.methods]
        self.reach = max(widths, default=0.0) + DOT + 4
        self.rim = self._radius()
        self.outer = self.rim + self.reach + LEADER
        self.place: dict[str, tuple[float, float]] = {}
        self._spread()

    def _need(self, rim: float) -> float:
        return sum(s.room(rim, rim + self.reach + LEADER) + s.gap(rim) for s in self.sectors)

    def _radius(self) -> float:
        """The smallest radius at which all entries fit, found by halving; rings and curves need some room as well."""
        low = high = 50.0 * self.rings
        while self._need(high) > 2 * math.pi:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self._need(middle) <= 2 * math.pi else (middle, high)
        return high

    def _spread(self) -> None:
        """Give every entry its angle, and every category its dot on a ring: leaves on the last, others by depth."""
        share = 2 * math.pi / (self._need(self.rim) or 1.0)
        for sector in self.sectors:
            sector.own = (sector.room(self.rim, self.outer) + sector.gap(self.rim)) * share
        cursor = 0.0
        for top in self.tops:
            cursor = self._lay(top, cursor, None)
        for sector in self.sectors:
            ring = sector.depth + 1 if sector.below else self.rings - 1
            self.place[f"category:{sector.category}"] = (sector.middle, self.rim * ring / self.rings)

    def _lay(self, sector: Sector, cursor: float, upwards: bool | None) -> float:
        """Lay out a sector clockwise from an angle, and return the angle where it ends.

        On the left, clockwise is upwards: there everything is laid in reverse, so that it reads from top to bottom too. A
        sector too large to be on one side leaves this to those below it.
        """
        total = sector.total()
        if upwards is None and (total < 0.8 * math.pi or not sector.below):
            upwards = math.sin(cursor + total / 2) < 0
        sector.start, sector.end = cursor, cursor + total
        gap = sector.own * sector.gap(self.rim) / (sector.room(self.rim, self.outer) + sector.gap(self.rim) or 1.0)
        own = cursor + total - sector.own if upwards else cursor
        left = math.sin(own + sector.own / 2) < 0 if upwards is None else upwards
        self._stand(sector, own + gap / 2, sector.own - gap, left)
        if upwards:
            for below in reversed(sector.below):
                cursor = self._lay(below, cursor, upwards)
        else:
            cursor += sector.own
            for below in sector.below:
                cursor = self._lay(below, cursor, upwards)
        return sector.end

    def _stand(self, sector: Sector, start: float, room: float, upwards: bool) -> None:
        """Set a sector's own entries side by side: the lines of its name close together, the others evenly apart."""
        pitch = min(LINE / self.rim, room / max(1, len(sector.rows())))
        head = pitch * len(sector.heading)
        spots = {entry: pitch * (i + 0.5) for i, entry in enumerate(sector.rows()[: len(sector.heading)])}
        for i, method in enumerate(sector.methods):
            spots[method] = head + (room - head) * (i + 0.5) / len(sector.methods)
        if not sector.methods:
            spots = {entry: spot + (room - head) / 2 for entry, spot in spots.items()}
        for entry, spot in spots.items():
            self.place[entry] = (start + (room - spot if upwards else spot), self.rim)
        for i, paper in enumerate(sector.papers):
            spot = room * (i + 0.5) / len(sector.papers)
            self.place[paper] = (start + (room - spot if upwards else spot), self.outer)

    def point(self, node: str) -> Point:
        """Where a node's dot is."""
        return around_zero(*self.place[node])

    def scene(self) -> Scene:
        """Everything, in a box that all of it fits into."""
        marks = [self._mark(node) for node in self.graph]
        decor = [*self._branches(), *self._families()]
        labels = [label for mark in marks for label in mark.labels] + [d.label for d in decor if d.label]
        far = max((max(abs(x), abs(y)) for label in labels for x, y in label.corners()), default=0.0)
        half = max(far, self.edge()) + 12
        return Scene("radial", (-half, -half, 2 * half, 2 * half), marks, list(self._links()), decor)

    def edge(self) -> float:
        """Radius beyond all text along the radius."""
        papers = [text_width(self.texts[node], PAPER) for s in self.sectors for node in s.papers]
        return (self.outer + max(papers) + PAPER_DOT + 4 if papers else self.rim + self.reach) + 6

    def _mark(self, node: str) -> Mark:
        kind = self.graph.nodes[node]["kind"]
        angle, radius = self.place[node]
        x, y = around_zero(angle, radius)
        if kind == "category":
            return Mark(node, x, y, DOT, labels=tuple(self._heading(node.removeprefix("category:"))))
        size, dot = (PAPER, PAPER_DOT) if kind == "paper" else (METHOD, DOT)
        return Mark(node, x, y, dot, labels=(_spoke(self.texts[node], angle, radius + dot / 2 + 4, size, ""),))

    def _heading(self, category: str) -> Iterator[Label]:
        sector = self.by_category[category]
        style = "strong" if sector.depth == 1 else "strong soft"
        for i, text in enumerate(sector.heading):
            yield _spoke(text, self.place[f"{category}:{i}"][0], self.rim - DOT / 2, METHOD, style)

    def _branches(self) -> Iterator[Decor]:
        """Thin lines that no edge of the graph stands for: from the centre, and to the name of what has no entry."""
        for top in self.tops if len(self.tops) > 1 else []:
            yield Decor("branch", line([(0.0, 0.0), self.point(f"category:{top.category}")]))
        for sector in self.sectors:
            if sector.heading and not sector.methods and not sector.below:
                angle = self.place[f"{sector.category}:0"][0]
                end = around_zero(angle, self.rim - DOT)
                yield Decor("branch", line([self.point(f"category:{sector.category}"), end]))

    def _families(self) -> Iterator[Decor]:
        """An arc around each top-level category, filled as far as its methods are covered, and its name along it."""
        radius, middle = self.edge(), self.edge() + 8 + FAMILY / 2
        names = {}
        for top in self.tops:
            methods = [m for sector in top.walk() for m in sector.methods]
            done = sum(is_covered(self.graph.nodes[m]) for m in methods)
            gap = min(BESIDE[0] / 2 / self.rim, (top.end - top.start) / 4)
            start, end = top.start + gap, top.end - gap
            yield Decor("family", arc(radius, start, end))
            if done:
                yield Decor("family covered", arc(radius, start, start + (end - start) * done / len(methods)))
            name = self.graph.nodes.get(f"category:{top.category}", {}).get(
                "name", top.category.replace("_", " ").capitalize()
            )
            names[top.category] = f"{name}  {done}/{len(methods)}" if methods else name
        for text, angle in _fitted(self.tops, names, radius):
            turned = math.degrees(angle) + (180 if math.pi / 2 < angle % (2 * math.pi) < 1.5 * math.pi else 0)
            yield Decor(
                "family", label=Label(text, *around_zero(angle, middle), FAMILY, "middle", turned, "family strong")
            )

    def _links(self) -> Iterator[Link]:
        for source, target, data in self.graph.edges(data=True):
            relation = data["relation"]
            if relation == "in":
                yield Link(source, target, relation, self._branch(source, target))
            elif relation == "described_by":
                yield Link(source, target, relation, self._leader(source, target))
            elif relation not in TREE_RELATIONS:
                yield self._relation(source, target, relation)

    def _branch(self, child: str, parent: str) -> str:
        (angle, radius), (above, inner) = self.place[child], self.place[parent]
        middle = (radius + inner) / 2
        return curve(
            around_zero(angle, radius),
            around_zero(angle, middle),
            around_zero(above, middle),
            around_zero(above, inner),
        )

    def _leader(self, method: str, paper: str) -> str:
        """From the end of a method's label to its paper, along the free ring between the two rims."""
        (angle, radius), (other, outer) = self.place[method], self.place[paper]
        start = radius + DOT + 4 + text_width(self.texts[method], METHOD)
        ring = outer - LEADER / 2
        turn = (other - angle + math.pi) % (2 * math.pi) - math.pi
        steps = max(1, math.ceil(abs(turn) / 0.1))
        along = [around_zero(angle + turn * i / steps, ring + 8) for i in range(steps + 1)]
        return spline(
            [around_zero(angle, start), around_zero(angle, ring), *along, around_zero(other, outer - PAPER_DOT)]
        )

    def _relation(self, source: str, target: str, relation: str) -> Link:
        """A curve drawn towards the tree's path between two methods, so that edges of neighbours run together."""
        path = [self.point(node) for node in self._path(source, target)]
        first, last, count = path[0], path[-1], len(path) - 1
        bent = [
            tuple(
                (1 - STRAIGHTEN) * p[axis] + STRAIGHTEN * (first[axis] + (last[axis] - first[axis]) * i / count)
                for axis in (0, 1)
            )
            for i, p in enumerate(path)
        ]
        points = [(p[0], p[1]) for p in bent]
        points[0] = _towards(points[0], points[1], DOT / 2)
        if relation in SYMMETRIC:
            points[-1] = _towards(points[-1], points[-2], DOT / 2)
            return Link(source, target, relation, spline(points))
        tip = _towards(points[-1], points[-2], DOT / 2 + 1)
        points[-1] = _towards(points[-1], points[-2], DOT / 2 + HEAD)
        direction = math.atan2(tip[1] - points[-1][1], tip[0] - points[-1][0])
        return Link(source, target, relation, spline(points), (*tip, direction))

    def _path(self, source: str, target: str) -> list[str]:
        """Nodes of the tree between two methods, both included; the root is left out where the path turns below it."""
        up, down = self._ancestors(source), self._ancestors(target)
        while len(up) > 1 and len(down) > 1 and up[-2] == down[-2]:
            up.pop()
            down.pop()
        middle = [up[-1]] if up[-1] in self.place else []
        return [source, *up[:-1], *middle, *reversed(down[:-1]), target]

    def _ancestors(self, method: str) -> list[str]:
        """Nodes of the categories above a method, nearest first, and "" for the root."""
        category = self.graph.nodes[method]["category"]
        above = []
        while f"category:{category}" in self.place:
            above.append(f"category:{category}")
            category = category.rpartition("/")[0]
        return [*above, ""]


def _fitted(tops: Sequence[Sector], names: Mapping[str, str], radius: float) -> list[tuple[str, float]]:
    """Names of the families and their angles: whole where neighbours leave room, else cut to their own sector."""
    half = {top.category: math.atan(text_width(names[top.category], FAMILY) * BOLD / 2 / radius) + 0.01 for top in tops}
    fitted = []
    for i, top in enumerate(tops):
        gaps = [
            min((top.middle - other.middle) % (2 * math.pi), (other.middle - top.middle) % (2 * math.pi))
            - half[other.category]
            for other in (tops[i - 1], tops[(i + 1) % len(tops)])
            if other is not top
        ]
        own = 2 * radius * math.tan(min(top.end - top.start, 2.5) / 2) / BOLD - 6
        whole = not gaps or min(gaps) >= half[top.category]
        if text := names[top.category] if whole else elide(names[top.category], FAMILY, own):
            fitted.append((text, top.middle if len(tops) > 1 else 0.0))
    return fitted


def _text(graph: "Graph", node: str) -> str:
    """A node's name, as far as there is room for it."""
    data = graph.nodes[node]
    size, longest = (PAPER, LONGEST_PAPER) if data["kind"] == "paper" else (METHOD, LONGEST_METHOD)
    return elide(data["name"], size, longest)


def _spoke(text: str, angle: float, radius: float, size: float, style: str) -> Label:
    """Text along the radius, outwards, turned so that it's never upside down."""
    x, y = around_zero(angle, radius)
    if math.sin(angle) >= 0:
        return Label(text, x, y, size, "start", math.degrees(angle) - 90, style)
    return Label(text, x, y, size, "end", math.degrees(angle) + 90, style)


def _towards(point: Point, other: Point, distance: float) -> Point:
    """The point at a distance from one point on the way to another; the first one where they coincide."""
    dx, dy = other[0] - point[0], other[1] - point[1]
    length = math.hypot(dx, dy) or 1.0
    return point[0] + dx / length * distance, point[1] + dy / length * distance
