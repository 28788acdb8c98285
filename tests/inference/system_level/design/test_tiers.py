"""Tensors in three memories, against plain ones; bytes that pass, by hand; disks that are full, and files that are gone."""

from collections import Counter, namedtuple

import pytest
import torch

from refimpl.inference.system_level.design import tiers
from refimpl.inference.system_level.design.tiers import Spread, SpreadWeights, split

SHARES = [(0.3, 0.5, 0.2), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.4, 0.6, 0.0), (0.0, 1.0, 0.0), (0.5, 0.0, 0.5)]


@pytest.mark.parametrize("shares", SHARES)
def test_shares_are_kept_to_an_element(shares):
    """Oracle: each memory's count is its share rounded down, but for the last that has one, which takes the rest."""
    for elements in (0, 1, 7, 1000):
        counts = split(elements, shares)
        assert sum(counts) == elements and min(counts) >= 0
        last = max(i for i in range(3) if shares[i] > 0)
        for i, (count, share) in enumerate(zip(counts, shares, strict=True)):
            assert count - elements * share < (2 if i == last else 1e-3) and count - elements * share > -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shares", SHARES)
def test_what_is_read_is_what_was_written(shares, dtype, tmp_path, generator):
    """Oracle: a plain tensor, and bytes by hand; rows are written twice, and others not at all."""
    traffic = Counter()
    spread = Spread(6, 10, shares, torch.zeros(1, dtype=dtype), tmp_path / "x", traffic)
    plain = torch.zeros(6, 10, dtype=dtype)
    for start, rows in ((0, 3), (4, 1), (1, 2)):
        new = torch.randn(rows, 10, generator=generator).to(dtype)
        plain[start : start + rows] = new
        spread.write(start, new)
    out = torch.empty(5, 10, dtype=dtype)
    assert torch.equal(spread.read(1, 6, out), plain[1:])
    device, cpu, disk = (count * dtype.itemsize for count in split(10, shares))
    assert traffic == {
        "device_to_cpu": 6 * (cpu + disk), "cpu_to_disk": 6 * disk, "cpu_to_device": 5 * (cpu + disk), "disk_to_cpu": 5 * disk,
    }  # fmt: skip
    assert spread.nbytes == (6 * device, 6 * cpu, 6 * disk)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == ([6 * disk] if disk else [])
    spread.close()
    assert spread.nbytes == (0, 0, 0) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shares", SHARES)
def test_weights_come_back_as_they_were(shares, tmp_path, generator):
    """Oracle: the parameters; bytes by hand. A buffer may be larger than the layer, and the parameters are left as they are."""
    parameters = {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}
    traffic = Counter()
    weights = SpreadWeights(parameters, shares, torch.device("cpu"), tmp_path / "w.safetensors", traffic)
    found = weights.load(torch.empty(20))
    assert all(torch.equal(found[name], value) for name, value in parameters.items()) and list(found) == ["a", "b"]
    device, cpu, disk = (4 * count for count in split(17, shares))
    assert weights.nbytes == (device, cpu, disk)
    assert (traffic["cpu_to_device"], traffic["disk_to_cpu"]) == (cpu + disk, disk)
    assert (tmp_path / "w.safetensors").exists() == (disk > 0)
    found["a"].zero_()
    assert torch.equal(weights.load(torch.empty(20))["a"], parameters["a"])


# What can go wrong


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(tiers.shutil, "disk_usage", lambda _: usage(39))
    with pytest.raises(OSError, match=r"40 bytes are to be put on this disk, and 39 are free: name a folder"):
        Spread(1, 10, (0.0, 0.0, 1.0), torch.zeros(1), tmp_path / "x", Counter())
    with pytest.raises(OSError, match="40 bytes are to be put on this disk"):
        SpreadWeights({"a": torch.zeros(10)}, (0.0, 0.0, 1.0), torch.device("cpu"), tmp_path / "w", Counter())
    assert not list(tmp_path.iterdir())


def test_a_quota_is_told_and_leaves_no_file(tmp_path, monkeypatch):
    def over(*_):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(tiers.os, "posix_fallocate", over, raising=False)
    with pytest.raises(OSError, match=r"x: 40 bytes can't be put there: .*Disk quota exceeded; name a folder"):
        Spread(1, 10, (0.0, 0.0, 1.0), torch.zeros(1), tmp_path / "x", Counter())
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="absent"):
        Spread(1, 10, (0.0, 0.0, 1.0), torch.zeros(1), tmp_path / "absent" / "x", Counter())

    def full(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(tiers, "save_file", full)
    with pytest.raises(OSError, match=r"w: 40 bytes of weights can't be written: No space left on device; free space"):
        SpreadWeights({"a": torch.zeros(10)}, (0.0, 0.0, 1.0), torch.device("cpu"), tmp_path / "w", Counter())


def test_weights_that_are_gone_or_another_are_told(tmp_path):
    file = tmp_path / "w.safetensors"
    weights = SpreadWeights({"a": torch.zeros(10)}, (0.5, 0.0, 0.5), torch.device("cpu"), file, Counter())
    tiers.save_file({"weights": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"w\.safetensors: holds 3 numbers, and 5 were put there"):
        weights.load(torch.empty(10))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"w\.safetensors: is no safetensors file, or is cut off"):
        weights.load(torch.empty(10))
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"w\.safetensors: weights were put there and are gone; place the model again"
    ):
        weights.load(torch.empty(10))


def test_dtypes_are_not_mixed(tmp_path):
    mixed = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"must have one dtype.*'b': 'torch.float64'"):
        SpreadWeights(mixed, (0.0, 1.0, 0.0), torch.device("cpu"), tmp_path / "w", Counter())
