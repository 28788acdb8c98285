"""Oracles: expectations by hand; `jsonschema`, an implementation of JSON Schema that is not ours, beside msgspec."""

import json
import math

import jsonschema
import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import taxonomy
from taxonomy.reader import check, files
from taxonomy.schema import (
    RELATIONS,
    Category,
    CategoryFile,
    Expect,
    Facets,
    FrameworkFile,
    Id,
    Method,
    MethodFile,
    Paper,
    PaperEntry,
    Relations,
    json_schemas,
    near,
)
from tests import small_tree
from tests.small_tree import FILES, GPTQ, PROSE

SCHEMAS = json_schemas()
KINDS = {"method": MethodFile, "category": CategoryFile, "framework": FrameworkFile, "papers": dict[Id, PaperEntry]}
EXAMPLES = {
    "method": yaml.safe_load(FILES[small_tree.RTN]),
    "category": yaml.safe_load(FILES["compression/_category.yaml"]),
    "framework": yaml.safe_load(FILES["systems/frameworks/peft.yaml"]),
    "papers": yaml.safe_load(FILES["papers/2023.yaml"]),
}


def kind_of(path):
    """Which schema a file of a tree falls under; None for the survey's headings."""
    if path.parent.name == "papers":
        return "papers"
    if path.name == "_category.yaml":
        return "category"
    if path.parent.name == "frameworks":
        return "framework"
    return None if path.name == "survey.yaml" else "method"


def a_method(**more):
    facets = Facets(
        stage=["decode"], training="none", calibration=True, exact=True, frees_memory=True, changes_architecture=False
    )
    whole = {"id": "mse-clip", "category": "a/b_c", "year": 2018, "name": "M", "summary": "S.", "papers": ["p"]}
    return Method(**{**whole, "idea": PROSE, "when": PROSE, "facets": facets, **more})


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("gtpq", ["gptq", "awq"], "; did you mean 'gptq'?"),
        ("GPTQ", ["gptq", "awq"], "; did you mean 'gptq'?"),
        ("rtn", ["RTN"], "; did you mean 'RTN'?"),
        ("zzz", ["gptq", "awq"], ""),
        ("gptq", [], ""),
        (7, ["77"], "; did you mean '77'?"),
        ("low-rank", {"low_rank": 1}, "; did you mean 'low_rank'?"),
    ],
)
def test_near(name, known, said):
    assert near(name, known) == said


def test_nothing_that_was_measured_is_no_number():
    """Also where no bound is given, which the reader refuses."""
    assert Expect(unit="x").met_by(0.0)
    assert not Expect(unit="x").met_by(math.nan)


@pytest.mark.parametrize(
    ("bounds", "met", "missed", "text"),
    [
        ({"above": 1.0}, [1.001, math.inf], [1.0, 0.0, -math.inf], "> 1 x"),
        ({"below": 0.5}, [0.499, -7], [0.5, 2], "< 0.5 x"),
        ({"above": 0, "below": 1}, [0.5], [0, 1, -1, 2], "> 0 and < 1 x"),
        ({"equals": 10000, "within": 1000}, [9000, 10000, 11000], [8999, 11001], "= 10000 ± 1000 x"),
        ({"equals": 3}, [3.0], [3.0000001], "= 3 x"),
        ({"above": 2, "equals": 3, "within": 2}, [3, 5], [2, 1.5, 6], "> 2 and = 3 ± 2 x"),
    ],
)
def test_expectation(bounds, met, missed, text):
    """Oracle: by hand, at and beside every bound."""
    expect = Expect(unit="x", **bounds)
    assert all(expect.met_by(value) for value in met)
    assert not any(expect.met_by(value) for value in missed)
    assert not expect.met_by(math.nan)
    assert str(expect) == text


def test_method_names_its_places():
    method = a_method()
    assert (method.path, method.module) == ("a/b_c/mse_clip", "refimpl.a.b_c.mse_clip")
    assert not method.implemented
    assert a_method(impl="MSEClip").implemented


def test_method_without_code_says_where_those_with_code_are():
    with pytest.raises(NotImplementedError, match=r"'mse-clip' has no implementation yet; `effllm tree --implemented`"):
        a_method().load()


def test_method_loads_the_object_of_its_module():
    """Oracle: the class, imported as anybody would."""
    from refimpl.compression.quantization.weight_only.rtn import RTN

    place = {"id": "rtn", "category": "compression/quantization/weight_only"}
    assert a_method(**place, impl="RTN").load() is RTN
    with pytest.raises(AttributeError):
        a_method(**place, impl="Nothing").load()


@pytest.mark.parametrize(("id", "parent", "depth"), [("a", None, 0), ("a/b", "a", 1), ("a/b/c_d", "a/b", 2)])
def test_category_knows_its_place(id, parent, depth):
    category = Category(id=id, name="N", summary="S", text="T" * 300, order=1)
    assert (category.parent, category.depth) == (parent, depth)


@pytest.mark.parametrize(
    ("arxiv", "year", "posted"), [("2210.17323", 2023, 2022), ("2401.00001", 2023, 2023), (None, 2023, 2023)]
)
def test_year_of_first_appearance(arxiv, year, posted):
    paper = Paper(key="k", title="T", venue="V", url="https://x.org", categories=["a"], arxiv=arxiv, year=year)
    assert paper.posted == posted


def test_relations_are_listed_in_one_order():
    relations = Relations(composes_with=["e"], builds_on=["b", "a"], combines=["c"])
    assert relations.items() == [("builds_on", "b"), ("builds_on", "a"), ("combines", "c"), ("composes_with", "e")]
    assert Relations().items() == []
    assert tuple(Relations.__struct_fields__) == RELATIONS


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_schema_is_valid(name):
    """Oracle: the meta-schema of the draft that it names."""
    schema = SCHEMAS[name]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema


def validator(name):
    return jsonschema.Draft202012Validator(SCHEMAS[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_json_schema_accepts_the_example_and_refuses_an_unknown_key(name):
    example = EXAMPLES[name]
    assert list(validator(name).iter_errors(example)) == []
    inside = {key: {**value, "zzz": 1} for key, value in example.items()} if name == "papers" else {**example, "zzz": 1}
    assert any("'zzz'" in error.message for error in validator(name).iter_errors(inside))
    required = SCHEMAS[name].get("$ref", "").rpartition("/")[2]
    for key in SCHEMAS[name]["$defs"].get(required, {}).get("required", []):
        assert not validator(name).is_valid({k: v for k, v in example.items() if k != key}), f"{key} is required"


@pytest.mark.parametrize("name", EXAMPLES)
def test_json_schema_accepts_every_real_file(name):
    """Also each file with a key too many: refused."""
    paths = [path for path in files(taxonomy.ROOT) if kind_of(path) == name]
    assert len(paths) > 10
    for path in paths:
        value = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        assert [error.message for error in validator(name).iter_errors(value)] == [], path
        entries = list(value.values())[:1] if name == "papers" else [value]
        for entry in entries:
            entry["summarry"] = "x"
        assert not validator(name).is_valid(value), path


junk = st.sampled_from(
    [
        *[
            None,
            True,
            0,
            3,
            -1,
            0.5,
            "",
            "x",
            "X Y",
            "two\nlines",
            "end\n",
            "none",
            "a-b",
            "2101.00001",
            "https://x.org",
        ],
        *["y" * 50, "y" * 400, [], ["a"], ["decode"], [["a"]], {}, {"a": 1}, {"a": {"b": [1]}}],
    ]
)


@st.composite
def changed(draw):
    """A kind of file, and its example with a few fields replaced or removed, one level down or two."""
    name = draw(st.sampled_from(sorted(EXAMPLES)))
    value = msgspec.json.decode(msgspec.json.encode(EXAMPLES[name]))
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        key = draw(st.sampled_from(sorted(holder))) if holder else None
        if key and isinstance(holder[key], dict) and holder[key] and draw(st.booleans()):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder)))
        if key and draw(st.booleans()):
            del holder[key]
        elif key:
            holder[key] = draw(junk)
    return name, value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(changed())
def test_an_editor_and_the_reader_agree(drawn):
    """Oracle: `jsonschema` on the published schema says right or wrong where `check` does."""
    name, value = drawn
    assert validator(name).is_valid(value) == (not list(check(value, KINDS[name])))


def test_a_method_that_is_read_is_frozen():
    method = a_method()
    with pytest.raises(AttributeError):
        method.year = 2000
    with pytest.raises(AttributeError):
        method.facets.exact = False
    assert method.year == 2018


def test_the_example_is_what_the_schema_makes_of_it():
    """Oracle: the file, by hand."""
    method = msgspec.convert(yaml.safe_load(FILES[GPTQ]), MethodFile)
    assert method.relations == Relations(builds_on=["rtn"], composes_with=["lora"])
    assert method.facets.calibration
    assert method.facets.stage == ["post-training", "prefill"]
    assert method.impl is None
    assert method.facets.gqa is None
