"""Time from left to right: a column for each year that occurs, methods as boxes, relations as curves between columns.

Where the graph holds categories they stand on the left, each beside the lane in which its methods are kept. Within the
lanes the order is Sugiyama's: an edge that spans columns gets a place in each of them, barycenter sweeps reduce the
crossings, and least squares draws what is joined to one height. Edges of one kind to one method share their way.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from taxonomy.graph.layout import (
    SYMMETRIC,
    TREE_RELATIONS,
    Decor,
    Label,
    Link,
    Mark,
    Scene,
    curve,
    elide,
    homes,
    line,
    number,
    text_width,
    wrap,
)
from taxonomy.graph.ordering import Cell, order, settle

if TYPE_CHECKING:
    from taxonomy.graph.layout import Graph

TEXT, PAPER_TEXT, YEAR = 12.0, 10.0, 12.0
BOX, PAPER_BOX, WAY = 22.0, 18.0, 7.0
SPACE = 10.0
GAP = 84.0
CATEGORY = 148.0
LONGEST, LONGEST_PAPER = 220.0, 170.0
HEAD = 7.0


def layered(graph: "Graph") -> Scene:
    """The scene of a graph by year; entries without a year stand in the first column."""
    return _Timeline(graph).scene()


class _Timeline:
    """One drawing: the cells of each column, the lanes, and the route of each edge through the cells."""

    def __init__(self, graph: "Graph") -> None:
        self.graph = graph
        self.categories = [n.removeprefix("category:") for n in graph if n.startswith("category:")]
        entries = [node for node in graph if graph.nodes[node]["kind"] != "category"]
        self.years = sorted({graph.nodes[node].get("year", 0) for node in entries})
        self.column = {year: i for i, year in enumerate(self.years)}
        self.parents = {category.rpartition("/")[0] for category in self.categories}
        self.homes = homes(graph)
        self.lanes = self._lanes(entries)
        self.columns: list[list[Cell]] = [[] for _ in self.years]
        self.cells = {node: self._box(node, rank) for rank, node in enumerate(entries)}
        self.ways: dict[tuple[str, str, int], Cell] = {}
        self.routes = [
            (source, target, data["relation"], self._route(source, target, data["relation"]))
            for source, target, data in graph.edges(data=True)
            if data["relation"] not in TREE_RELATIONS or data["relation"] == "described_by"
        ]
        order(self.columns)
        self.tops = self._heights()
        settle(self.columns, self.tops)
        self.lefts, self.widths = self._widths()

    def _lanes(self, entries: list[str]) -> dict[str, int]:
        """Categories that get a lane: with entries of their own, or with nothing below; one nameless lane without any."""
        if not self.categories:
            return {"": 0}
        used = {self.homes[node] for node in entries}
        names = [c for c in self.categories if c in used or c not in self.parents]
        return {name: lane for lane, name in enumerate([*names, *sorted(used.difference(self.categories))])}

    def _box(self, node: str, rank: int) -> Cell:
        data = self.graph.nodes[node]
        size, longest, height = (
            (PAPER_TEXT, LONGEST_PAPER, PAPER_BOX) if data["kind"] == "paper" else (TEXT, LONGEST, BOX)
        )
        text = elide(data["name"], size, longest)
        column = self.column[data.get("year", 0)]
        lane = self.lanes[self.homes[node]] if self.categories else 0
        cell = Cell(node, column, lane, rank, height + SPACE, text_width(text, size) + 16, text)
        self.columns[column].append(cell)
        return cell

    def _route(self, source: str, target: str, relation: str) -> list[Cell]:
        """Cells that an edge passes, from source to target; made and joined to their neighbours where they are new."""
        start, end = self.cells[source], self.cells[target]
        step = 1 if end.column > start.column else -1
        route = [start]
        for column in range(start.column + step, end.column, step) if start.column != end.column else ():
            way = self.ways.get((target, relation, column))
            if way is None:
                way = self.ways[target, relation, column] = Cell((target, relation), column, end.lane, end.rank, WAY)
                self.columns[column].append(way)
            route.append(way)
        route.append(end)
        for one, other in pairwise(route):
            if one.column == other.column:
                one.beside[other] = other.beside[one] = None
            else:
                (one.right if step > 0 else one.left)[other] = None
                (other.left if step > 0 else other.right)[one] = None
        return route

    def _heights(self) -> list[tuple[float, float]]:
        """Top and bottom of each lane: room for its fullest column, and for the category's name."""
        need: dict[int, float] = defaultdict(float)
        for column in self.columns:
            taken: dict[int, float] = defaultdict(float)
            for cell in column:
                taken[cell.lane] += cell.height
                need[cell.lane] = max(need[cell.lane], taken[cell.lane])
        tops, y = [], 0.0
        for lane in range(len(self.lanes)):
            bottom = y + max(need[lane] + SPACE, 2.2 * BOX)
            tops.append((y, bottom))
            y = bottom
        return tops

    def _widths(self) -> tuple[list[float], list[float]]:
        """Left edge and width of each column, right of the categories."""
        x = CATEGORY * self._depths() + (GAP / 2 if self.categories else 0)
        lefts, widths = [], []
        for column in self.columns:
            width = max((cell.width for cell in column), default=0.0)
            lefts.append(x)
            widths.append(max(width, 40.0))
            x += widths[-1] + GAP
        return lefts, widths

    def _depths(self) -> int:
        depths = [category.count("/") for category in self.categories]
        return 1 + max(depths) - min(depths) if depths else 0

    def scene(self) -> Scene:
        """Everything, in a box with room for the years above."""
        bottom = self.tops[-1][1] if self.tops else 0.0
        right = self.lefts[-1] + self.widths[-1] if self.lefts else CATEGORY * self._depths()
        bowed = any(cell.beside for cell in self.columns[-1]) if self.columns else False
        width = max(right + 40 + bowed * GAP * 0.6, 480.0)
        marks = [self._mark(cell) for cell in self.cells.values()] + list(self._icicle())
        return Scene(
            "layered", (-20, -36, width, bottom + 44), marks, list(self._links()), list(self._decor(right, bottom))
        )

    def _mark(self, cell: Cell) -> Mark:
        x, node = self.lefts[cell.column] + self.widths[cell.column] / 2, str(cell.key)
        size = PAPER_TEXT if self.graph.nodes[node]["kind"] == "paper" else TEXT
        label = Label(cell.text, x, cell.y, size, "middle")
        return Mark(node, x, cell.y, cell.height - SPACE, self.widths[cell.column], (label,))

    def _decor(self, right: float, bottom: float) -> Iterator[Decor]:
        for year, left, width in zip(self.years, self.lefts, self.widths, strict=True):
            yield Decor(
                "band", f"M{number(left - 8)},-8h{number(width + 16)}V{number(bottom + 4)}h{number(-width - 16)}Z"
            )
            yield Decor(
                "year", label=Label(str(year or "no year"), left + width / 2, -20, YEAR, "middle", style="strong")
            )
        for top, _ in self.tops[1:]:
            yield Decor("rule", line([(0.0, top), (right + 12, top)]))

    def _icicle(self) -> Iterator[Mark]:
        """Categories as boxes: a column for each depth, as high as the lanes of all that is below."""
        first = min((category.count("/") for category in self.categories), default=0)
        spans: dict[str, tuple[float, float]] = {}
        for name, (top, bottom) in zip(self.lanes, self.tops, strict=True):
            parts = name.split("/")
            for category in ("/".join(parts[: i + 1]) for i in range(len(parts))):
                spans[category] = (spans.get(category, (top, bottom))[0], bottom)
        for category in self.categories:
            top, bottom = spans[category][0] + 2, spans[category][1] - 2
            left = CATEGORY * (category.count("/") - first)
            inner = category in self.parents
            width = CATEGORY - 4 if inner else CATEGORY * self._depths() - left - 4
            name = self.graph.nodes[f"category:{category}"]["name"]
            lines = wrap(name, TEXT, width - 12, max(1, int((bottom - top) // (TEXT * 1.2))))
            x, y = left + width / 2, (top + bottom) / 2
            labels = tuple(
                Label(text, x, y + (i - (len(lines) - 1) / 2) * TEXT * 1.2, TEXT, "middle")
                for i, text in enumerate(lines)
            )
            yield Mark(f"category:{category}", x, y, bottom - top, width, labels)

    def _links(self) -> Iterator[Link]:
        ports = self._ports()
        for source, target, relation, route in self.routes:
            forward = route[-1].column > route[0].column
            same = route[-1].column == route[0].column
            out = ports[route[0], forward or same, (relation, target)]
            into = ports[route[-1], same or not forward, (relation, "")]
            if same:
                yield self._beside(source, target, relation, out, into)
                continue
            start = (self._side(route[0], forward), out)
            path = ""
            tip = (self._side(route[-1], not forward), into)
            stop = (tip[0] - HEAD * (1 if forward else -1), into) if relation not in SYMMETRIC else tip
            for way in [*route[1:-1], None]:
                end = (self._side(way, not forward), way.y) if way else stop
                middle = (start[0] + end[0]) / 2
                bend = curve(start, (middle, start[1]), (middle, end[1]), end)
                path += f"L{bend[1:]}" if path else bend
                start = (self._side(way, forward), way.y) if way else end
            yield Link(source, target, relation, path, None if stop == tip else (*tip, 0.0 if forward else math.pi))

    def _beside(self, source: str, target: str, relation: str, out: float, into: float) -> Link:
        """An edge within a year: a bow on the right of the column, wider for boxes further apart."""
        x = self._side(self.cells[source], True)
        bow = x + min(GAP * 0.8, 18 + 0.2 * abs(into - out))
        end = x if relation in SYMMETRIC else x + HEAD
        path = curve((x, out), (bow, out), (bow, into), (end, into))
        return Link(source, target, relation, path, None if relation in SYMMETRIC else (x, into, math.pi))

    def _side(self, cell: Cell, right: bool) -> float:
        return self.lefts[cell.column] + (self.widths[cell.column] if right else 0.0)

    def _ports(self) -> dict[tuple[Cell, bool, tuple[str, str]], float]:
        """Height at which edges leave (relation, target) and enter (relation, "") a box on its left or right (True) side."""
        wanted: dict[tuple[Cell, bool], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
        for _, target, relation, route in self.routes:
            step = route[-1].column - route[0].column
            wanted[route[0], step >= 0][relation, target].append(route[1].y)
            wanted[route[-1], step <= 0][relation, ""].append(route[-2].y)
        ports = {}
        for (cell, right), ends in wanted.items():
            ordered = sorted(ends, key=lambda end: (sum(ends[end]) / len(ends[end]), end))
            pitch = min(5.0, (cell.height - SPACE - 8) / len(ordered))
            for i, end in enumerate(ordered):
                ports[cell, right, end] = cell.y + (i - (len(ordered) - 1) / 2) * pitch
        return ports
