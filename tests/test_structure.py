"""The rules of the tree, read from its files: who may import whom, what mirrors what, what must not occur. Oracle: `docs/design.md`."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import taxonomy
from taxonomy.reader import FRAMEWORKS, read

ROOT = Path(__file__).parents[1]
FAMILIES = ("architecture", "compression", "data", "finetuning", "inference", "pretraining", "systems")
READING = read(taxonomy.ROOT)  # also while a file has problems
LEAVES = {method.path: method for method in READING.methods.values()}

# All methods that the survey's tree must hold, by category.
METHODS = """
compression/quantization/weight_only: rtn mse-clip kl-clip gptq awq obq spqr owq quip omniquant hqq llm-int8
compression/quantization/weight_activation: smoothquant zeroquant outlier-suppression-plus rptq quarot
compression/quantization/qat: ste-qat lsq llm-qat bitnet-b158
compression/pruning/structured: llm-pruner slicegpt shortgpt sheared-llama
compression/pruning/unstructured: magnitude wanda sparsegpt n-m-sparsity
compression/low_rank: svd fwsvd asvd svd-llm losparse
compression/distillation/white_box: hinton-kd minillm gkd distillm tinybert-layerwise
compression/distillation/black_box: sequence-kd distilling-step-by-step lion-distill
pretraining/mixed_precision: amp-fp16 bf16-training fp8-training
pretraining/scaling: net2net bert2bert stacking ligo
pretraining/initialization: fixup skipinit mup rezero
pretraining/optimizers: adamw lion sophia adafactor galore muon shampoo
pretraining/system_level: zero tensor-parallel pipeline-parallel
finetuning/peft/lora: lora dora adalora vera
finetuning/peft/adapters: series-adapter parallel-adapter ia3
finetuning/peft/prefix: prefix-tuning
finetuning/peft/prompt: prompt-tuning p-tuning
finetuning/meft/quantized: qlora qa-lora loftq peqa
finetuning/meft/gradient: selective-finetuning lomo mezo lisa
inference/decoding/speculative: speculative-sampling prompt-lookup medusa eagle self-speculative
inference/decoding/parallel: lookahead
inference/kv_cache/quantized: flexgen-kv kivi kvquant gear
inference/kv_cache/dropped: h2o streaming-llm scissorhands snapkv pyramidkv tova fastgen
inference/kv_cache/retrieved: infllm quest
inference/system_level/design: paged-attention continuous-batching flexgen-offload
inference/system_level/optimization: prefix-caching
architecture/attention/sharing: mqa gqa mla
architecture/attention/kernel_low_rank: linear-attention performer linformer low-rank-transformer sumformer flurka nystromformer
architecture/attention/fixed_pattern: longformer big-bird sparse-transformer sliding-window
architecture/attention/learnable_pattern: reformer routing-transformer hyper-attention sinkhorn-attention
architecture/attention/hardware_assisted: flash-attention flash-decoding
architecture/moe/models: gshard switch mixtral
architecture/moe/algorithm: expert-choice base-layers stablemoe
architecture/moe/system_level: fastmoe fastermoe lina deepspeed-moe
architecture/long_context/positions: ape rpe rope alibi clex position-interpolation ntk-rope yarn fire pose
architecture/long_context/recurrent: transformer-xl memformer recurrent-memory-transformer retnet
architecture/long_context/sliding_window: mistral-swa lm-infinite self-extend memwalker raptor
architecture/long_context/memory_retrieval: memorizing-transformer longmem unlimiformer landmark-attention
architecture/alternatives/state_space: s4d mamba mamba2
architecture/alternatives/other: rwkv hyena griffin
data/selection/pretraining: dsir doremi
data/selection/finetuning: ifd less
data/prompting/few_shot/demonstration_selection: knn-demonstrations
data/prompting/few_shot/demonstration_ordering: entropy-ordering
data/prompting/compression: llmlingua llmlingua2 selective-context gist
"""
PLACES = {
    name: category
    for line in METHODS.split("\n")[1:-1]
    for category, _, names in [line.partition(": ")]
    for name in names.split()
}


def sources(*folders):
    """Python files below folders of the repository, as paths relative to it."""
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parsed(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def imports(file):
    """Dotted names of the modules that a file imports, anywhere in it; `from a import b` counts as `a.b` where that is a module."""
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if is_module(f"{node.module}.{alias.name}") else node.module
                for alias in node.names
            }
    return frozenset(found)


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def tops(file):
    return {name.partition(".")[0] for name in imports(file)}


def family_files():
    return [file for file in sources("refimpl") if file.split("/")[1] in FAMILIES]


# Layers


def test_imports_are_found_wherever_they_stand():
    """The finder itself, on files known by heart: at the top, inside a function, of a module and of a name."""
    assert "refimpl.results" in imports("refimpl/cli.py")
    assert "refimpl.bench.runner" in imports("refimpl/cli.py")
    assert "taxonomy.reader" in imports("taxonomy/__init__.py")
    assert "torch" in tops("refimpl/environment.py")


def test_taxonomy_knows_neither_code_nor_tools():
    for file in sources("taxonomy"):
        assert not tops(file) & {"torch", "numpy", "refimpl", "tools", "tests", "rich", "typer"}, file


def test_nothing_imports_an_arena_but_the_benchmark_and_nothing_the_benchmark_but_the_command_line():
    for file in sources("taxonomy", "refimpl"):
        if not file.startswith(("refimpl/arena/", "refimpl/bench/")):
            assert not [name for name in imports(file) if name.startswith("refimpl.arena")], file
            if file != "refimpl/cli.py":
                assert not [name for name in imports(file) if name.startswith("refimpl.bench")], file


def test_an_arena_knows_neither_the_benchmark_nor_another_arena():
    for file in sources("refimpl/arena"):
        assert "refimpl.bench" not in {name[:13] for name in imports(file)}, file
        known = {name for name in imports(file) if name.startswith("refimpl.arena")}
        assert known <= {"refimpl.arena", "refimpl.arena.protocol"}, file


def test_the_benchmark_knows_arenas_by_their_protocol_only():
    for file in sources("refimpl/bench"):
        known = {name for name in imports(file) if name.startswith("refimpl.arena")}
        assert known <= {"refimpl.arena", "refimpl.arena.protocol"}, file
        assert not {name.replace(".", "/").removeprefix("refimpl/") for name in imports(file)} & set(LEAVES), file


def test_only_the_command_line_knows_the_tools():
    """For `effllm new`, which works in a checkout; the wheel has no tools."""
    users = [file for file in sources("taxonomy", "refimpl") if "tools" in tops(file)]
    assert users == ["refimpl/cli.py"]
    assert [name for name in imports("refimpl/cli.py") if name.startswith("tools")] == ["tools.new"]


def test_nothing_imports_the_tests():
    assert [file for file in sources("taxonomy", "refimpl", "tools") if "tests" in tops(file)] == []


def related(one, other):
    """Whether a relation joins two methods, either way."""
    return any(target == other.id for _, target in one.relations.items()) or any(
        target == one.id for _, target in other.relations.items()
    )


@pytest.mark.parametrize("file", family_files())
def test_what_a_family_may_import(file):
    """The substrate; what is shared in the folders above; another method only where a relation says so."""
    me = LEAVES.get(file.removeprefix("refimpl/").removesuffix(".py"))
    folder = file.rpartition("/")[0]
    assert not tops(file) & {"taxonomy", "tools", "typer", "rich"}
    for name in imports(file):
        if name.partition(".")[0] != "refimpl" or name.startswith("refimpl.model"):
            continue
        path = name.replace(".", "/")
        other = LEAVES.get(path.removeprefix("refimpl/"))
        if other:
            assert me, f"{file} is shared, and imports the method {other.id}"
            assert related(me, other), f"{me.id} imports {other.id}: state the relation in one's YAML file"
        else:
            assert folder.startswith(path.rpartition("/")[0]), f"{file} imports {name}, which no folder above it holds"


@pytest.mark.parametrize("file", sources("refimpl/model", "refimpl/testbed", "refimpl/long_context", "refimpl/arena"))
def test_substrate_and_arenas_know_no_method(file):
    """They meet methods through protocols: one that joins changes no line of them."""
    for name in imports(file):
        if name.startswith("refimpl."):
            assert name.removeprefix("refimpl.").replace(".", "/") not in LEAVES, f"{file} imports {name}"


# Mirrors


def its_test(path):
    folder, _, name = path.rpartition("/")
    return ROOT / "tests" / folder / f"test_{name}.py"


@pytest.mark.parametrize("path", sorted(path for path, method in LEAVES.items() if method.impl))
def test_a_method_that_runs_has_module_and_test(path):
    assert (ROOT / "refimpl" / f"{path}.py").is_file()
    assert its_test(path).is_file()
    assert LEAVES[path].impl in its_test(path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(path for path, method in LEAVES.items() if method.impl and method.claims))
def test_a_method_measures_its_claims_in_its_own_test(path):
    """`effllm claims --measure` runs that file alone."""
    said = its_test(path).read_text(encoding="utf-8")
    assert f'claim("{LEAVES[path].id}", ' in said or f'"{LEAVES[path].id}"' in said


@pytest.mark.parametrize("file", family_files())
def test_a_module_of_a_family_is_a_method_or_is_tested_for_itself(file):
    path = file.removeprefix("refimpl/").removesuffix(".py")
    if path in LEAVES:
        assert LEAVES[path].impl, f"taxonomy/{path}.yaml does not name it: `impl:`"
    assert its_test(path).is_file()
    assert path.rpartition("/")[0] in READING.named["categories"]


@pytest.mark.parametrize("file", [f for f in sources("tests") if f.split("/")[1] in FAMILIES and "/test_" in f])
def test_a_test_of_a_family_mirrors_a_module(file):
    assert (ROOT / file.replace("tests/", "refimpl/").replace("/test_", "/")).is_file()


def test_families_are_the_folders_of_the_taxonomy():
    """Oracle: the folders; none of a name that only one of the trees knows."""
    families = {path.name for path in taxonomy.ROOT.iterdir() if (path / "_category.yaml").is_file()}
    assert families == set(FAMILIES)
    others = {"arena", "bench", "long_context", "model", "testbed"}
    for top in ("refimpl", "tests"):
        folders = {path.name for path in (ROOT / top).iterdir() if path.is_dir() and any(path.rglob("*.py"))}
        assert folders - others - {"taxonomy", "tools"} <= families


# A module whose tests stand under another name, and why.
ELSEWHERE = {
    "taxonomy/__init__.py": "tests/taxonomy/test_load.py",  # `load` is what it does
    "taxonomy/graph/__init__.py": "tests/taxonomy/graph/test_graph.py",  # a package's own name
    "taxonomy/graph/drawing.py": "tests/taxonomy/graph/test_graph.py",  # writers, tested on what they write
    "taxonomy/graph/exports.py": "tests/taxonomy/graph/test_graph.py",
    "taxonomy/graph/layered.py": "tests/taxonomy/graph/test_layout.py",  # both layouts meet the same tests
    "taxonomy/graph/radial.py": "tests/taxonomy/graph/test_layout.py",
    "taxonomy/graph/ordering.py": "tests/taxonomy/graph/test_layout.py",  # steps of a layout
    "taxonomy/graph/sectors.py": "tests/taxonomy/graph/test_layout.py",
    "refimpl/arena/protocol.py": "tests/bench/test_cells.py",  # declarations, to which every arena is held there
    "refimpl/testbed/__init__.py": "tests/testbed/test_testbed.py",  # packages' own names
    "refimpl/testbed/tasks/__init__.py": "tests/testbed/tasks/test_tasks.py",
}


@pytest.mark.parametrize(
    "file",
    [f for f in sources("taxonomy", "refimpl", "tools") if f not in family_files() and (ROOT / f).read_text().strip()],
)
def test_every_other_module_has_its_test(file):
    parts = file.removesuffix(".py").split("/")
    mirror = (
        ROOT / "tests" / "/".join([*(parts[:-1] if parts[0] != "refimpl" else parts[1:-1]), f"test_{parts[-1]}.py"])
    )
    if ast.get_docstring(parsed(file)) and len(parsed(file).body) == 1:
        assert file.endswith("__init__.py")  # a docstring alone
    elif file in ELSEWHERE:
        assert not mirror.exists(), f"{mirror} exists: take {file} out of the list"
        assert (ROOT / ELSEWHERE[file]).is_file()
    else:
        assert mirror.is_file()


def test_the_list_of_exceptions_is_not_longer_than_it_must_be():
    assert [file for file in ELSEWHERE if not (ROOT / file).is_file()] == []


# The survey


def test_the_list_of_methods_is_whole():
    assert len(PLACES) == 173
    assert len({*PLACES}) == sum(len(line.partition(": ")[2].split()) for line in METHODS.strip().split("\n"))


def test_every_method_of_the_survey_stands_in_its_category():
    """Oracle: the list of methods that this survey promises. There may be more; none may be missing or elsewhere."""
    stands = {name: method.category for name, method in READING.methods.items()}
    assert {name: (place, stands.get(name)) for name, place in PLACES.items() if stands.get(name) != place} == {}


def test_frameworks_are_read_from_their_folder():
    assert (taxonomy.ROOT / FRAMEWORKS / "_category.yaml").is_file()
    assert len(READING.frameworks) > 10


# What must not occur

FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "imp"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
    "numpy.load", "np.load", "joblib.load",
}  # fmt: skip


def dotted(node):
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def forbidden(tree):
    """Lines that would run what is in a file that was meant to be data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS:
                yield node.lineno, dotted(node.func)
            if any(
                k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                for k in node.keywords
            ):
                yield node.lineno, "shell"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if names & FORBIDDEN_MODULES:
                yield node.lineno, "import"


@pytest.mark.parametrize("file", sources("taxonomy", "refimpl", "tools"))
def test_data_is_never_run(file):
    assert list(forbidden(parsed(file))) == []


def test_what_is_forbidden_would_be_found():
    code = "import pickle\nfrom marshal import x\ntorch.load(f)\nyaml.load(f, L)\nmodel.eval()\neval('1')\nre.compile(x)\nrun(c, shell=True)"
    assert list(forbidden(ast.parse(code))) == [
        (1, "import"), (2, "import"), (3, "torch.load"), (4, "yaml.load"), (6, "eval"), (8, "shell"),
    ]  # fmt: skip


@pytest.mark.parametrize("file", family_files())
def test_methods_do_not_listen_to_the_environment(file):
    """Same input, same result: no variables of the environment, no random numbers but from a generator that is passed."""
    used = {dotted(node) for node in ast.walk(parsed(file)) if isinstance(node, ast.Attribute)}
    assert not used & {
        "os.environ",
        "os.getenv",
        "torch.manual_seed",
        "random.random",
        "random.seed",
        "np.random",
        "numpy.random",
    }


# Tests that test

ASSERTING = {"raises", "warns", "fail", "claim", "expect"}


def asserts(function, helpers):
    """Whether a function can fail: it asserts, or calls what does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = dotted(node.func).rpartition(".")[2]
            if name in ASSERTING | helpers or name.startswith("assert_"):
                return True
    return False


def asserting_helpers(trees):
    """Names of functions that assert, or call one that does, and so on."""
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers = set()
    while more := {f.name for f in functions if f.name not in helpers and asserts(f, helpers)}:
        helpers |= more
    return helpers


SHARED = [parsed(file) for file in sources("tests") if "/test_" not in file]


@pytest.mark.parametrize("file", [file for file in sources("tests") if "/test_" in file])
def test_every_test_can_fail(file):
    functions = [n for n in ast.walk(parsed(file)) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    helpers = asserting_helpers([parsed(file), *SHARED]) - {f.name for f in functions}
    assert functions
    assert [f.name for f in functions if not asserts(f, helpers)] == []


def test_a_test_without_assertion_would_be_found():
    code = (
        "def check(x):\n  assert x\ndef twice(x):\n  check(x)\ndef test_a():\n  twice(1)\ndef test_b():\n  print(1)\n"
    )
    tree = ast.parse(code)
    helpers = asserting_helpers([tree])
    assert [f.name for f in tree.body if not asserts(f, helpers)] == ["test_b"]


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs" / "guide").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.stem
)
def test_what_the_guide_imports_is_there(page):
    """Oracle: Python's own parser and import, on each block of code of the page."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    imports = [
        ast.unparse(node) for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)
    ]
    assert len(imports) == len(re.findall(r"^from \S+ import ", text, re.MULTILINE))  # none stands outside of a block
    exec("\n".join(imports), {})  # the page is ours
