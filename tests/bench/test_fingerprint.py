"""What a cell's key depends on, and what not. Oracle: each determinant is changed by itself."""

import os

import msgspec
import pytest
import torch

from refimpl.bench import fingerprint
from refimpl.bench.cells import Cell, open_arena
from refimpl.bench.fingerprint import code_digest, content_digest, determinants, key, look, model_digest, sources
from tests.bench.conftest import toy


def key_of(cell):
    return key(determinants([cell], content_digest)[0])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))  # however coarse the clock of the file system


def test_cells_looked_at_together_have_the_keys_that_each_has_alone(toys, tmp_path):
    """Code and files are looked at once for all cells that share them, and for those alone."""
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    cells = [
        toy(),
        toy("Bad"),
        msgspec.structs.replace(toy(), implementation="refimpl.bench.cells:Cell"),
        toy(model=str(tmp_path / "model")),
        toy(model=str(tmp_path / "other")),
        msgspec.structs.replace(toy(), texts=str(tmp_path / "model")),
        msgspec.structs.replace(toy(), texts=str(tmp_path / "other")),
    ]
    together = [key(each) for each in determinants(cells, content_digest)]
    assert together == [key_of(cell) for cell in cells]
    assert len(set(together)) == len(cells)


def test_a_file_is_read_once_for_all_cells(toys, tmp_path):
    (tmp_path / "config.json").write_text("one")
    read = []
    determinants(
        [toy(gain=float(gain), model=str(tmp_path)) for gain in range(3)], lambda path: read.append(path) or "digest"
    )
    assert read == [tmp_path / "config.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"arena": "another"},
        {"implementation": "refimpl.toys.methods:Bad"},
        {"settings": {"gain": 2.0}},
        {"settings": {"gain": 1.0, "marks": None}},
        {"axes": {"task": "sum", "length": 2}},
        {"seed": 1},
        {"quick": True},
        {"device": "cuda"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_that_matters_is_in_the_key(toys, change):
    (toys / "refimpl/arena/another.py").write_text((toys / "refimpl/arena/toy.py").read_text())
    cell = toy(gain=1.0)
    assert key_of(msgspec.structs.replace(cell, **change)) != key_of(cell)


@pytest.mark.parametrize("change", [{"method": "another name"}, {"simulated": True}], ids=["method", "simulated"])
def test_what_does_not_change_figures_is_not_in_the_key(toys, change):
    cell = toy(gain=1.0)
    assert key_of(msgspec.structs.replace(cell, **change)) == key_of(cell)


def test_the_order_of_settings_and_the_number_of_the_device_do_not_matter(toys):
    a, b = (msgspec.structs.replace(toy(), settings=s) for s in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert key_of(a) == key_of(b)
    assert key_of(toy(device="cuda")) == key_of(toy(device="cuda:1"))


def test_the_baseline_has_a_key_of_its_own(toys):
    assert key_of(toy(None)) != key_of(toy())


def test_versions_of_arena_torch_and_runner_are_in_the_key(toys, monkeypatch):
    keys = [key_of(toy())]
    monkeypatch.setattr(open_arena("toy"), "VERSION", 2)
    keys.append(key_of(toy()))
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    keys.append(key_of(toy()))
    monkeypatch.setattr(fingerprint, "FORM", 0)
    keys.append(key_of(toy()))
    assert len({*keys}) == 4


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("arena/toy", "AXES =", "MORE = 1\nAXES ="),
        ("toys/methods", "self.gain = gain", "self.gain = 2 * gain"),
        ("toys/rules", "10 * length", "11 * length"),
        ("toys/rules", '{"score"', '{ "score"'),
        ("toys/rules", "import torch", "import torch  # said anew"),
        ("toys/rules", "How a toy", "How some toy"),
        ("toys/methods", "Ends its process.", "Ends all."),
    ],
)
def test_code_counts_by_what_it_does_however_deep_it_is_imported(toys, name, old, new):
    """Oracle: by hand. Of these edits the first three change what is computed, the others layout, comment and docstrings."""
    if name == "toys/methods" and old.startswith("self"):
        old, new = "self.gain, self.marks = gain", "self.gain, self.marks = 2 * gain"
    before = key_of(toy())
    edit(toys / f"refimpl/{name}.py", old, new)
    changes = old in ("AXES =", "self.gain, self.marks = gain", "10 * length")
    assert (key_of(toy()) != before) == changes


def test_a_module_that_is_not_imported_does_not_matter(toys):
    before = key_of(toy())
    (toys / "refimpl/toys/other.py").write_text("x = 1\n")
    assert key_of(toy()) == before
    edit(toys / "refimpl/toys/rules.py", "import torch", "import torch\nimport refimpl.toys.other")
    with_it = key_of(toy())
    edit(toys / "refimpl/toys/other.py", "x = 1", "x = 2")
    assert len({before, with_it, key_of(toy())}) == 3


def test_imports_are_followed_in_every_form(toys):
    """Oracle: by hand. Absolute, of a name, relative, inside a function, and the packages above."""
    package = toys / "refimpl/toys/deep"
    (package / "inner").mkdir(parents=True)
    for name in ("a", "b", "c", "d", "inner/__init__", "inner/e", "__init__"):
        (package / f"{name}.py").write_text("y = 1\n")
    (package / "start.py").write_text(
        "import refimpl.toys.deep.a\nfrom refimpl.toys.deep import b\nfrom . import c\nfrom .d import y\n"
        "import os, not_installed_toy\n\ndef f():\n    from refimpl.toys.deep.inner.e import y\n"
    )
    found = sources(["refimpl.toys.deep.start"])
    names = {name.removeprefix("refimpl.toys.deep").lstrip(".") for name in found}
    assert names == {"start", "a", "b", "c", "d", "inner", "inner.e", ""}


def test_a_plugin_is_its_file_and_its_package(toys):
    (toys / "mine").mkdir()
    (toys / "mine/__init__.py").touch()
    (toys / "mine/helper.py").write_text("x = 1\n")
    (toys / "mine/method.py").write_text("from mine.helper import x\nfrom refimpl.toys.rules import figures\n")
    (toys / "alone_toy.py").write_text("z = 1\n")
    assert set(sources(["mine.method"])) == {"mine", "mine.method", "mine.helper", "refimpl.toys.rules"}
    assert sources(["alone_toy"]) == {"alone_toy": toys / "alone_toy.py"}
    with pytest.raises(ValueError, match="has no source file"):
        sources(["itertools"])


def test_real_methods_have_their_familys_protocol_in_their_key():
    found = sources(["refimpl.arena.finetuning", "refimpl.finetuning.peft.lora.lora"])
    assert {"refimpl.finetuning.protocol", "refimpl.arena.protocol"} <= set(found)
    assert len(code_digest(found)) == 64


def test_the_testbed_counts_as_a_whole_once_it_is_imported(toys, monkeypatch):
    """Oracle: files of a made-up testbed, changed one by one: code that is found at run time, and the checkpoint."""
    folder = toys / "refimpl/toys/bed"
    (folder / "tasks").mkdir(parents=True)
    for name in ("corpus.py", "tasks/__init__.py", "tasks/needle.py", "weights.safetensors", "data.json"):
        (folder / name).write_text("1\n")
    monkeypatch.setattr(fingerprint, "TESTBED", "refimpl.toys.bed")
    before = key_of(toy())
    edit(folder / "weights.safetensors", "1", "2")
    assert key_of(toy()) == before  # nothing of it is imported yet
    edit(toys / "refimpl/toys/rules.py", "import torch", "import torch\nfrom refimpl.toys.bed import corpus")
    keys = [before, key_of(toy())]
    for name in ("tasks/needle.py", "weights.safetensors", "data.json", "corpus.py"):
        edit(folder / name, next(c for c in "12" if c in (folder / name).read_text()), "7")
        keys.append(key_of(toy()))
    assert len({*keys}) == 6


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json"):
        (folder / name).write_text(f"{name} has this content")
    (folder / "README.md").write_text("Read me.")
    return folder


def test_a_model_is_known_by_what_is_in_its_files(toys, checkpoint, tmp_path):
    """Oracle: a copy elsewhere is the same model; one byte of one file makes it another, at the same size and time."""
    cell = toy(model=str(checkpoint))
    before = key_of(cell)
    assert before != key_of(toy())
    (tmp_path / "copy").mkdir()
    for path in checkpoint.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    assert key_of(toy(model=str(tmp_path / "copy"))) == before
    (checkpoint / "README.md").write_text("Read me twice.")
    assert key_of(cell) == before
    for name in ("config.json", "model-2.safetensors", "tokenizer.json"):
        text = (checkpoint / name).read_text()
        (checkpoint / name).write_text(text.replace("has", "haz"))
        assert key_of(cell) != before
        (checkpoint / name).write_text(text)
    (checkpoint / "model-2.safetensors").rename(checkpoint / "model-3.safetensors")
    assert key_of(cell) != before


def test_texts_are_known_by_what_is_in_their_files(toys, tmp_path):
    """Oracle: a copy elsewhere is the same folder; a byte of a text makes it another one, a file of another kind does not."""
    plain = key_of(toy())
    keys = []
    for name, text in (("a", "long"), ("b", "long"), ("c", "lone")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "essay.txt").write_text(text)
        keys.append(key_of(msgspec.structs.replace(toy(), texts=str(tmp_path / name))))
    (tmp_path / "b" / "README.md").write_text("Read me.")
    assert keys[0] == keys[1] == key_of(msgspec.structs.replace(toy(), texts=str(tmp_path / "b")))
    assert len({plain, keys[0], keys[2]}) == 3


def test_weights_beside_a_module_count(toys):
    """Oracle: each byte of them; a file of another name does not."""
    cell, keys = toy(), [key_of(toy())]
    for name, text in (("methods", "1"), ("methods", "2"), ("other", "3")):
        (toys / f"refimpl/toys/{name}.safetensors").write_text(text)
        keys.append(key_of(cell))
    assert len({*keys[:3]}) == 3 and keys[3] == keys[2]


def test_a_large_file_is_read_once_as_long_as_it_looks_the_same(checkpoint, store, monkeypatch):
    """Oracle: how often it is read: once, also by the next run; again when it was written anew."""
    from refimpl.bench import store as module

    read = []
    monkeypatch.setattr(module, "content_digest", lambda path: read.append(path.name) or content_digest(path))
    first = model_digest(checkpoint, store.digest)
    assert sorted(read) == ["config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json"]
    with module.Store(store.path) as again:
        assert model_digest(checkpoint, again.digest) == first == model_digest(checkpoint, store.digest)
    assert len(read) == 4
    (checkpoint / "model-1.safetensors").write_text("longer than it was before, by far")
    assert model_digest(checkpoint, store.digest) != first
    assert read[4:] == ["model-1.safetensors"]


def test_how_a_file_looks(tmp_path):
    path = tmp_path / "x"
    path.write_text("one")
    first = look(path)
    assert look(path) == first and first.size == 3
    os.utime(path, ns=(1, 1))
    assert look(path) != first


def test_code_that_is_not_python_has_a_key_too(toys):
    """What is wrong with it is the cell's result; mended, it is another cell."""
    path = toys / "refimpl/toys/methods.py"
    text = path.read_text()
    path.write_text("class Good(:\n")
    broken = key_of(toy())
    path.write_text("class Better(:\n")
    os.utime(path, ns=(2, 2))
    assert key_of(toy()) != broken
    path.write_text(text)
    os.utime(path, ns=(3, 3))
    assert key_of(toy()) != broken


def test_keys_are_sha256_of_sorted_json():
    """Oracle: hashlib on the text, by hand."""
    import hashlib

    assert key({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()


def test_a_real_cell_repeats():
    cell = Cell(arena="weights", method="16 bit", implementation=None)
    assert key_of(cell) == key_of(cell) and len(key_of(cell)) == 64
