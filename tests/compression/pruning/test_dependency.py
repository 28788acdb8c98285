"""Groups of channels: by hand on usual and unusual wiring, and by models that are cut or zeroed."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.pruning.dependency import coupled_groups, cut_
from refimpl.model.linear import weight_of

TOKENS = torch.tensor([[0]])


def found(model, layers=None):
    """Families as plain lists, names without their block."""
    return [
        [(member.layer, member.side, member.group.tolist()) for member in family.members]
        for family in coupled_groups(model, TOKENS, layers)
    ]


def test_heads_and_neurons_of_every_layout(build):
    """Oracle: the layouts, read by `anatomy` from names, and head h's rows and columns by hand. Nothing else can be removed."""
    model = build()
    parts, families = anatomy(model).blocks, coupled_groups(model, TOKENS)
    assert [family.n_groups for family in families] == [
        parts[0].n_kv_heads,
        weight_of(model.get_submodule(parts[0].up)).shape[0],
    ] * 4
    for block, heads, neurons in zip(parts, families[::2], families[1::2], strict=True):
        queries = torch.arange(block.n_kv_heads).repeat_interleave(block.n_heads // block.n_kv_heads * block.head_dim)
        keys = torch.arange(block.n_kv_heads).repeat_interleave(block.head_dim)
        made = (
            {block.q: torch.cat([queries, keys, keys])}
            if block.q == block.k
            else {block.q: queries, block.k: keys, block.v: keys}
        )
        expected = [(name, "out", group.tolist()) for name, group in made.items()] + [(block.o, "in", queries.tolist())]
        assert [(m.layer, m.side, m.group.tolist()) for m in heads.members] == expected
        inside = list(range(neurons.n_groups))
        names = [(name, "out") for name in (block.gate, block.up) if name] + [(block.down, "in")]
        assert [(m.layer, m.side, m.group.tolist()) for m in neurons.members] == [(*name, inside) for name in names]
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_cut_model_is_the_model_with_zeros(build, tokens, logits):
    """Oracle: the whole model, in whose readers the columns of removed groups are zero. Leaving out one group more is another."""
    model = build()
    families = coupled_groups(model, TOKENS)
    kept = [torch.arange(family.n_groups) % 3 != 1 for family in families]
    small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    cut_(small, families, kept)
    for family, keep in zip(families, kept, strict=True):
        reader = family.members[-1]
        assert reader.side == "in"
        weight_of(zeroed.get_submodule(reader.layer))[:, ~keep[reader.group]] = 0
    assert_close(logits(small, tokens), logits(zeroed, tokens))
    assert not torch.allclose(logits(small, tokens), logits(model, tokens))  # negative control
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    removed = 0
    for family, keep in zip(families, kept, strict=True):
        for member in family.members:
            layer = model.get_submodule(member.layer)
            row = weight_of(layer).shape[1 if member.side == "out" else 0] + (
                member.side == "out" and layer.bias is not None
            )
            removed += int((~keep[member.group]).sum()) * row
    assert sizes[1] - sizes[0] == removed > 0


class Wired(nn.Module):
    """Embedding, some layers wired as a test says, and an output layer."""

    def __init__(self, wiring, **layers):
        super().__init__()
        self.embedding, self.wiring = nn.Embedding(3, 4), wiring
        for name, (read, made) in layers.items():
            self.add_module(name, nn.Linear(read, made))

    def forward(self, tokens):
        return self.wiring(self, self.embedding(tokens))


def crossed(m, x):
    """Each of the first half times one of the second half, counted from its end; the first half again beside it."""
    a, b = m.up(x).chunk(2, dim=-1)
    return m.down(torch.cat([a * b.flip(-1), a.relu()], dim=-1))


def interleaved(m, x):
    """Attention whose heads take every second channel."""
    q, k, v = (m.qkv(x)[..., i::3].unflatten(-1, (2, 2)).permute(0, 3, 1, 2) for i in range(3))  # [b, heads, time, 2]
    return m.out((torch.softmax(q @ k.mT, dim=-1) @ v).permute(0, 2, 3, 1).flatten(-2))


def twice(m, x):
    """A layer that two others read, one of them backwards."""
    h = m.up(x).relu()
    return m.one(h) + m.two(h.flip(-1))


def chained(m, x):
    """A shortcut around a layer, inside: what it makes is added to what it reads."""
    h = m.up(x)
    return m.down(h + m.inner(h.relu()))


WIRINGS = {
    "crossed": (
        Wired(crossed, up=(4, 6), down=(6, 2)),
        [[("up", "out", [0, 1, 2, 2, 1, 0]), ("down", "in", [0, 1, 2, 0, 1, 2])]],
    ),
    "interleaved": (
        Wired(interleaved, qkv=(4, 12), out=(4, 2)),
        [[("qkv", "out", [0, 0, 0, 1, 1, 1] * 2), ("out", "in", [0, 1, 0, 1])]],
    ),
    "twice": (
        Wired(twice, up=(4, 3), one=(3, 2), two=(3, 2)),
        [[("up", "out", [0, 1, 2]), ("one", "in", [0, 1, 2]), ("two", "in", [2, 1, 0])]],
    ),
    "chained": (
        Wired(chained, up=(4, 3), inner=(3, 3), down=(3, 2)),
        [
            [
                ("up", "out", [0, 1, 2]),
                ("inner", "in", [0, 1, 2]),
                ("inner", "out", [0, 1, 2]),
                ("down", "in", [0, 1, 2]),
            ]
        ],
    ),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_unusual_wiring(name):
    """Oracle: by hand. Names and positions would give other groups: these are found from what the model computes."""
    model, expected = WIRINGS[name]
    assert [sorted(members) for members in found(model)] == [sorted(members) for members in expected]


def test_a_chain_of_layers_has_a_family_between_each_two():
    """Oracle: by hand, with activations that are flat on one side or on both."""
    wiring = lambda m, x: m.c(nn.functional.hardtanh(m.b(m.a(x).relu().square())))  # noqa: E731
    assert found(Wired(wiring, a=(4, 5), b=(5, 3), c=(3, 2))) == [
        [("a", "out", [0, 1, 2, 3, 4]), ("b", "in", [0, 1, 2, 3, 4])],
        [("b", "out", [0, 1, 2]), ("c", "in", [0, 1, 2])],
    ]


@pytest.mark.parametrize(
    ("wiring", "layers"),
    [
        (lambda m, x: m.b(m.a(x) + x), None),  # joined to the embedding
        (lambda m, x: m.b(h := m.a(x)) + h.sum(), None),  # the model returns it
        (lambda m, x: m.b(torch.softmax(m.a(x), -1)), None),  # all channels make each
        (lambda m, x: m.b(h := m.a(x)) + m.other(h), ["a", "b"]),  # a layer reads it that may not shrink
        (lambda m, x: m.b(m.a(x) * m.other(x)), ["a", "b"]),  # joined to what another layer makes
    ],
)
def test_what_can_not_be_removed(wiring, layers):
    """Oracle: by hand. Removing a channel would change what stays, or a layer that is to be left."""
    model = Wired(wiring, a=(4, 4), b=(4, 4), other=(4, 4))
    assert [family for family in coupled_groups(model, TOKENS, layers or ["a", "b"]) if family.n_groups > 1] == []


def test_only_layers_asked_for(build):
    """Oracle: the families of the whole model."""
    model = build()
    block = anatomy(model).blocks[2]
    some, everything = coupled_groups(model, TOKENS, block.linear), coupled_groups(model, TOKENS)
    for one, other in zip(some, everything[4:6], strict=True):
        assert [(m.layer, m.group.tolist()) for m in one.members] == [
            (m.layer, m.group.tolist()) for m in other.members
        ]


def test_wrong_layers_are_refused():
    model = Wired(lambda m, x: m.a(x), a=(4, 4), idle=(4, 4))
    with pytest.raises(ValueError, match=r"layers \['c'\] are no linear layers of the model; it has \['a', 'idle'\]"):
        coupled_groups(model, TOKENS, ["c"])
    with pytest.raises(ValueError, match=r"never reach layer 'idle': leave it out of `layers`"):
        coupled_groups(model, TOKENS)
    with pytest.raises(ValueError, match="can't take calibration batch 0"):
        coupled_groups(model, torch.tensor([[7.5]]))
    assert not any("forward" in vars(module) for module in model.modules())  # put back, whatever happens
