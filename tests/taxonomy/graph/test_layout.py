import itertools
import math
import random
import re
from collections import defaultdict
from xml.etree import ElementTree

import networkx
import pytest

from taxonomy.graph import arrange, render, select
from taxonomy.graph.layout import Label, elide, number, spaced, spline, text_width, wrap
from taxonomy.graph.ordering import Cell, crossings, order

SVG = "{http://www.w3.org/2000/svg}"
SIZES = [(5, 0), (40, 0), (110, 0), (200, 480)]


def boxes(svg):
    """Corners of every text of a drawing, worked out from the SVG's own attributes."""
    for text in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        x, y, size = (float(text.get(name)) for name in ("x", "y", "font-size"))
        width = text_width(text.text, size) * (1.08 if "strong" in text.get("class", "") else 1)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor", "start")]
        angle, px, py = 0.0, x, y
        if text.get("transform"):
            angle, px, py = map(float, re.fullmatch(r"rotate\((\S+) (\S+) (\S+)\)", text.get("transform")).groups())
        turn = complex(math.cos(math.radians(angle)), math.sin(math.radians(angle)))
        corners = [
            (left, y - size / 2),
            (left + width, y - size / 2),
            (left + width, y + size / 2),
            (left, y + size / 2),
        ]
        turned = [complex(cx - px, cy - py) * turn + complex(px, py) for cx, cy in corners]
        yield text.text, [(c.real, c.imag) for c in turned]


def overlap(one, other):
    """Oracle: separating axis theorem; two convex boxes are apart if some edge's normal separates them."""
    for box in (one, other):
        for (ax, ay), (bx, by) in zip(box, box[1:] + box[:1], strict=True):
            nx, ny = ay - by, bx - ax
            first, second = ([nx * x + ny * y for x, y in corners] for corners in (one, other))
            if max(first) <= min(second) + 1e-6 or max(second) <= min(first) + 1e-6:
                return False
    return True


def colliding(texts):
    """Pairs of overlapping boxes; a grid of 100 pixels finds the candidates."""
    cells = defaultdict(list)
    for i, (_, box) in enumerate(texts):
        xs, ys = zip(*box, strict=True)
        for column in range(int(min(xs) // 100), int(max(xs) // 100) + 1):
            for row in range(int(min(ys) // 100), int(max(ys) // 100) + 1):
                cells[column, row].append(i)
    pairs = {pair for members in cells.values() for pair in itertools.combinations(members, 2)}
    return [(texts[i][0], texts[j][0]) for i, j in sorted(pairs) if overlap(texts[i][1], texts[j][1])]


def test_boxes_that_cross_or_touch_are_told_apart():
    """Oracle: by hand."""
    square = [(0, 0), (2, 0), (2, 2), (0, 2)]
    tilted = [(1.9, 1), (3, 0), (4, 1), (3, 2)]
    assert overlap(square, tilted)
    assert not overlap(square, [(x + 0.2, y) for x, y in tilted])
    assert colliding([("a", square), ("b", tilted)]) == [("a", "b")]


@pytest.mark.parametrize("layout", ["layered", "radial"])
@pytest.mark.parametrize(("methods", "papers"), SIZES)
def test_no_label_overlaps_another_and_none_leaves_the_picture(grow, methods, papers, layout):
    tree = grow(methods, papers, seed=methods)
    svg = render(select(tree, papers=bool(papers)), layout=layout)
    texts = list(boxes(svg))
    assert len(texts) > methods + papers
    assert colliding(texts) == []
    left, top, width, height = map(float, ElementTree.fromstring(svg).get("viewBox").split())
    for text, box in texts:
        assert all(left <= x <= left + width and top <= y <= top + height for x, y in box), text


@pytest.mark.parametrize("layout", ["layered", "radial"])
def test_one_category_alone_and_methods_alone_do_not_overlap(grow, layout):
    tree = grow(60, 50, seed=7)
    parts = [{"category": c} for c in list(tree.categories)[:6]] + [{"around": "m9", "depth": d} for d in (0, 1, 3)]
    for part in [*parts, {"relation": ["builds_on"]}]:
        for papers in (False, True):
            assert colliding(list(boxes(render(select(tree, papers=papers, **part), layout=layout)))) == [], part


def test_every_name_is_there_in_full_or_cut_with_an_ellipsis(grow):
    tree = grow(50)
    for layout in ("layered", "radial"):
        root = ElementTree.fromstring(render(select(tree), layout=layout))
        for group in root.iter(f"{SVG}g"):
            if "kind-method" in group.get("class", "") and group.get("data-id"):
                (text,) = (t.text for t in group.iter(f"{SVG}text"))
                assert text == group.get("data-name") or group.get("data-name").startswith(text.removesuffix("…"))


def test_methods_stand_on_the_rim_in_tree_order_with_categories_inside(grow):
    tree = grow(120)
    scene = arrange(select(tree), "radial")
    radius = {mark.node: math.hypot(mark.x, mark.y) for mark in scene.marks}
    angle = {mark.node: math.atan2(mark.x, -mark.y) % (2 * math.pi) for mark in scene.marks}
    rim = {round(radius[name], 3) for name in tree.methods}
    assert len(rim) == 1
    assert max(radius[f"category:{c}"] for c in tree.categories) < min(rim) * 0.9
    for parent, child in ((c.parent, c) for c in tree.categories.values() if c.parent):
        assert radius[f"category:{parent}"] < radius[f"category:{child.id}"]
    around = sorted(tree.methods, key=angle.get)
    for place in tree.categories:
        inside = [f"{tree.methods[m].category}/".startswith(f"{place}/") for m in around]
        assert sum(a != b for a, b in itertools.pairwise(inside)) <= 2, f"{place} is torn apart"
    families = [k for k, _ in itertools.groupby(tree.methods[m].category.split("/")[0] for m in around)]
    assert families == [c.id for c in tree.children(None) if tree.find(category=c.id)]


def test_names_read_from_top_to_bottom_on_both_sides(grow):
    tree = grow(150)
    scene = arrange(select(tree), "radial")
    place = {mark.node: (mark.x, mark.y) for mark in scene.marks}
    for category in tree.categories:
        methods = sorted((m for m in tree.methods.values() if m.category == category), key=lambda m: (m.year, m.id))
        xs, ys = [place[m.id][0] for m in methods], [place[m.id][1] for m in methods]
        if methods and (min(xs) > 0 or max(xs) < 0) and abs(sum(ys)) / len(ys) < min(map(abs, xs)):
            assert ys == sorted(ys), category


def test_later_years_stand_further_right_and_boxes_apart(grow):
    tree = grow(60, seed=2)
    scene = arrange(select(tree, relation=["builds_on", "composes_with"]), "layered")
    marks = {mark.node: mark for mark in scene.marks}
    for one, other in itertools.combinations(marks, 2):
        a, b = marks[one], marks[other]
        if tree.methods[one].year < tree.methods[other].year:
            assert a.x + a.width / 2 < b.x - b.width / 2
        apart = abs(a.x - b.x) >= (a.width + b.width) / 2 or abs(a.y - b.y) >= (a.height + b.height) / 2 - 1e-9
        assert apart, (one, other)


def test_a_method_stays_in_its_categorys_lane(grow):
    tree = grow(50, seed=3)
    marks = {mark.node: mark for mark in arrange(select(tree), "layered").marks}
    for method in tree.methods.values():
        parts = method.category.split("/")
        for place in ("/".join(parts[: i + 1]) for i in range(len(parts))):
            lane, box = marks[f"category:{place}"], marks[method.id]
            assert lane.y - lane.height / 2 <= box.y - box.height / 2
            assert box.y + box.height / 2 <= lane.y + lane.height / 2


def joined(sizes, links):
    columns = [[Cell(f"{c}.{i}", c, 0, i, 20, 50) for i in range(size)] for c, size in enumerate(sizes)]
    for column, a, b in links:
        columns[column][a].right[columns[column + 1][b]] = None
        columns[column + 1][b].left[columns[column][a]] = None
    for column in columns:
        for i, cell in enumerate(column):
            cell.place = (i + 0.5) / len(column)
    return columns


@pytest.mark.parametrize("seed", range(8))
def test_crossings_are_counted_and_sweeps_do_not_add_any(seed):
    """Oracle: brute force over all pairs of edges."""
    rng = random.Random(seed)
    sizes = [5, 7, 6]
    links = sorted({(c, rng.randrange(sizes[c]), rng.randrange(sizes[c + 1])) for c in rng.choices([0, 1], k=20)})
    columns = joined(sizes, links)
    brute = sum((a - c) * (b - d) < 0 for (k, a, b), (m, c, d) in itertools.combinations(links, 2) if k == m)
    assert crossings(columns) == brute > 0
    order(columns)
    for column in columns:
        for i, cell in enumerate(column):
            cell.place = (i + 0.5) / len(column)
    assert crossings(columns) < brute


def test_sweeps_untangle_what_can_be_untangled():
    """Oracle: a ladder drawn upside down has no crossing in the right order."""
    columns = joined([4, 4], [(0, i, 3 - i) for i in range(4)])
    assert crossings(columns) == 6
    order(columns)
    assert [cell.key for cell in columns[1]] == [f"1.{3 - int(cell.key[2])}" for cell in columns[0]]


@pytest.mark.parametrize("seed", range(5))
def test_spaced_is_the_nearest_arrangement(seed):
    """Oracle: no arrangement that keeps order, sizes and bounds, of 2000 drawn at random near it, is nearer."""
    rng = random.Random(seed)
    sizes = [rng.choice([2.0, 5.0, 9.0]) for _ in range(6)]
    wanted = [rng.uniform(-5, 45) for _ in sizes]
    found = spaced(wanted, sizes, 0, 60)

    def fits(centres):
        edges = [(c - s / 2, c + s / 2) for c, s in zip(centres, sizes, strict=True)]
        return (
            edges[0][0] >= -1e-9
            and edges[-1][1] <= 60 + 1e-9
            and all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(edges))
        )

    def cost(centres):
        return sum((c - w) ** 2 for c, w in zip(centres, wanted, strict=True))

    assert fits(found)
    others = ([c + rng.gauss(0, 0.5) for c in found] for _ in range(2000))
    near = [other for other in others if fits(other)]
    assert all(cost(found) <= cost(other) + 1e-9 for other in near)
    assert spaced([], [], 0, 1) == []
    assert spaced([7.0], [2.0], 0, 100) == [7.0]
    assert spaced([-9.0, -9.0], [4.0, 4.0], 0, 30) == [2.0, 6.0]
    assert spaced([40.0], [4.0], 0, 30) == [28.0]


def test_text_fits_where_it_is_said_to_fit():
    for text, limit in itertools.product(
        ["Speculative decoding with a draft", "WWW", "注意力機制", ""], [0, 8, 30, 100, 400]
    ):
        cut = elide(text, 11, limit)
        assert text_width(cut, 11) <= limit
        assert cut == text or cut == "" or cut.endswith("…")
        for count in (1, 2, 3):
            lines = wrap(text, 11, limit, count)
            assert len(lines) <= count
            assert all(text_width(part, 11) <= limit for part in lines)
    assert wrap("Unstructured and semi-structured pruning", 11, 150, 2) == [
        "Unstructured and",
        "semi-structured pruning",
    ]
    assert text_width("WMW", 10) > text_width("iii", 10) * 2


def test_corners_turn_with_the_label():
    """Oracle: by hand; text that runs downwards from (10, 20) takes its width in y and its height in x."""
    width = text_width("abc", 10)
    corners = Label("abc", 10, 20, 10, angle=90).corners()
    assert [(round(x, 6), round(y, 6)) for x, y in corners] == [
        (15.5, 20),
        (15.5, round(20 + width, 6)),
        (4.5, round(20 + width, 6)),
        (4.5, 20),
    ]


def test_spline_starts_and_ends_where_it_should():
    path = spline([(0, 0), (10, 50), (60, 50), (100, 0)])
    assert path.startswith("M0,0")
    assert path.endswith("L100,0")
    assert number(-0.04) == "0"
    assert spline([(1, 2)]) == "M1,2"


def test_drawing_grows_linearly():
    """Ten times the methods take about ten times the marks and room, not a hundred times."""

    def chain(count):
        graph = networkx.MultiDiGraph()
        for i in range(count):
            graph.add_node(f"m{i}", kind="method", name=f"Method {i}", year=2015 + i % 10, category=f"c{i % 20}")
            if i:
                graph.add_edge(f"m{i}", f"m{i * 7 % i}", relation="builds_on")
        return graph

    small, large = (len(render(chain(count), layout="radial")) for count in (300, 3000))
    assert large < 13 * small
