"""The trainer of mixers' language models: its compiled form of a scan is the scan, and a run makes what `trained.load` reads."""

import json

import torch
from safetensors import safe_open
from torch.testing import assert_close

from refimpl.architecture.alternatives import trained
from refimpl.architecture.alternatives.state_space.mamba import Mamba
from refimpl.architecture.alternatives.state_space.selective_scan import selective_scan
from refimpl.testbed import train
from tools import mixers


def test_the_scan_in_order_is_the_scan(generator):
    """Oracle: the parallel scan, whose own oracle is the recurrence by hand; values and gradients, in float64."""
    batch, time, channels, n = 2, 9, 3, 4
    u, B, C = (torch.randn(batch, time, size, generator=generator, dtype=torch.float64) for size in (channels, n, n))
    delta = torch.rand(batch, time, channels, generator=generator, dtype=torch.float64)
    A = -torch.rand(channels, n, generator=generator, dtype=torch.float64)
    state = torch.randn(batch, channels, n, generator=generator, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C, state)]
    expected = selective_scan(*inputs)
    gradients = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), inputs)
    found = mixers.scan_in_order(A, state, u, delta, B, C)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found[0].square().sum() + found[1].sum(), inputs), gradients)


def test_a_run_trains_and_leaves_what_is_loaded(tmp_path, monkeypatch):
    """Oracle: the state that the run keeps; its weights are those of the file, in bfloat16, and are no longer the first."""
    monkeypatch.setattr(train, "ROW_TOKENS", 2 * 256)
    monkeypatch.setattr(train, "STAGES", (train.Stage(2, (256,)),))
    monkeypatch.setattr(train, "teacher_forced", lambda model, name, rows, length: 0.0)
    monkeypatch.setattr(trained, "weights_file", lambda method: tmp_path / f"{method.__name__}.safetensors")
    mixers.main(
        "mamba", d_model=8, n_layers=1, settings='{"d_state": 3}', folder=tmp_path / "run", every=1, compiled=False
    )
    model = trained.load(Mamba)
    with safe_open(tmp_path / "Mamba.safetensors", "pt") as file:
        assert [row["step"] for row in json.loads(file.metadata()["log"])] == [1, 2]
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as file:
        kept = file.get_tensor("model/embedding.weight")
    assert torch.equal(model.embedding.weight, kept.bfloat16())
    assert model.blocks[0].mixer.config == Mamba(d_state=3)
    first = Mamba(d_state=3).language_model(model.config, torch.Generator().manual_seed(train.SEED))
    assert not torch.equal(model.embedding.weight, first.embedding.weight.bfloat16())
