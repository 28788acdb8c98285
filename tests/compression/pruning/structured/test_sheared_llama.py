"""Sheared LLaMA: gates that learn what is useless, shapes by hand, and what training and loading do to losses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from refimpl.compression.anatomy import anatomy
from refimpl.compression.pruning import domain_loading
from refimpl.compression.pruning.domain_loading import Domain, Loading, Watch, predicted_loss, text_loss
from refimpl.compression.pruning.gates import Shape, gated, open_gates, shape_of
from refimpl.compression.pruning.structured import sheared_llama
from refimpl.compression.pruning.structured.sheared_llama import ShearedLLaMA
from refimpl.model.config import Config
from refimpl.model.linear import weight_of
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train
from tests.compression.conftest import decoder, opt
from tests.compression.pruning.test_domain_loading import DOMAINS, SIZES


def test_structures_that_do_nothing_are_cut(generator):
    """Oracle: closed form. Two of four heads and nine of twelve neurons add nothing: they are those that go, and the loss stays near what it was."""
    shape = {"vocabulary": 13, "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "d_ff": 12}
    model = initialize_(Decoder(Config(n_layers=1, **shape)), generator, std=0.2)
    idle = [j for j in range(12) if j % 4 != 1]
    text, gates = (torch.arange(80) ** 2 % 13).view(4, 20), open_gates(shape_of(model))
    gates["heads"][0, [0, 2]], gates["inner"][0, idle] = 0.0, 0.0
    with gated(model, anatomy(model), gates):
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), iter([text] * 80), steps=80)
    attention, feed_forward = model.layers[0].attention, model.layers[0].feed_forward
    with torch.no_grad():
        attention.o_proj.weight.view(32, 4, 8)[:, [0, 2]], feed_forward.down_proj.weight[:, idle] = 0.0, 0.0
    method = ShearedLLaMA(target={"d_model": 32, "n_kv_heads": 2, "d_ff": 3}, steps=150, continued_steps=0, lr=0.0)
    small = method(model.eval(), [text])
    assert torch.equal(
        small.layers[0].attention.v_proj.weight, attention.v_proj.weight.view(4, 8, 32)[[1, 3]].flatten(0, 1)
    )
    assert torch.equal(small.layers[0].feed_forward.up_proj.weight, feed_forward.up_proj.weight[1::4])
    losses = [float(text_loss(m.requires_grad_(False), [text])) for m in (model, small)]
    assert losses[0] < 0.5 and losses[1] < losses[0] + 0.3


def test_targets_by_hand():
    """Oracle: the paper's shapes of LLaMA-2 7B by name; shares of parameters by hand; what is as wide as its heads stays so."""
    shape = {"vocabulary": 32000, "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128, "d_ff": 11008}
    with torch.device("meta"):
        block = Decoder(Config(n_layers=1, **{**shape, "vocabulary": 9}))
    source = Shape(d_model=4096, n_layers=32, n_kv_heads=32, d_ff=11008)
    model = decoder()
    for method, whole, found, expected in (
        (
            ShearedLLaMA(sparsity=1 - 0.625**2),
            block,
            source,
            Shape(d_model=2560, n_layers=32, n_kv_heads=20, d_ff=6880),
        ),
        (ShearedLLaMA(sparsity=0.75), model, shape_of(model), Shape(d_model=16, n_layers=4, n_kv_heads=1, d_ff=20)),
        (ShearedLLaMA(sparsity=0.001), model, shape_of(model), Shape(d_model=32, n_layers=4, n_kv_heads=2, d_ff=39)),
        (ShearedLLaMA(sparsity=0.999), model, shape_of(model), Shape(d_model=1, n_layers=4, n_kv_heads=1, d_ff=1)),
        (
            ShearedLLaMA(target={"n_layers": 2}, sparsity=0),
            model,
            shape_of(model),
            replace(shape_of(model), n_layers=2),
        ),
    ):
        config = getattr(whole, "config", None)
        if whole is block:  # an anatomy without the storage of its norms
            whole = initialize_(Decoder(replace(config, d_model=64, n_heads=32, n_kv_heads=32, head_dim=2, d_ff=8)))
            found, expected = replace(found, d_model=64), replace(expected, d_model=40)
        assert method.shape(whole, found) == expected


def test_the_target_shape_is_reached(build, tokens, logits):
    """Oracle: the target. Weights are smaller matrices, of modules of the same classes; gradients and flags are as before."""
    model = build()
    parts = anatomy(model).blocks[0]
    target = {"n_layers": 2, "n_kv_heads": parts.n_kv_heads // 2, "d_ff": 11}
    small = ShearedLLaMA(target=target | {"d_model": 16}, steps=2)(model, [tokens])
    assert shape_of(small) == Shape(d_model=16, **target)
    block = anatomy(small).blocks[1]
    assert weight_of(small.get_submodule(block.down)).shape == (16, 11)
    assert weight_of(small.get_submodule(block.o)).shape == (16, parts.n_heads // 2 * 8)
    assert {type(m) for m in small.modules()} == {type(m) for m in model.modules()}
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert torch.isfinite(logits(small, tokens)).all()


def test_half_precision_is_trained_in_float32_and_rounded(build, architecture, tokens):
    """Oracle: the float32 result of the rounded model, rounded; texts as tokenizers give them."""
    name = "tokens" if architecture == "decoder" else "input_ids"
    method = ShearedLLaMA(steps=2, lr=1e-3)
    small = method(build().bfloat16().requires_grad_(False), [{name: tokens}])
    expected = method(build().bfloat16().float(), [tokens])
    for mine, theirs in zip(small.parameters(), expected.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16 and not mine.requires_grad
        assert torch.equal(mine, theirs.bfloat16())


def test_domains_are_evaluated_with_the_gates_of_the_moment(tokens, monkeypatch):
    """Oracle: pruning.sh by hand: so many evaluations while pruning, of the model as the gates leave it, and so many of the cut one."""
    widths = []

    def update(self, model, loading):
        norms = [name for name, module in model.named_modules() if name.endswith("norm") and module._forward_hooks]
        widths.append((model.norm.weight.numel(), len(norms)))

    monkeypatch.setattr(Watch, "update", update)
    monkeypatch.setattr(sheared_llama, "EVALUATIONS", 2)
    monkeypatch.setattr(sheared_llama, "EVALUATIONS_AFTER", 3)
    ShearedLLaMA(target={"d_model": 16}, steps=4, continued_steps=3)(decoder(), [tokens])
    assert widths == [(32, 9)] * 2 + [(16, 0)] * 3  # two norms in each of four blocks, and the last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 must be 0"),
        ({"target": {"width": 3}}, "must give sizes of 1 or more by the names d_model, n_layers"),
        ({"target": {"d_ff": 0}}, "must give sizes of 1 or more"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"continued_steps": -1}, "continued_steps=-1 must be 0"),
        ({"lr": -1.0}, r"lr=-1\.0 must be 0 or more"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        ShearedLLaMA(**change)


def test_what_can_not_be_sheared_is_refused(tokens):
    with pytest.raises(ValueError, match="needs texts to train on"):
        ShearedLLaMA()(decoder())
    with pytest.raises(ValueError, match="target d_ff=41 is larger than the model's 40"):
        ShearedLLaMA(target={"d_ff": 41})(decoder(), [tokens])
    with pytest.raises(ValueError, match="d_model=20 with n_kv_heads=3: in a OPTForCausalLM"):
        ShearedLLaMA(target={"d_model": 20, "n_kv_heads": 3})(opt(), [tokens])
    broken = decoder()
    nn.init.constant_(broken.norm.weight, float("inf"))
    with pytest.raises(ValueError, match="the loss is nan"):
        ShearedLLaMA(steps=1)(broken, [tokens])


# Claims


def test_claim_reference_losses(claim):
    """Largest distance from the authors' seven reference losses for 1.3 billion parameters, predicted from LLaMA-2's three sizes."""
    off = [abs(predicted_loss(SIZES, losses, 1345423360) - predicted) for losses, predicted, _ in DOMAINS.values()]
    claim("sheared-llama", "reference-losses", max(off))


def test_claim_target_parameters(claim):
    """Parameters of LLaMA-2 7B's shape with the target's sizes, counted without storage."""
    with torch.device("meta"):
        small = Decoder(
            Config(vocabulary=32000, d_model=2048, n_layers=24, n_heads=16, n_kv_heads=16, head_dim=128, d_ff=5504)
        )
    claim("sheared-llama", "target-parameters", sum(p.numel() for p in small.parameters()) / 1e9)


def two_domains(generator):
    """Texts `[100, 30]` of two domains: of the first, the next token hangs on one before it, of the second, on two; a fifth is noise."""
    one = torch.randint(0, 16, (16,), generator=generator)
    tables = one.expand(16, 16).tolist(), (8 + torch.randint(0, 8, (16, 16), generator=generator)).tolist()
    found = []
    for table in tables:
        text = [0, 0]
        for drawn in torch.randint(0, 100, (3000,), generator=generator).tolist():
            text.append(drawn % 16 if drawn < 20 else table[text[-2]][text[-1]])
        found.append(torch.tensor(text[2:]).view(100, 30))
    return found[0] % 8, found[1]


def test_claims_of_training(claim, monkeypatch):
    """Excess over the whole model's losses on two domains, the second with a tenth of the texts at first: its spread with weights that
    move, over that with fixed ones; and its mean, over that of a new model of the same shape after as many steps."""
    generator = torch.Generator().manual_seed(0)
    first, second = two_domains(generator)
    shape = {"vocabulary": 16, "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "d_ff": 64}
    model = initialize_(Decoder(Config(n_layers=2, **shape)), generator, std=0.1)
    texts = torch.cat([first[:70], second[:70]])
    batches = (texts[torch.randint(140, (8,), generator=generator)] for _ in range(200))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    train(model, optimizer, batches, steps=200, schedule=lambda progress: 1 - progress)
    domains = {
        "first": Domain(texts=[first[:70]], validation=[first[70:]], weight=0.9),
        "second": Domain(texts=[second[:70]], validation=[second[70:]], weight=0.1),
    }
    watch = Watch(model.eval(), domains)
    method = ShearedLLaMA(target={"d_model": 16, "n_kv_heads": 2, "d_ff": 32}, steps=40, lr=3e-3, batch_size=8)
    small = method(model, domains=domains)
    scratch = initialize_(Decoder(small.config), torch.Generator().manual_seed(1), std=0.1)
    replace(method, continued_steps=80)._continue(scratch, Loading(domains, torch.Generator().manual_seed(0)), watch)
    monkeypatch.setattr(domain_loading, "domain_weights", lambda weights, *_: weights)
    fixed = method(model, domains=domains)
    excess = [watch.losses(m) - watch.references for m in (small, fixed, scratch)]
    claim("sheared-llama", "loading-balances", float(excess[0].diff().abs() / excess[1].diff().abs()))
    claim("sheared-llama", "pruned-beats-scratch", float(excess[0].mean() / excess[2].mean()))
