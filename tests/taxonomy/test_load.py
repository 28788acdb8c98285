"""The compiled form: used when nothing changed, left when anything did. Oracle: the files, read anew."""

import os
import subprocess
import sys
import threading

import msgspec
import platformdirs
import pytest

import taxonomy
from taxonomy import reader
from taxonomy.reader import read
from tests.small_tree import AWQ, FILES, GPTQ, LORA, PROSE, write


class Reread(Exception):
    """The files were read and checked again."""


@pytest.fixture
def no_reader(monkeypatch):
    """Reading the files raises; only the compiled form can be used."""

    def refuse(*_):
        raise Reread

    return lambda: monkeypatch.setattr(reader, "read", refuse)


def same(tree, root):
    """Whether a loaded taxonomy is what its files say now."""
    fresh = read(root)
    assert fresh.problems() == []
    stored = fresh.compiled()
    return all(getattr(tree, name) == getattr(stored, name) for name in stored.__struct_fields__)


def change(path, old, new):
    """Replace text by as much text, and put the times back: size and times tell nothing."""
    before = path.stat()
    text = path.read_text(encoding="utf-8")
    assert old in text
    assert len(old) == len(new)
    path.write_text(text.replace(old, new), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_compiled_form_is_used_when_nothing_changed(small_tree, no_reader):
    first = taxonomy.load(small_tree)
    no_reader()
    again = taxonomy.load(small_tree)
    assert again.methods == first.methods
    assert same_parts(again, first)


def same_parts(a, b):
    return all(getattr(a, n) == getattr(b, n) for n in ("categories", "methods", "papers", "frameworks", "survey"))


def test_first_load_is_what_the_files_say(small_tree):
    tree = taxonomy.load(small_tree)
    assert same(tree, small_tree)
    assert list(tree.methods) == ["awq", "gptq", "rtn", "dora-x", "lora", "qlora"]
    assert tree.root == small_tree


def test_path_may_be_text_relative_or_a_link(small_tree, monkeypatch, no_reader, tmp_path):
    """All of them are the same folder, with one compiled form."""
    first = taxonomy.load(small_tree)
    (tmp_path / "link").symlink_to(small_tree)
    no_reader()
    monkeypatch.chdir(small_tree.parent)
    for path in (str(small_tree), "taxonomy", "./taxonomy/", tmp_path / "link"):
        assert same_parts(taxonomy.load(path), first)


def rewrite(tree):
    change(tree / GPTQ, "What GPTQ does", "What GPTQ DOES")


def add(tree):
    (tree / "finetuning/new.yaml").write_text(FILES[LORA].replace("name: LoRA", "name: New"), encoding="utf-8")


def remove(tree):
    (tree / AWQ).unlink()


def move(tree):
    (tree / AWQ).rename(tree / "finetuning/awq.yaml")


def rename(tree):
    """To a name as long, at the same place in the order: only the path differs."""
    (tree / AWQ).rename((tree / AWQ).with_name("awx.yaml"))


def exchange(tree):
    """Two files trade their contents: the same bytes under the same names, in another order."""
    one, other = (tree / AWQ).read_bytes(), (tree / "finetuning/dora_x.yaml").read_bytes()
    (tree / AWQ).write_bytes(other)
    (tree / "finetuning/dora_x.yaml").write_bytes(one)


def add_framework(tree):
    (tree / "systems/frameworks/vllm.yaml").write_text(FILES["systems/frameworks/peft.yaml"], encoding="utf-8")


@pytest.mark.parametrize(
    "happens", [rewrite, add, remove, move, rename, exchange, add_framework], ids=lambda f: f.__name__
)
def test_any_change_of_the_files_is_seen(small_tree, happens):
    before = taxonomy.load(small_tree)
    happens(small_tree)
    after = taxonomy.load(small_tree)
    assert same(after, small_tree)
    assert not same_parts(before, after)


def test_a_change_that_breaks_the_files_is_seen(small_tree):
    """And once it is taken back, the compiled form of before is still good."""
    taxonomy.load(small_tree)
    change(small_tree / GPTQ, "name: GPTQ", "nome: GPTQ")
    with pytest.raises(taxonomy.InvalidTaxonomy, match="did you mean 'name'"):
        taxonomy.load(small_tree)
    change(small_tree / GPTQ, "nome: GPTQ", "name: GPTQ")
    assert same(taxonomy.load(small_tree), small_tree)


def test_files_that_are_not_yaml_do_not_matter(small_tree, no_reader):
    taxonomy.load(small_tree)
    (small_tree / "notes.txt").write_text("x")
    (small_tree / "finetuning/.gptq.yaml.swp").write_text("x")
    no_reader()
    assert len(taxonomy.load(small_tree).methods) == 6


@pytest.mark.parametrize("which", range(len(taxonomy.SOURCES)))
def test_a_change_of_schema_or_reader_is_seen(small_tree, tmp_path, monkeypatch, no_reader, which):
    taxonomy.load(small_tree)
    sources = list(taxonomy.SOURCES)
    assert {path.name for path in sources} == {"schema.py", "reader.py"}
    changed = tmp_path / "changed.py"
    changed.write_bytes(sources[which].read_bytes() + b"\n")
    sources[which] = changed
    monkeypatch.setattr(taxonomy, "SOURCES", tuple(sources))
    no_reader()
    with pytest.raises(Reread):
        taxonomy.load(small_tree)


def stored(root):
    (path,) = platformdirs.user_cache_path("effllm").glob("*.taxonomy")
    assert path == taxonomy.stored_at(root)
    return path


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def flip_head(data):
    return bytes([data[0] ^ 1]) + data[1:]


def foreign(data):
    return b"not ours at all, and longer than any header could be" * 10


def nothing(data):
    return b""


def header(data):
    return data[:64]


@pytest.mark.parametrize("damage", [cut, flip, flip_head, foreign, nothing, header], ids=lambda f: f.__name__)
def test_a_damaged_store_is_made_anew(small_tree, damage, no_reader):
    taxonomy.load(small_tree)
    path = stored(small_tree)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(taxonomy.load(small_tree), small_tree)
    assert path.read_bytes() == whole  # and mended
    no_reader()
    assert len(taxonomy.load(small_tree).methods) == 6


def test_the_store_of_another_tree_is_not_taken(small_tree, tmp_path):
    """Oracle: the other tree, whose store is put in this one's place."""
    other = write(tmp_path / "other")
    (other / AWQ).unlink()
    taxonomy.load(other)
    taxonomy.stored_at(small_tree).write_bytes(taxonomy.stored_at(other).read_bytes())
    assert "awq" in taxonomy.load(small_tree).methods


def test_nothing_is_left_beside_the_store(small_tree):
    taxonomy.load(small_tree)
    assert list(platformdirs.user_cache_path("effllm").iterdir()) == [stored(small_tree)]


def test_a_cache_that_cannot_be_written_costs_time_only(small_tree, monkeypatch, tmp_path):
    """The place of the cache is taken by a file: nobody, root included, can make a folder there."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    for _ in range(2):
        assert same(taxonomy.load(small_tree), small_tree)


def test_a_store_that_is_a_folder_costs_time_only(small_tree):
    taxonomy.stored_at(small_tree).mkdir(parents=True)
    assert same(taxonomy.load(small_tree), small_tree)
    assert taxonomy.stored_at(small_tree).is_dir()


PRINT = "import taxonomy, sys; print(sorted(taxonomy.load(sys.argv[1]).methods))"


def test_two_processes_at_once(small_tree):
    """Both find the store missing, both write it, both are right, and what is left is whole."""
    started = [
        subprocess.Popen([sys.executable, "-c", PRINT, small_tree], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said == [f"{sorted(taxonomy.load(small_tree).methods)}\n"] * 2
    assert list(platformdirs.user_cache_path("effllm").iterdir()) == [stored(small_tree)]


def test_many_threads_while_the_store_is_damaged(small_tree):
    """Each sees a whole taxonomy, whatever the others are writing."""
    expected = taxonomy.load(small_tree).methods
    seen = []

    def work():
        for _ in range(15):
            seen.append(taxonomy.load(small_tree).methods == expected)
            taxonomy.stored_at(small_tree).write_bytes(b"broken")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 60


IMPORTED = (
    "import sys, taxonomy; before = set(sys.modules); tree = taxonomy.load(sys.argv[1] if sys.argv[1:] else None)\n"
    "assert len(tree.methods) > 5; tree.find('what', category='compression'); tree.bibtex(); tree.to_json()\n"
    "print(*sorted(m for m in sys.modules))"
)


def imported(*arguments):
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_taxonomy_brings_in_nothing_heavy(small_tree):
    """A process of its own; the second time, when the compiled form is there, the YAML parser and the graphs stay out too."""
    light = {"torch", "refimpl", "tools", "numpy", "rich", "typer", "pydantic"}
    first = imported(str(small_tree))
    assert {"taxonomy", "taxonomy.reader", "yaml"} <= first
    assert not first & light
    second = imported(str(small_tree))
    assert not second & (light | {"taxonomy.reader", "yaml", "networkx", "jsonschema"})


def test_invalid_taxonomy_lists_all(small_tree):
    """Oracle: `validate`."""
    for name in (GPTQ, AWQ, LORA):
        change(small_tree / name, "name:", "nome:")
    with pytest.raises(taxonomy.InvalidTaxonomy) as caught:
        taxonomy.load(small_tree)
    assert len(caught.value.problems) == 3
    assert caught.value.problems == taxonomy.validate(small_tree)
    assert str(caught.value).splitlines() == [str(p) for p in taxonomy.validate(small_tree)]
    assert isinstance(caught.value, ValueError)
    assert not platformdirs.user_cache_path("effllm").exists()  # what is invalid is not stored


@pytest.mark.parametrize("function", [taxonomy.load, taxonomy.validate])
def test_path_that_is_no_folder(function, small_tree):
    for path in (small_tree / "nowhere", small_tree / GPTQ):
        with pytest.raises(FileNotFoundError, match=r"is not a folder; give the folder that holds the YAML files"):
            function(path)


@pytest.mark.parametrize("function", [taxonomy.load, taxonomy.validate])
def test_a_category_is_no_taxonomy(function, small_tree):
    with pytest.raises(
        ValueError, match=r"finetuning' is a category; give the folder of the whole taxonomy, that of papers/"
    ):
        function(small_tree / "finetuning")


def test_values_of_every_kind_survive_the_store(small_tree):
    """What an arena's settings may hold: numbers of any size that YAML gives, texts, lists, nothing."""
    arena = f"arena: {{weights: {{a: [{2**63 - 1}, -7, 0.1, 1.0e+300, true, ~, 'x', [1, [2]], {{k: v}}]}}}}\n"
    path = small_tree / GPTQ
    path.write_text(path.read_text(encoding="utf-8") + arena, encoding="utf-8")
    values = [2**63 - 1, -7, 0.1, 1e300, True, None, "x", [1, [2]], {"k": "v"}]
    for _ in range(2):
        assert taxonomy.load(small_tree).methods["gptq"].arena == {"weights": {"a": values}}


def test_the_real_tree_is_whole(no_reader):
    """Oracle: the files, read anew; and from then on the compiled form serves."""
    tree = taxonomy.load()
    assert same(tree, taxonomy.ROOT)
    no_reader()
    assert same_parts(taxonomy.load(), tree)


def test_the_order_of_files_is_that_of_both_ways_to_list_them(small_tree):
    """`validate` and `load` find the same files in the same order, so that the same entry counts as the first."""
    folder = small_tree / "finetuning-x"
    folder.mkdir()
    (folder / "_category.yaml").write_text(FILES["finetuning/_category.yaml"], encoding="utf-8")
    assert list(taxonomy._contents(small_tree)) == reader.files(small_tree)


def test_prose_is_kept_to_the_letter(small_tree):
    assert taxonomy.load(small_tree).methods["gptq"].idea == PROSE + "\n"
    assert msgspec.to_builtins(taxonomy.load(small_tree).papers["lora"])["authors"] == ["Ada B. See", "Émile Ø"]
