"""Oracles: a list of broken files with the place marked in them; `yaml.safe_load` and `msgspec.convert` for what is not broken."""

import random
import re

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import taxonomy
from taxonomy.reader import HINTS, Document, Loader, Problem, check, files, parse, read
from taxonomy.schema import CategoryFile, FrameworkFile, Id, MethodFile, PaperEntry
from tests.small_tree import AWQ, FILES, GPTQ, LAYERS, LORA, MODULE, PROSE, QLORA, RTN

CATEGORY = f"{LAYERS}/_category.yaml"
FRAMEWORK = "systems/frameworks/peft.yaml"
PAPERS = "papers/2023.yaml"
REAL = taxonomy.ROOT
MARK = "¶"  # stands before the place at which the problem must be reported


def put(tree, name, text):
    """Write a file whose text holds `MARK` or not; returns the place of the mark, (1, 1) without."""
    before = text.partition(MARK)[0] if MARK in text else ""
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(MARK, ""), encoding="utf-8")
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def change(tree, name, old, new):
    """Replace the one place where a file of the tree says `old`."""
    text = (tree / name).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
    return put(tree, name, text.replace(old, new))


# fmt: off  (a case is a line: file, what it says, what it says then, and the message)
BROKEN = {
    # the schema
    "unknown key": (GPTQ, "tags:", "¶tagz:", "unknown key 'tagz'; did you mean 'tags'?"),
    "unknown key, nothing near": (GPTQ, "tags:", "¶zzz:", "unknown key 'zzz'; known: name, summary,"),
    "slip in a required key": (GPTQ, "summary:", "¶sumary:", "unknown key 'sumary'; did you mean 'summary'?"),
    "unknown key inside": (AWQ, "gqa: true", "¶gpa: true", "unknown key 'gpa'; did you mean 'gqa'?"),
    "missing key": (GPTQ, "name: GPTQ\n", "¶", "'name' is missing; right: text (As the paper spells it)"),
    "missing key inside": (
        AWQ,
        "facets: {stage: [post-training], ",
        "¶facets: {",
        "'stage' is missing; right: list of one of data, ",
    ),
    "wrong type": (
        GPTQ,
        "tags: [post-training, gptq-like]",
        "¶tags: 7",
        "expected `array`, got `int`, got 7; right: list of",
    ),
    "number for text": (GPTQ, "name: GPTQ", "¶name: 7", "expected `str`, got `int`"),
    "text for truth": (
        GPTQ,
        "exact: false",
        "¶exact: maybe",
        "expected `bool`, got `str`, got 'maybe'; right: true or false",
    ),
    "wrong literal": (
        GPTQ,
        "training: none",
        "¶training: non",
        "'non' is not one of none, partial, full; did you mean 'none'?",
    ),
    "wrong literal in a list": (
        LORA,
        "[post-training], training",
        "[¶postraining], training",
        "did you mean 'post-training'?",
    ),
    "list too short": (GPTQ, "papers: [gptq]", "¶papers: []", "expected `array` of length >= 1, got []"),
    "wrong item": (
        AWQ,
        "tags: [post-training, awq-like]",
        "tags: [ok, ¶Not-OK]",
        "'Not-OK'; right: text (Lower-case letters, digits, hyphens)",
    ),
    "two lines": (
        GPTQ,
        "summary: What GPTQ does.",
        "¶summary: |\n  One.\n  Two.",
        "'One.\\nTwo.\\n'; right: text (One sentence",
    ),
    "line break at the end": (
        GPTQ,
        "name: GPTQ",
        "¶name: |\n  GPTQ",
        "'GPTQ\\n'; right: text (As the paper spells it)",
    ),
    "too long": (GPTQ, "summary: What GPTQ does.", f"¶summary: {'x' * 241}", "length <= 240"),
    "too short": (GPTQ, f"when: |\n  {PROSE}", "¶when: Always.", "length >= 40, got 'Always.'"),
    "wrong claim": (
        RTN,
        "{below: 1.0, unit: ratio}",
        "{¶below: one, unit: ratio}",
        "expected `float | null`, got `str`",
    ),
    "wrong arena": (RTN, "bits: [4]", "¶bits: 4", "expected `array`, got `int`"),
    "impl no name": (RTN, "impl: RTN", "¶impl: a.b", "'a.b'; right: text (Object in the mirrored module"),
    "wrong order": (CATEGORY, "order: 1", "¶order: 0", "expected `int` >= 1, got 0"),
    "wrong url": (
        PAPERS,
        "  code: https://example.org/code",
        "  ¶code: ftp://x",
        "'ftp://x'; right: text (An http or https address)",
    ),
    "unquoted arXiv id": (PAPERS, "arxiv: '2210.17323'", "¶arxiv: 2210.17323", "got `float`"),
    "arXiv id with version": (
        PAPERS,
        "arxiv: '2210.17323'",
        "¶arxiv: '2210.17323v2'",
        "right: text (arXiv id, quoted, without version)",
    ),
    "framework supports": (FRAMEWORK, "[fine-tuning]", "[¶finetuning]", "did you mean 'fine-tuning'?"),
    "key of a paper": (
        PAPERS,
        "awq:",
        "¶AWQ_1: {title: T, venue: V, url: https://x.org, categories: [systems]}\nawq:",
        "'AWQ_1'; right: text (Lower-case",
    ),
    "no mapping": (GPTQ, FILES[GPTQ], "¶- a\n- b\n", "expected `object`, got `array`"),
    "no mapping of papers": ("papers/2018.yaml", FILES["papers/2018.yaml"], "¶[]", "expected `object`, got `array`"),
    "survey": ("survey.yaml", "finetuning: Fine-tuning", "¶finetuning: [a]", "expected `str`, got `array`"),
    # references
    "unknown method": (GPTQ, "- rtn", "- ¶rtm", "unknown method 'rtm'; did you mean 'rtn'?"),
    "unknown method, nothing near": (GPTQ, "- rtn", "- ¶zzzzz", "unknown method 'zzzzz'; known: see effllm tree"),
    "unknown paper": (QLORA, "[qlora, lora]", "[qlora, ¶lola]", "unknown paper 'lola'; did you mean 'lora'?"),
    "unknown paper of a claim": (
        RTN,
        "paper: rtn-2018",
        "¶paper: rtn-2019",
        "unknown paper 'rtn-2019'; did you mean 'rtn-2018'?",
    ),
    "unknown category": (
        PAPERS,
        "- finetuning",
        "- ¶finetune",
        "unknown category 'finetune'; did you mean 'finetuning'?",
    ),
    "unknown heading of a category": (
        "compression/_category.yaml",
        "[compression]",
        "[¶compresion]",
        "unknown heading 'compresion'; did you mean 'compression'?",
    ),
    "unknown claim of a question": (
        f"{LAYERS}/_category.yaml",
        "[rtn/error-bound]",
        "[¶rtn/error-bond]",
        "unknown claim 'rtn/error-bond'; did you mean 'rtn/error-bound'?",
    ),
    "unknown heading of a paper": (
        PAPERS,
        "- compression/quantization\n",
        "- ¶quantization\n",
        "unknown heading 'quantization'",
    ),
    "unknown method of a framework": (FRAMEWORK, "- lora", "- ¶loras", "unknown method 'loras'; did you mean 'lora'?"),
    "points at itself": (GPTQ, "- rtn", "- rtn\n  - ¶gptq", "'gptq' points at itself; remove it"),
    "same target twice": (GPTQ, "- rtn", "- rtn\n  - ¶rtn", "method 'rtn' stands here twice; keep one"),
    "same paper twice": (QLORA, "[qlora, lora]", "[qlora, ¶qlora]", "paper 'qlora' stands here twice; keep one"),
    "symmetric twice": (
        GPTQ,
        "- rtn\n",
        "- rtn\n  alternative_to: [¶awq]\n",
        "'awq' says so already; a symmetric relation is declared once",
    ),
    "symmetric twice, composes": (LORA, "generalizes: []", "composes_with: [¶gptq]", "'gptq' says so already"),
    "arXiv id twice": (
        PAPERS,
        "  code: https://example.org/code",
        "  ¶arxiv: '2210.17323'",
        "arXiv 2210.17323 is 'gptq' already; an id is used once",
    ),
    "arXiv month": (
        PAPERS,
        "arxiv: '2210.17323'",
        "¶arxiv: '2213.17323'",
        "arXiv 2213.17323 has no month 13; it reads YYMM.number",
    ),
    "older than what it builds on": (
        GPTQ,
        "- rtn",
        "- ¶awq",
        "gptq (2022) is older than awq (2023), which it is said to build on; check",
    ),
    # claims and implementations
    "claim without expectation": (
        RTN,
        "expect: {below: 1.0, unit: ratio}",
        "¶expect: {unit: ratio}",
        "expects nothing; give above, below or equals",
    ),
    "claim twice": (RTN, "- id: groups", "- ¶id: error-bound", "claim 'error-bound' stands here twice; keep one"),
    "no object": (RTN, "impl: RTN", "¶impl: RTNN", f"refimpl/{LAYERS}/rtn.py has no 'RTNN'; did you mean 'RTN'?"),
    # YAML
    "alias": (
        AWQ,
        "tags: [post-training, awq-like]",
        "tags: [&x ok, ¶*x]",
        "an alias (*x) repeats another node; write the value out",
    ),
    "undefined alias": (GPTQ, "summary: What", "summary: ¶*What", HINTS["undefined alias"]),
    "date": (GPTQ, "name: GPTQ", "¶name: 2022-10-31", "'2022-10-31' is read as timestamp; put it in quotes"),
    "date as key": (
        GPTQ,
        "tags:",
        "¶2022-10-31:",
        "a key must be text; '2022-10-31' is read as timestamp: put it in quotes",
    ),
    "number as key": (GPTQ, "tags:", "¶7:", "a key must be text; '7' is read as int: put it in quotes"),
    "truth as key": (GPTQ, "tags:", "¶on:", "a key must be text; 'on' is read as bool: put it in quotes"),
    "list as key": (GPTQ, "tags:", "? ¶[a]\n:", "a key must be text; this is a collection"),
    "merge key": (
        GPTQ,
        "tags: [post-training, gptq-like]",
        "¶<<: {tags: []}",
        "a key must be text; '<<' is read as merge: put it in quotes",
    ),
    "key twice": (GPTQ, "tags:", "¶name: GPTQ\ntags:", "'name' stands here twice; keep one"),
    "unknown tag": (GPTQ, "name: GPTQ", "¶name: !shell GPTQ", "'GPTQ' is read as !shell; remove the tag"),
    "Python tag": (
        GPTQ,
        "tags:",
        "¶tags: !!python/object/apply:os.system [ls]\n#",
        "this is read as python/object/apply:os.system; remove the tag",
    ),
    "truth that is none": (
        GPTQ,
        "exact: false",
        "¶exact: !!bool maybe",
        "'maybe' cannot be read as bool; put it in quotes",
    ),
    "number that is none": (CATEGORY, "order: 1", "¶order: !!int ''", "'' cannot be read as int; put it in quotes"),
    "huge number": (
        RTN,
        "bits: [4]",
        "bits: [¶99999999999999999999]",
        "'99999999999999999999' is too large for a number",
    ),
    "vast number": (RTN, "bits: [4]", f"bits: [¶0x{'f' * 9999}]", "is too large for a number; put it in quotes"),
    "infinite number": (RTN, "bits: [4]", "bits: [¶.inf]", "'.inf' is not a finite number"),
    "not a number": (RTN, "{below: 1.0,", "{¶below: .NaN,", "'.NaN' is not a finite number"),
    "tab": (GPTQ, "  builds_on:", "¶\tbuilds_on:", "indent with spaces"),
    "colon": (GPTQ, "summary: What GPTQ does.", "summary: What¶: it does.", "put a text with a colon in it in quotes"),
    "control character": (
        GPTQ,
        "name: GPTQ",
        "name: É¶\x07GPTQ",
        "control characters are not allowed; remove the character",
    ),
    "empty": (GPTQ, FILES[GPTQ], "", "the file is empty; `effllm new` shows what belongs here"),
    "comment only": (GPTQ, FILES[GPTQ], "# soon\n", "the file is empty"),
    "two documents": (
        AWQ,
        "name: AWQ",
        "a: b\n¶---\nname: AWQ",
        "expected a single document in the stream, but found another document",
    ),
    "deep on one line": (
        GPTQ,
        "name: GPTQ",
        f"name: {'[' * 99}¶{'[' * 2000}",
        "nested too deeply; an entry needs five levels at most",
    ),
    "deep, a file like a bomb": (GPTQ, "name: GPTQ", f"name: {'[' * 99}¶{'[' * 200_000}", "nested too deeply"),
    "deep in dashes": (GPTQ, FILES[GPTQ], f"{'- ' * 100}¶{'- ' * 50_000}a", "nested too deeply"),
}
# fmt: on


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_problem_at_its_place(small_tree, name):
    """Oracle: the mark in the file; and that nothing else is wrong with the tree, so that any second problem is a cascade."""
    file, old, new, message = BROKEN[name]
    line, column = change(small_tree, file, old, new)
    (problem,) = taxonomy.validate(small_tree)
    assert problem[:3] == (file, line, column)
    assert message in problem.message


def test_the_small_tree_is_valid(small_tree):
    assert taxonomy.validate(small_tree) == []


def test_a_problem_prints_as_editors_and_terminals_understand_it():
    assert str(Problem("a/b.yaml", 3, 7, "what; remedy")) == "a/b.yaml:3:7: what; remedy"


def only(tree):
    (problem,) = taxonomy.validate(tree)
    return str(problem)


def test_paper_key_in_two_years(small_tree):
    """The later file is at fault, and the message says where the first stands."""
    put(small_tree, "papers/2025.yaml", FILES["papers/2021.yaml"])
    assert only(small_tree) == "papers/2025.yaml:1:1: 'lora' stands in papers/2021.yaml:1:1 already; an id is used once"


def test_method_id_in_two_categories(small_tree):
    put(small_tree, "finetuning/gptq.yaml", FILES[GPTQ])
    assert only(small_tree) == f"finetuning/gptq.yaml:1:1: 'gptq' stands in {GPTQ}:1:1 already; an id is used once"


def test_same_arxiv_id_in_two_files(small_tree):
    put(
        small_tree,
        "papers/2024.yaml",
        "other:\n  title: T\n  venue: V\n  url: https://x.org\n  categories: [systems]\n  arxiv: '1712.05877'\n",
    )
    assert only(small_tree) == "papers/2024.yaml:6:3: arXiv 1712.05877 is 'rtn-2018' already; an id is used once"


def test_a_symmetric_relation_is_reported_on_one_side_only(small_tree):
    """Asymmetric ones may go both ways (`combines` and `generalizes` are no cycle)."""
    change(small_tree, LORA, "generalizes: []", "generalizes: [qlora]\n  combines: [qlora]")
    assert taxonomy.validate(small_tree) == []


def test_cycle_of_builds_on(small_tree):
    change(small_tree, PAPERS, "title: 'QLoRA'", "title: 'QLoRA'\n  arxiv: '2101.00001'")  # as old as lora
    line, column = change(small_tree, LORA, "generalizes: []", f"builds_on: [{MARK}qlora]")
    cycle = "a cycle: lora builds on qlora builds on lora; one of these is wrong"
    assert only(small_tree) == f"{LORA}:{line}:{column}: {cycle}"


def test_cycles_that_reach_each_other_are_reported_each(small_tree):
    """Two separate cycles, where a search from the first method runs into the second: both are named, once."""
    papers = "".join(f"p-{n}:\n  title: T\n  venue: V\n  url: https://x.org\n  categories: [systems]\n" for n in "abcd")
    put(small_tree, "papers/2010.yaml", papers)
    builds_on = {"a": "c, b", "b": "a", "c": "d", "d": "c"}
    for name, targets in builds_on.items():
        text = (
            FILES[LORA]
            .replace("papers: [lora]", f"papers: [p-{name}]")
            .replace("generalizes: []", f"builds_on: [{targets}]")
        )
        put(small_tree, f"finetuning/{name}.yaml", text)
    assert [str(p).partition(": ")[::2] for p in taxonomy.validate(small_tree)] == [
        ("finetuning/a.yaml:6:18", "a cycle: a builds on b builds on a; one of these is wrong"),
        ("finetuning/c.yaml:6:15", "a cycle: c builds on d builds on c; one of these is wrong"),
    ]


def test_equal_years_may_build_on_each_other_and_older_may_not(small_tree):
    change(small_tree, AWQ, "alternative_to:\n  - gptq", "builds_on: [qlora]")  # 2023 on 2023
    assert taxonomy.validate(small_tree) == []
    change(small_tree, PAPERS, "title: 'QLoRA'", "title: 'QLoRA'\n  arxiv: '2212.00001'")
    assert taxonomy.validate(small_tree) == []
    change(small_tree, RTN, "generalizes: []", "builds_on: [awq]")
    assert "rtn (2017) is older than awq (2023)" in only(small_tree)


def test_claim_that_does_not_hold_says_why(small_tree):
    line, column = change(small_tree, RTN, "- id: groups", f"- {MARK}id: groups")
    change(small_tree, RTN, "  why: It was larger here.\n", "")
    assert (
        only(small_tree) == f"{RTN}:{line}:{column}: a claim with `holds: false` needs `why`: what was measured instead"
    )


def test_implementation_needs_claims(small_tree):
    put(small_tree, "../refimpl/finetuning/lora.py", "def LoRA(): ...\n")
    change(small_tree, LORA, "name: LoRA\n", "name: LoRA\nimpl: LoRA\n")
    assert only(small_tree).endswith(
        "1:1: 'claims' is missing; a method that runs has at least one claim of its paper measured"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "is not there; write it, or leave out `impl`"),
        (b"x = 1\n", "has no 'RTN'"),
        (b"class Rtn: ...\n", "has no 'RTN'; did you mean 'Rtn'?"),
        (b"def RTN(:\n", "cannot be read: "),
        (b"\xff", "cannot be read: "),
        (b"def RTNs(): ...\n", "has no 'RTN'; did you mean 'RTNs'?"),
        (b"if True:\n    class RTN: ...\n", "has no 'RTN'"),
    ],
)
def test_implementation_is_looked_for_without_importing_it(small_tree, source, message):
    module = small_tree.parent / MODULE
    module.unlink() if source is None else module.write_bytes(source)
    line, _ = change(small_tree, RTN, "impl: RTN", f"{MARK}impl: RTN")
    assert only(small_tree).startswith(f"{RTN}:{line}:1: {MODULE} {message}")


def test_implementation_is_not_run(small_tree):
    (small_tree.parent / MODULE).write_text("raise SystemExit('imported')\nclass RTN: ...\n")
    assert taxonomy.validate(small_tree) == []


def test_byte_that_is_not_utf8(small_tree):
    """Columns count characters, as editors do, not bytes."""
    (small_tree / GPTQ).write_bytes("name: X\nsummary: Größe ".encode() + b"\xff\n")
    assert only(small_tree) == f"{GPTQ}:2:16: a byte that is not UTF-8; save the file as UTF-8"


def test_names_of_files(small_tree):
    """Each is named for itself; nothing that stands under a wrong name is read, and nothing is skipped."""
    misnamed = {
        "finetuning/LoRA.yaml": "file name 'LoRA.yaml' must be lower-case letters, digits and _",
        "finetuning/a-b.yaml": "file name 'a-b.yaml' must be",
        "finetuning/a__b.yaml": "file name 'a__b.yaml' must be",
        "finetuning/_a.yaml": "file name '_a.yaml' must be",
        "finetuning/é.yaml": "file name 'é.yaml' must be",
        "finetuning/.hidden.yaml": "file name '.hidden.yaml' must be",
        "finetuning/new.yml": "unexpected suffix '.yml'; name the file new.yaml",
        "papers/recent.yaml": "a file of papers is named for its year, as in 2023.yaml, not recent.yaml",
        "papers/20233.yaml": "a file of papers is named for its year",
        "stray.yaml": "no file stray.yaml is known here; methods stand in a category's folder",
        "_category.yaml": "no file _category.yaml is known here",
    }
    for name in misnamed:
        put(small_tree, name, FILES[LORA])
    put(small_tree, "Big-Folder/_category.yaml", FILES["finetuning/_category.yaml"])
    misnamed["Big-Folder/_category.yaml"] = "folder name 'Big-Folder' must be lower-case letters, digits and _"
    found = {p.file: p for p in taxonomy.validate(small_tree)}
    assert found.keys() == misnamed.keys()
    for name, message in misnamed.items():
        assert message in found[name].message
        assert found[name][1:3] == (1, 1)


def test_folder_without_category_is_one_problem(small_tree):
    """However many methods and folders stand in it, broken ones included; each folder above counts for itself."""
    (small_tree / CATEGORY).unlink()
    assert only(small_tree) == f"{AWQ}:1:1: {CATEGORY} is missing; each folder needs one"
    put(small_tree, "finetuning/x/y/_category.yaml", FILES["finetuning/_category.yaml"])
    put(small_tree, "finetuning/x/y/z/m.yaml", "")
    assert [(p.file, p.message.partition(" is missing")[0]) for p in taxonomy.validate(small_tree)] == [
        (AWQ, CATEGORY),
        ("finetuning/x/y/_category.yaml", "finetuning/x/_category.yaml"),
        ("finetuning/x/y/z/m.yaml", "finetuning/x/y/z/_category.yaml"),
        ("finetuning/x/y/z/m.yaml", "the file is empty; `effllm new` shows what belongs here"),
    ]


def test_file_that_cannot_be_opened(small_tree):
    """A link to nowhere, as editors leave it for their locks, is a problem like any other; so is a folder with a file's name none."""
    (small_tree / "finetuning/gone.yaml").symlink_to("nowhere")
    (small_tree / "finetuning/folder.yaml").mkdir()
    assert (
        only(small_tree)
        == "finetuning/gone.yaml:1:1: the file cannot be read: No such file or directory; give it back, or remove it"
    )
    with pytest.raises(taxonomy.InvalidTaxonomy, match=r"gone.yaml:1:1: the file cannot be read"):
        taxonomy.load(small_tree)


def test_folder_without_files(tmp_path):
    assert only(tmp_path) == ".:1:1: no YAML file below this folder; a taxonomy has one `_category.yaml` in each folder"


def test_all_problems_come_in_one_run_in_order(small_tree):
    """Every kind that can be put into files of their own, at once: as many problems as files, sorted by place."""
    places = {
        put(small_tree, f"finetuning/m{i}.yaml", FILES[LORA].replace("name: LoRA", f"{MARK}nam: LoRA")): i
        for i in range(30)
    }
    change(small_tree, RTN, "below: 1.0", "below: one")
    change(small_tree, GPTQ, "- rtn", "- rtm")
    change(small_tree, QLORA, "name: QLoRA", "name: [")
    change(small_tree, PAPERS, "- finetuning", "- nowhere")
    change(small_tree, FRAMEWORK, "ships:", "ship:")
    problems = taxonomy.validate(small_tree)
    assert len(places) == 1
    assert len(problems) == 35
    assert problems == sorted(problems)
    assert len(set(problems)) == 35


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("how", ["not YAML", "not UTF-8", "empty"])
def test_no_cascades_from_one_broken_file(small_tree, name, how):
    """A file that cannot be read at all is one problem, whatever refers to what it held."""
    text = {"not YAML": f"{FILES[name]}\n'", "not UTF-8": f"{FILES[name]}\udcff", "empty": ""}[how]
    (small_tree / name).write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = taxonomy.validate(small_tree)
    assert problem.file == name


def test_no_cascades_from_one_wrong_field(small_tree):
    """An entry that the schema refuses is still there to be referred to: a paper, a method, a category."""
    change(small_tree, "papers/2021.yaml", "venue: ICLR", "venue: 7")
    change(small_tree, LORA, "name: LoRA", "name: 7")
    change(small_tree, "finetuning/_category.yaml", "order: 2", "order: two")
    assert [p.file for p in taxonomy.validate(small_tree)] == ["finetuning/_category.yaml", LORA, "papers/2021.yaml"]


def test_order_of_categories_is_the_reading_order(small_tree):
    """Oracle: `order` in the files, parents before children; it differs from the alphabet's."""
    change(small_tree, "finetuning/_category.yaml", "order: 2", "order: 1")
    change(small_tree, "compression/_category.yaml", "order: 1", "order: 2")
    quantization = "compression/quantization"
    assert list(read(small_tree).categories) == [
        "finetuning", "compression", quantization, LAYERS, "systems", "systems/frameworks"
    ]  # fmt: skip


def test_year_is_that_of_the_first_posting(small_tree):
    """Oracle: the arXiv ids and file names: 1712.05877 stands in papers/2018, awq has no arXiv id."""
    years = {name: method.year for name, method in read(small_tree).methods.items()}
    assert years == {"rtn": 2017, "gptq": 2022, "awq": 2023, "lora": 2021, "qlora": 2023, "dora-x": 2023}


def test_contents_given_are_not_read_again(small_tree):
    contents = {path: path.read_bytes() for path in files(small_tree)}
    for path in contents:
        path.unlink()
    reading = read(small_tree, contents)
    assert list(reading.methods) == ["awq", "gptq", "rtn", "dora-x", "lora", "qlora"]


def test_report_climbs_to_the_nearest_known_place():
    document = Document("f", places={(): (1, 1), ("a",): (2, 3)})
    document.report(("a", "b", 4), "x")
    document.report(("c",), "y")
    assert document.problems == [Problem("f", 2, 3, "x"), Problem("f", 1, 1, "y")]
    empty = Document("f")
    empty.report(("a",), "z")
    assert empty.problems == [Problem("f", 1, 1, "z")]


# Properties

KINDS = {"method": MethodFile, "category": CategoryFile, "framework": FrameworkFile, "papers": dict[Id, PaperEntry]}
WHOLE = {
    "method": yaml.safe_load(FILES[RTN]),
    "category": yaml.safe_load(FILES["compression/_category.yaml"]),
    "framework": yaml.safe_load(FILES[FRAMEWORK]),
    "papers": yaml.safe_load(FILES[PAPERS]),
}
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9) | st.sampled_from(["name", "id", "stage"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


class WithoutAliases(yaml.SafeDumper):
    """Writes a value out each time it occurs."""

    def ignore_aliases(self, data):
        return True


def inside(problem, text):
    """Whether a problem's place is one that an editor can go to in that text, ends of lines and of the file included."""
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text)  # YAML's line breaks
    return 1 <= problem.line <= len(lines) and 1 <= problem.column <= len(lines[problem.line - 1]) + 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plain)
def test_what_is_written_as_yaml_is_read_back(value):
    """Oracle: the value itself, written by PyYAML, which escapes what it would not read back as it wrote it."""
    text = yaml.dump(value, Dumper=WithoutAliases, allow_unicode=False)
    document = parse("f", text.encode())
    assert [p.message for p in document.problems] == []
    assert document.value == yaml.load(text, Loader) == value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet=st.sampled_from(list("ab1:-?[]{}&*!|>'\"%@`#,. \n\t\\~=<\x00\x85\u2028\ufeffé𝕏")), max_size=60))
def test_any_text_is_a_value_or_problems_with_places(text):
    """Oracle where there is no problem: `yaml.safe_load`."""
    document = parse("f", text.encode())
    assert all(inside(p, text) for p in document.problems)
    if document.problems:
        assert all(p.message for p in document.problems)
    else:
        assert document.value == yaml.load(text, Loader)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_problems_with_places(content):
    document = parse("f", content)
    assert all(inside(p, content.decode("utf-8", "replace")) for p in document.problems)
    assert document.problems or document.value == yaml.load(content, Loader)


def places_of(value, where=()):
    yield where
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_of(item, (*where, key))


@st.composite
def nearly_whole(draw):
    """A kind of file and a value of it in which up to three parts are replaced, removed or added."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    value = msgspec.json.decode(msgspec.json.encode(WHOLE[kind]))
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.sampled_from(list(places_of(value))))
        if not where:
            continue
        holder = value
        for step in where[:-1]:
            holder = holder[step]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                holder[where[-1]] = draw(plain)
            case "remove":
                del holder[where[-1]]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["name", "why", "gqa", "aka", "x", "Name"]))] = draw(plain)
            case "add":
                holder.append(draw(plain))
    return kind, value


@settings(max_examples=250, deadline=None, derandomize=True)
@given(nearly_whole())
def test_check_finds_fault_exactly_where_msgspec_does(drawn):
    """Oracle: `msgspec.convert`, which stops at the first difference: it must agree on whether there is one."""
    kind, value = drawn
    try:
        msgspec.convert(value, KINDS[kind])
        right = True
    except msgspec.ValidationError:
        right = False
    found = list(check(value, KINDS[kind]))
    assert (not found) == right
    assert len(set(found)) == len(found)
    for where, message in found:
        assert message
        holder = value
        for step in where:
            holder = holder[step]  # the place is in the value


def test_check_finds_every_fault():
    """Oracle: five faults put in by hand, at five depths."""
    value = msgspec.json.decode(msgspec.json.encode(WHOLE["method"]))
    del value["summary"]
    value["tags"] = ["ok", "NOT", 3]
    value["facets"]["training"] = "some"
    value["claims"][0]["expect"]["within"] = -1
    assert {where for where, _ in check(value, MethodFile)} == {
        (),
        ("tags", 1),
        ("tags", 2),
        ("facets", "training"),
        ("claims", 0, "expect", "within"),
    }


# Ten thousand broken files

SHARDS, EACH = 10, 1000
SPECIAL = [":", ": ", "- ", "? ", "&a ", "*a", "!x ", "!!bool ", "!!int ", "|", ">", "'", '"', "{", "}", "[", "]", "#", " #", "%", "@", "`", "\t", "\n", "\r", "  ", "---\n", "...\n", "<<: ", "~", "=", ",", "\x00", "\x07", "\x85", "\u2028", "\ufeff", "é", "𝕏", "2022-10-31", "1e5", ".inf", "0x", "9" * 30, "%YAML 9.9\n", "\\x", "on", "null"]  # fmt: skip


def mutants(rng, count, originals):
    """Real files with one to six changes: bytes flipped, spans deleted, doubled, moved in from another file, signs put in, cut short."""
    names = sorted(originals)
    for _ in range(count):
        name = rng.choice(names)
        content = bytearray(originals[name])
        for _ in range(rng.randint(1, 6)):
            values = [m.end() for m in re.finditer(rb"^|: |- |[\[{,] ?", content, re.MULTILINE)]  # where one begins
            at = rng.choice(values) if rng.random() < 0.5 else rng.randrange(len(content) + 1)
            span = slice(at, at + rng.choice([1, 1, 2, 5, 20, 200]))
            match rng.randrange(9):
                case 0 if at < len(content):
                    content[at] ^= 1 << rng.randrange(8)
                case 1:
                    del content[span]
                case 2:
                    content[at:at] = content[span] * rng.choice([1, 1, 1, 9])
                case 3 | 4 | 5:
                    content[at:at] = rng.choice(SPECIAL).encode()
                case 6:
                    other = originals[rng.choice(names)]
                    start = rng.randrange(len(other))
                    content[at:at] = other[start : start + rng.choice([5, 50, 500])]
                case 7 if rng.random() < 0.3:
                    del content[at:]
                case 8:
                    lines = content.splitlines(keepends=True)
                    if lines:
                        lines.insert(
                            rng.randrange(len(lines)), b" " * rng.randrange(4) + lines.pop(rng.randrange(len(lines)))
                        )
                    content = bytearray(b"".join(lines))
        yield name, bytes(content)


def originals():
    """Every file of the real tree; the long ones of papers cut to their first entries, since all their entries are alike."""
    found = {}
    for path in files(REAL):
        content = path.read_bytes()
        found[path] = content if len(content) < 6000 else content[: content.index(b"\n", 4000) + 1]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_ten_thousand_broken_files(shard):
    """No exception, every problem at a place in its file; what is read in spite of it can be stored and is the same again."""
    broken = parsed = 0
    for path, content in mutants(random.Random(shard), EACH, originals()):
        reading = read(REAL, {path: content})
        document = reading.documents[str(path.relative_to(REAL))]
        text = content.decode("utf-8", "replace")
        for problem in document.problems:
            assert inside(problem, text), (problem, content)
            assert problem.message
            assert "\n" not in problem.message
        broken += bool(document.problems)
        parsed += document.value is not None
        stored = reading.compiled()
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(stored), type=type(stored)) == stored
    assert broken > EACH / 2  # else nothing was tried
    assert parsed > EACH / 5  # and not at the gate of YAML alone


@pytest.mark.slow
def test_trees_with_many_broken_files(small_tree):
    """Broken files beside each other, in a whole tree: what one lacks, another refers to."""
    whole = {path: path.read_bytes() for path in files(small_tree)}
    rng = random.Random(0)
    for _ in range(300):
        contents = dict(whole)
        contents.update(mutants(rng, rng.randint(1, len(whole)), whole))
        problems = read(small_tree, contents).problems()
        texts = {
            str(path.relative_to(small_tree)): content.decode("utf-8", "replace") for path, content in contents.items()
        }
        assert all(inside(p, texts[p.file]) for p in problems)


def test_the_real_tree_is_valid():
    assert [str(p) for p in taxonomy.validate()] == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1e-3", "'1e-3' is read as text; write 1.0e-3, or put it in quotes"),
        ("1:30", "'1:30' is read as a number to the base 60; put it in quotes"),
    ],
)
def test_numbers_that_yaml_reads_otherwise_are_refused(value, said):
    """Oracle: safe_load gives text for the one and 90 for the other; in quotes, both are what they look."""
    document = parse("x.yaml", f"arena: {{weights: {{rate: [{value}]}}}}".encode())
    assert [(p.line, p.column, p.message) for p in document.problems] == [(1, 26, said)]
    assert not parse("x.yaml", f"rate: '{value}'".encode()).problems
    assert parse("x.yaml", b"rate: [1.0e-3, 12]").value == {"rate": [0.001, 12]}
