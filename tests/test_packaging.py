"""What is published: wheel and source distribution."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the source distribution, built without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def knowledge():
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "taxonomy").rglob("*.yaml")}


def test_wheel_holds_code_and_knowledge_and_nothing_else(built):
    """Oracle: the files of the checkout."""
    [wheel] = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".yaml")} == knowledge()
    assert "refimpl/compression/quantization/weight_only/rtn.py" in names
    assert {name.split("/")[0] for name in names} == {"taxonomy", "refimpl"}


def test_source_distribution_holds_the_knowledge_and_the_tests(built):
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    assert knowledge() <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= names
    assert not any(name.startswith((".venv", "build/", "site/")) for name in names)


def test_wheel_answers_queries_without_torch(built, tmp_path):
    """Unpacked away from the checkout, with torch blocked: what `pip install effllm` alone must do."""
    [wheel] = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import taxonomy\n"
        f"assert str(taxonomy.ROOT.parent) == {str(tmp_path)!r}\n"
        "tree = taxonomy.load(); print(len(tree.methods), tree.methods['gptq'].category)\n"
        "sys.argv = ['effllm', 'show', 'gptq']\n"
        "from refimpl.cli import main; main()\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("173 compression/quantization/weight_only\n")
    assert "Quantizes a layer column by column" in done.stdout
