"""Influence between cut-out layers: by hand, and by moving what was put in their place."""

import torch
from torch import nn

from refimpl.compression.pruning.influence import ROWS, TIME, fed_by, run_cut
from tests.compression.conftest import decoder


def test_attention_by_perturbation():
    """Oracle: finite differences. What attention's output layer reads, as each channel that queries, keys and values make is moved."""
    model = decoder()
    name = "layers.0.attention."
    trace = run_cut(model, torch.tensor([[5, 6]]))
    (x,) = trace.read[name + "o_proj"]
    assert x.shape == (ROWS, TIME, 32)
    weights = torch.zeros(x.shape)
    weights[torch.arange(32), :, torch.arange(32)] = torch.rand(32, TIME) + 0.5
    found = {layer: seen[:32] for layer, seen in fed_by(trace, x, weights)}
    assert set(found) == {name + part for part in ("q_proj", "k_proj", "v_proj")}
    made = dict(trace.made)
    heads = lambda part: made[name + part].detach()[:1].unflatten(-1, (-1, 8)).transpose(1, 2)  # noqa: E731
    cos, sin = model.rotary(torch.arange(TIME)[None], torch.float32)

    def attended(q, k, v):
        from refimpl.model.model import attend
        from refimpl.model.rope import rotate

        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, causal=True)
        return out.transpose(1, 2).flatten(2)

    parts = {part: heads(part) for part in ("q_proj", "k_proj", "v_proj")}
    before = attended(*parts.values())
    for part, seen in ((part, found[name + part]) for part in parts):
        for channel in range(seen.shape[1]):
            moved = {key: value.clone() for key, value in parts.items()}
            moved[part][:, channel // 8, :, channel % 8] += torch.tensor([0.5, -0.7, 0.3, 0.9])
            change = (attended(*moved.values()) - before).abs().amax((0, 1))
            assert ((change > 1e-7) == seen[:, channel]).all()


def test_values_have_both_signs_and_the_model_is_put_back():
    """Oracle: by hand. Each channel that a layer makes is positive at one position and negative at another."""
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5))
    trace = run_cut(model, torch.tensor([[2]]))
    assert [name for name, _ in trace.made] == ["0", "1"]
    for _, values in trace.made:
        assert ((values > 0).any(1) & (values < 0).any(1)).all()
        assert values.abs().min() >= 0.1 and values.abs().max() <= 1
    assert torch.equal(trace.returned[0], trace.made[1][1])
    assert not any("forward" in vars(module) for module in model.modules())
