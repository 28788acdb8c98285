"""What `effllm new` writes: three files that fail until they are filled, and pass then. Oracles: the reader, pytest, the interpreter."""

import importlib.util
import subprocess
import sys

import pytest

import taxonomy
from tests.small_tree import FILLED, GPTQ, LAYERS
from tools.new import scaffold


@pytest.fixture
def checkout(small_tree):
    return small_tree.parent


def snapshot(checkout):
    return {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}


def load_module(path):
    spec = importlib.util.spec_from_file_location("scaffolded", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaffolded"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["half-quadratic", "half_quadratic"])
def test_three_files_in_the_three_trees(checkout, name):
    before = snapshot(checkout)
    written = scaffold(f"{LAYERS}/{name}", checkout)
    assert written == [
        checkout / "taxonomy" / LAYERS / "half_quadratic.yaml",
        checkout / "refimpl" / LAYERS / "half_quadratic.py",
        checkout / "tests" / LAYERS / "test_half_quadratic.py",
    ]
    after = snapshot(checkout)
    assert set(after) - set(before) == set(written)
    assert all(after[path] == content for path, content in before.items())


def test_validation_names_what_is_missing_each_with_its_place(checkout):
    """Oracle: the lines of the file that are still empty, and no other file."""
    path = scaffold(f"{LAYERS}/hqq", checkout)[0]
    problems = taxonomy.validate(checkout / "taxonomy")
    assert {p.file for p in problems} == {f"{LAYERS}/hqq.yaml"}
    lines = path.read_text(encoding="utf-8").splitlines()
    named = {lines[p.line - 1].strip(" -").partition(":")[0] for p in problems}
    assert named >= {"summary", "papers", "idea", "when", "facets", "says", "source"}
    with pytest.raises(taxonomy.InvalidTaxonomy):
        taxonomy.load(checkout / "taxonomy")


def test_each_place_filled_is_a_problem_less(checkout):
    """From top to bottom, as the file says; the last one leaves none, and the method is there."""
    path = scaffold(f"{LAYERS}/half-quadratic", checkout)[0]
    count = len(taxonomy.validate(checkout / "taxonomy"))
    for empty, filled in FILLED.items():
        text = path.read_text(encoding="utf-8")
        assert text.count(empty) == 1, empty
        path.write_text(text.replace(empty, filled), encoding="utf-8")
        left = len(taxonomy.validate(checkout / "taxonomy"))
        assert left < count or empty == "{unit: ratio}"  # what it expects is looked at last, when all else is right
        count = left
    assert taxonomy.validate(checkout / "taxonomy") == []
    method = taxonomy.load(checkout / "taxonomy").methods["half-quadratic"]
    assert (method.category, method.impl, method.implemented) == (LAYERS, "HalfQuadratic", True)
    assert method.module == f"refimpl.{LAYERS.replace('/', '.')}.half_quadratic"
    assert [c.id for c in method.claims] == ["first-claim"]


def test_the_implementation_raises_and_says_what_belongs_there(checkout):
    module = load_module(scaffold(f"{LAYERS}/hqq", checkout)[1])
    with pytest.raises(NotImplementedError, match="Hqq is a scaffold: write the paper's algorithm here"):
        module.Hqq()
    assert "Source:" in module.__doc__
    assert "Differs from the paper:" in module.__doc__
    assert "Not here:" in module.__doc__


@pytest.mark.slow
def test_the_test_fails(checkout):
    """Oracle: pytest, in a process of its own; it finds the module by its mirrored name, and nothing passes."""
    path = scaffold(f"{LAYERS}/zz-scaffolded", checkout)[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(path)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZzScaffolded is a scaffold: write the paper's algorithm here" in done.stdout
    assert "passed" not in done.stdout
    assert "1 failed, 1 error" in done.stdout  # the fixture `claim` belongs to the real checkout


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("compresion/x", r"no category 'compresion'; did you mean 'compression'\?; give CATEGORY/ID"),
        ("compression/quantisation/x", r"did you mean 'compression/quantization'"),
        ("x", "'x' is no category and id; give CATEGORY/ID, as compression/low_rank/svd"),
        ("", "'' is no category and id"),
        ("/", "'/' is no category and id"),
        (f"{LAYERS}/", f"'{LAYERS}/' is a category; give CATEGORY/ID, as {LAYERS}/my-method"),
        (LAYERS.replace("_", "-"), f"is a category; give CATEGORY/ID, as {LAYERS}/my-method"),
        ("papers/x", "no category 'papers'"),
        ("../taxonomy/compression/x", "no category '../taxonomy/compression'"),
        ("compression/../finetuning/x", "no category 'compression/../finetuning'"),
        ("systems/frameworks/x", "systems/frameworks holds frameworks, which have no code here; copy one of its files"),
        (f"{LAYERS}/rtn", f"id 'rtn' is taken by taxonomy/{LAYERS}/rtn.yaml"),
        ("finetuning/gptq", f"id 'gptq' is taken by taxonomy/{GPTQ}"),
        ("finetuning/Dora", "id 'Dora' must be lower-case letters, digits and single hyphens, and start with a letter"),
        ("finetuning/a b", "id 'a b' must be"),
        ("finetuning/a--b", "id 'a--b' must be"),
        ("finetuning/-a", "id '-a' must be"),
        ("finetuning/a.b", "id 'a.b' must be"),
        ("finetuning/3d", "id '3d' must be .* start with a letter"),
        ("finetuning/é", "id 'é' must be"),
        ("finetuning/a\n", "id 'a\\\\n' must be"),
        ("finetuning/_category", "id '-category' must be"),
        ("finetuning/lambda", "id 'lambda' names a module, and is a word of Python; choose another"),
        ("finetuning/none", "id 'none' names a module, and is a word of Python"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(checkout, place, said):
    before = snapshot(checkout)
    with pytest.raises(ValueError, match=said):
        scaffold(place, checkout)
    assert snapshot(checkout) == before


@pytest.mark.parametrize("stands", [f"refimpl/{LAYERS}/hqq.py", f"tests/{LAYERS}/test_hqq.py"])
def test_a_file_that_stands_already_is_left_alone(checkout, stands):
    path = checkout / stands
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = snapshot(checkout)
    with pytest.raises(FileExistsError, match=r"hqq\.py stands already; nothing was written"):
        scaffold(f"{LAYERS}/hqq", checkout)
    assert snapshot(checkout) == before


def test_a_method_that_is_described_gets_its_code(checkout):
    """Oracle: the file before. What stands in it stays; what is added names the places that are still empty."""
    knowledge = checkout / "taxonomy" / GPTQ
    before = knowledge.read_text(encoding="utf-8")
    written = scaffold(f"{LAYERS}/gptq", checkout)
    assert written[0] == knowledge
    assert knowledge.read_text(encoding="utf-8").startswith(before.rstrip() + "\nimpl: Gptq\nclaims:\n")
    assert all(path.is_file() for path in written)
    problems = taxonomy.validate(checkout / "taxonomy")
    assert {p.file for p in problems} == {GPTQ}
    assert all(p.line > before.count("\n") for p in problems)


def test_twice_is_refused(checkout):
    scaffold(f"{LAYERS}/hqq", checkout)
    with pytest.raises(ValueError, match="id 'hqq' is taken"):
        scaffold(f"{LAYERS}/hqq", checkout)
    assert (checkout / "tests" / LAYERS / "test_hqq.py").is_file()
