"""The tree laid around a circle: which sector each category takes, what stands in it, and how much room that needs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from taxonomy.graph.layout import BOLD, homes, wrap

if TYPE_CHECKING:
    from taxonomy.graph.layout import Graph

METHOD = 11.0
LINE, PAPER_LINE = 13.0, 9.4
BESIDE = (26.0, 10.0, 5.0)
LONGEST_HEADING = 150.0


@dataclass
class Sector:
    """A category on the circle: its own entries, the categories below it, and the angles that all of it takes.

    Attributes:
        heading: lines of its name on the rim, none for a family (its arc is named) and for what the graph lacks.
        own: angle of its own entries, with the gap that sets them apart.
    """

    category: str
    depth: int
    heading: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    papers: list[str] = field(default_factory=list)
    below: list["Sector"] = field(default_factory=list)
    own: float = 0.0
    start: float = 0.0
    end: float = 0.0

    def walk(self) -> Iterator["Sector"]:
        """Itself and all below it, in reading order."""
        yield self
        for sector in self.below:
            yield from sector.walk()

    def rows(self) -> list[str]:
        """Keys of its lines of text on the inner rim, in reading order."""
        return [f"{self.category}:{i}" for i in range(len(self.heading))] + self.methods

    def room(self, rim: float, outer: float) -> float:
        """Angle that its own entries need on circles of these radii; a category without any still needs a place."""
        lines = len(self.rows()) or int(not self.below and not self.papers)
        return max(lines * LINE / rim, len(self.papers) * PAPER_LINE / outer)

    def gap(self, rim: float) -> float:
        """Angle left free beside them."""
        bare = self.below and not self.rows() and not self.papers and self.depth
        return 0.0 if bare else BESIDE[min(self.depth, len(BESIDE) - 1)] / rim

    def total(self) -> float:
        """Angle of all of it."""
        return sum(sector.own for sector in self.walk())

    @property
    def middle(self) -> float:
        """Half way round it."""
        return (self.start + self.end) / 2


def sectors(graph: "Graph") -> list[Sector]:
    """The categories on top, with all below them and their entries."""
    home = homes(graph)
    order: dict[str, None] = {}
    for category in [*(n.removeprefix("category:") for n in graph if n.startswith("category:")), *home.values()]:
        parts = category.split("/")
        order.update(dict.fromkeys("/".join(parts[: i + 1]) for i in range(len(parts))))
    found = {category: Sector(category, category.count("/")) for category in order}
    for category, sector in found.items():
        found.get(category.rpartition("/")[0], Sector("", -1)).below.append(sector)
    for node in sorted(home, key=lambda n: (_rank(graph, n), n)):
        sector = found[home[node]]
        (sector.papers if graph.nodes[node]["kind"] == "paper" else sector.methods).append(node)
    tops = [sector for category, sector in found.items() if "/" not in category]
    while len(tops) == 1 and f"category:{tops[0].category}" not in graph and tops[0].below and not tops[0].methods:
        tops = tops[0].below
    for top in tops:
        above = top.category.count("/")
        for sector in top.walk():
            sector.depth -= above
            if sector.depth and f"category:{sector.category}" in graph:
                sector.heading = wrap(
                    graph.nodes[f"category:{sector.category}"]["name"], METHOD * BOLD, LONGEST_HEADING, 2
                )
    return tops


def _rank(graph: "Graph", node: str) -> tuple[int, str]:
    """Entries stand by year; papers that methods describe by come first, in the order of their methods."""
    years = [
        (graph.nodes[m].get("year", 0), m)
        for m, _, e in graph.in_edges(node, data=True)
        if e["relation"] == "described_by"
    ]
    return (
        min(years)
        if years
        else (graph.nodes[node].get("year", 0) + 10_000 * (graph.nodes[node]["kind"] == "paper"), node)
    )
