"""Blocks over weights that come and go: tokens, bytes that pass and bytes held, against decoding, formulas, and all schedules there are."""

import itertools

import pytest
import torch

from refimpl.inference.system_level.design.block_pass import Offloaded
from refimpl.inference.system_level.design.flexgen_offload import task_of
from refimpl.inference.system_level.design.offload_cost import Hardware, evaluate, footprint
from refimpl.memory import peak_of
from refimpl.model.config import Config
from refimpl.model.generate import generate, pad
from refimpl.model.model import Decoder
from tests.inference.system_level.traces import tensors

ANY = Hardware(device=0, cpu=0, disk=0)
SHARES = [
    (0.25, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.25, 0.25),
    (0, 0, 1, 0, 0, 1, 0, 0, 1),
    (1, 0, 0, 1, 0, 0, 1, 0, 0),
    (0, 1, 0, 0, 1, 0, 0, 1, 0),
]


def plan_of(model, time, n, batch, batches, shares):
    return evaluate(task_of(model, time, n), ANY, batch, batches, shares)


def trace(generator, lengths):
    return pad([torch.randint(61, (length,), generator=generator).tolist() for length in lengths])


@pytest.mark.parametrize("shares", SHARES)
def test_tokens_are_those_of_plain_decoding(model, generator, tmp_path, shares):
    """Oracle: `generate`; five prompts of different lengths in batches of two, so that the last batch is of one; then a second block."""
    offloaded = Offloaded(model, plan_of(model, 9, 7, 2, 3, shares), tmp_path)
    for lengths in ((9, 4, 1, 6, 2), (3, 5)):
        tokens, padding = trace(generator, lengths)
        found = torch.stack(list(offloaded.run(tokens, padding, 7)), dim=1)
        assert torch.equal(found, generate(model, tokens, 7, padding=padding))
        assert offloaded.caches == [] and offloaded.nbytes[2] == sum(home.nbytes[2] for home in offloaded.homes)


@pytest.mark.parametrize("shares", SHARES)
def test_bytes_that_pass_are_those_of_the_schedule(plain, generator, tmp_path, shares):
    """Oracle: closed form. A pass loads each layer once for all batches; it reads the whole cache and writes what is new; a hidden state
    comes and goes between two layers. With l layers, n passes, b sequences of s tokens, W, E and H numbers of a layer, entry and state:
    l n W of weights; l b E (s (n - 1) + (n - 1)(n - 2) / 2) of caches come, l b E (s + n - 1) go; (l - 1) b H (s + n - 1) of states each.
    """
    layers, s, n, b = 2, 5, 4, 4
    tokens, padding = trace(generator, (5, 5, 2, 4))
    offloaded = Offloaded(plain, plan_of(plain, s, n, 2, 2, shares), tmp_path)
    list(offloaded.run(tokens, padding, n))
    weights = layers * n * offloaded.homes[0].elements * 4
    entry, state = 2 * 2 * 8 * 4, 32 * 4
    come, go = layers * b * entry * (s * (n - 1) + (n - 1) * (n - 2) // 2), layers * b * entry * (s + n - 1)
    moved = (layers - 1) * b * state * (s + n - 1)
    for kind, into, out, (_, cpu, disk) in (
        ("weights", weights, 0, shares[:3]), ("cache", come, go, shares[3:6]), ("activations", moved, moved, shares[6:]),
    ):  # fmt: skip
        found = offloaded.traffic[kind]
        for link, expected in (
            ("cpu_to_device", into * (cpu + disk)), ("disk_to_cpu", into * disk), ("device_to_cpu", out * (cpu + disk)),
            ("cpu_to_disk", out * disk),
        ):  # fmt: skip
            assert found[link] == pytest.approx(expected, rel=1e-3)  # a layer's numbers are no multiple of four
            assert (found[link] == 0) == (expected == 0)


@pytest.mark.parametrize("shares", SHARES)
def test_no_more_is_held_than_planned(plain, generator, tmp_path, shares):
    """Oracle: the storages of all tensors that can be reached, summed up here, the files, and the plan's bytes; in every pass."""
    tokens, padding = trace(generator, (9, 4, 1, 6, 2))
    plan = plan_of(plain, 9, 7, 2, 3, shares)
    offloaded = Offloaded(plain, plan, tmp_path)
    resident = sum(p.nbytes for name, p in plain.named_parameters() if not name.startswith("layers."))
    for _ in offloaded.run(tokens, padding, 7):
        device, cpu, disk = offloaded.nbytes
        held = {
            key: value
            for name, value in vars(offloaded).items()
            if name != "model"
            for key, value in tensors(value).items()
        }
        mapped = sum(spread.nbytes[2] for spread in (*offloaded.hidden, *itertools.chain(*offloaded.caches)))
        assert sum(held.values()) == device + cpu + mapped
        headers = 8 * 1024  # of safetensors, at most
        assert disk <= sum(file.stat().st_size for file in tmp_path.iterdir()) <= disk + headers
        assert device + resident <= plan.bytes[0] and cpu <= plan.bytes[1] and disk <= plan.bytes[2]
    work = footprint(task_of(plain, 9, 7), 2, 6, offloaded.streamed)[:, 9]
    assert cpu > plan.bytes[1] - work[1] - 2 * 4 * 6_000 and (cpu > 0) == (shares[1] + shares[4] + shares[7] > 0)


def test_who_stops_early_leaves_nothing(plain, generator, tmp_path):
    """Oracle: files and bytes as before the block."""
    offloaded = Offloaded(plain, plan_of(plain, 5, 9, 2, 1, SHARES[0]), tmp_path)
    before = offloaded.nbytes, sorted(tmp_path.iterdir())
    tokens, padding = trace(generator, (5, 3))
    running = offloaded.run(tokens, padding, 9)
    next(running)
    assert offloaded.nbytes > before[0] and len(list(tmp_path.iterdir())) > len(before[1])
    running.close()
    assert (offloaded.nbytes, sorted(tmp_path.iterdir())) == before


def test_a_file_that_vanishes_is_told(plain, generator, tmp_path):
    offloaded = Offloaded(plain, plan_of(plain, 5, 4, 2, 1, SHARES[0]), tmp_path)
    tokens, padding = trace(generator, (5, 3))
    (tmp_path / "layer-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"layer-1\.safetensors: weights were put there and are gone"):
        list(offloaded.run(tokens, padding, 4))
    assert offloaded.caches == []


# Memory and traffic


def test_a_model_on_disk_takes_the_memory_of_two_layers(generator, tmp_path):
    """Oracle: what the process has in memory; twelve layers of 4 MB each, put on disk one by one, of a decoder that never was in memory whole.

    Control: the same layers in memory take all of their bytes.
    """
    config = Config(vocabulary=61, d_model=256, n_layers=12, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=1024)
    with torch.device("meta"):
        model = Decoder(config)
    for part in (model.embedding, model.norm, model.lm_head):
        part.to_empty(device="cpu")
        torch.nn.init.normal_(part.weight, generator=generator)

    def weights(layer):
        shapes = {name: p.shape for name, p in model.layers[layer].named_parameters()}
        return {name: torch.empty(shape).uniform_(-0.05, 0.05, generator=generator) for name, shape in shapes.items()}

    plan = plan_of(model, 4, 2, 2, 1, (0, 0, 1, 1, 0, 0, 1, 0, 0))
    layer = task_of(model, 4, 2).weights
    offloaded = Offloaded(model, plan, tmp_path, weights)
    tokens, padding = trace(generator, (4, 4))
    with peak_of(torch.device("cpu")) as peak:
        for _ in offloaded.run(tokens, padding, 2):
            pass
    with peak_of(torch.device("cpu")) as whole:
        held = torch.empty(12, offloaded.homes[0].elements)
        for home, room in zip(offloaded.homes, held, strict=True):
            home.load(room)
    assert 4e6 < layer < 5e6
    assert peak.bytes < 5 * layer < 9 * layer < whole.bytes
