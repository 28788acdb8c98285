"""LLM-Pruner: planted groups, sizes by hand, recovery, and what it loses beside its rivals."""

import copy
import math
import statistics

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy, feeds, rescale_
from refimpl.compression.protocol import compress
from refimpl.compression.pruning.dependency import Family, Member, coupled_groups, cut_
from refimpl.compression.pruning.structured import llm_pruner
from refimpl.compression.pruning.structured.llm_pruner import LLMPruner, prunable_layers, recover_, whole_ends
from refimpl.compression.pruning.taylor import importance
from refimpl.compression.pruning.unstructured.wanda import Wanda
from refimpl.model.config import Config
from refimpl.model.linear import weight_of
from refimpl.model.model import Block, Decoder, initialize_
from refimpl.model.train import perplexity, train, windows
from tests.compression.conftest import decoder


def plant(model, share):
    """Let the last heads and neurons of the two inner blocks do nothing, a share of them."""
    for block in anatomy(model).blocks[1:3]:
        for name in (block.o, block.down):
            weight = weight_of(model.get_submodule(name))
            weight[:, int(weight.shape[1] * (1 - share)) :] = 0
    return model


@pytest.mark.parametrize("taylor", ["first", "mixed"])
def test_groups_that_do_nothing_go_first(build, tokens, logits, taylor):
    """Oracle: closed form. Their importance is 0, and the model without them says what it said; without others it does not."""
    model = plant(build(), 0.5)
    small = LLMPruner(sparsity=0.5, taylor=taylor, steps=0)(model, [tokens])
    assert_close(logits(small, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    more = LLMPruner(sparsity=0.75, taylor=taylor, steps=0)(model, [tokens])
    assert not torch.allclose(logits(more, tokens), logits(model, tokens), rtol=1e-2, atol=1e-2)


def test_ends_stay_whole_and_inner_blocks_shrink(build, tokens):
    """Oracle: by hand. Of four blocks, the inner two have half of their heads and neurons; all weights are smaller matrices."""
    model = build()
    small = LLMPruner(sparsity=0.5, steps=0)(model, [tokens])
    for place, (before, after) in enumerate(zip(anatomy(model).blocks, anatomy(small).blocks, strict=True)):
        shapes = [tuple(weight_of(m.get_submodule(b.o)).shape) for m, b in ((model, before), (small, after))]
        inner = [weight_of(m.get_submodule(b.down)).shape[1] for m, b in ((model, before), (small, after))]
        half = 2 if place in (1, 2) else 1
        assert shapes[1] == (32, shapes[0][1] // half)
        assert inner[1] == inner[0] // half
        assert (after.n_heads, after.n_kv_heads) == (before.n_heads // half, before.n_kv_heads // half)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("blocks", "ends"), [(32, (4, 2)), (40, (5, 3)), (80, (10, 5)), (4, (1, 1)), (2, (1, 0)), (1, (0, 0))]
)
def test_ends_scale_with_depth(blocks, ends):
    """Oracle: by hand. Blocks 4 to 29 of 32 are pruned (scripts/llama_prune.sh); a share of others, rounded up; one always."""
    assert whole_ends(blocks) == ends


@pytest.mark.parametrize(("sparsity", "heads", "neurons"), [(0.25, 2, 30), (0.5, 1, 20), (0.01, 2, 39), (0.999, 1, 1)])
def test_how_many_stay(sparsity, heads, neurons, tokens):
    """Oracle: the official code's arithmetic, `(c - int(c (1 - s))) // size` groups of a size go, and one group at least stays."""
    small = LLMPruner(sparsity=sparsity, steps=0)(decoder(), [tokens])
    attention, feed_forward = small.layers[1].attention, small.layers[1].feed_forward
    assert (attention.k_proj.out_features // 8, feed_forward.up_proj.out_features) == (heads, neurons)


def test_recovery_trains_and_merges(build, tokens, logits):
    """Oracle: the change of every weight has the rank of LoRA, 8; the loss on the texts falls. Modules and flags are as before."""
    model = LLMPruner(sparsity=0.5, steps=0)(build(), [tokens])
    model.get_submodule(anatomy(model).blocks[0].q).weight.requires_grad_(False)
    healed = copy.deepcopy(model)
    recover_(healed, [tokens], steps=15, lr=1e-2)
    assert [type(m) for m in healed.modules()] == [type(m) for m in model.modules()]
    taken = [[p.requires_grad for p in m.parameters()] for m in (model, healed)]
    assert taken[0] == taken[1] and False in taken[0]
    change = weight_of(healed.get_submodule(anatomy(model).blocks[0].up)) - weight_of(
        model.get_submodule(anatomy(model).blocks[0].up)
    )
    values = torch.linalg.svdvals(change)
    assert values[7] > 1e-4 and values[8] < 1e-5
    losses = [
        nn.functional.cross_entropy(logits(m, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for m in (model, healed)
    ]
    assert losses[1] < 0.9 * losses[0]


def test_steps_and_rate_are_the_recoverys(tokens):
    """Oracle: pruning without recovery, and the recovery called by hand. Controls: none of it, one step more, another rate."""
    pruned = LLMPruner(sparsity=0.5, steps=0)(decoder(), [tokens])
    found = LLMPruner(sparsity=0.5, steps=2, lr=1e-2)(decoder(), [tokens]).state_dict()
    for steps, lr in ((2, 1e-2), (0, 1e-2), (3, 1e-2), (2, 2e-2)):
        healed = copy.deepcopy(pruned)
        if steps:
            recover_(healed, [tokens], steps, lr)
        same = all(torch.equal(value, found[name]) for name, value in healed.state_dict().items())
        assert same == ((steps, lr) == (2, 1e-2))


def test_recovery_is_the_scripts(tokens, monkeypatch):
    """Oracle: post_training.py by hand: rank 8, alpha 16, AdamW with gradients of norm 1 at most, and a rate that rises, then falls
    in a line: over four steps with a first one of warm-up it is 1, 1, 2/3 and 1/3 of the largest."""
    seen, taken = [], torch.optim.AdamW.step

    class Watched(llm_pruner.LoRA):
        def inject(self, *arguments):
            assert (self.rank, self.alpha) == (8, 16.0)
            return super().inject(*arguments)

    def step(optimizer):
        (group,) = optimizer.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
        seen.append((group["lr"], float(norm), group["weight_decay"]))
        taken(optimizer)

    monkeypatch.setattr(llm_pruner, "LoRA", Watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    recover_(decoder(), [tokens], steps=4, lr=0.3)
    assert [lr for lr, _, _ in seen] == pytest.approx([0.3, 0.3, 0.2, 0.1])
    assert [norm for _, norm, _ in seen] == pytest.approx([1.0] * 4, abs=1e-4)
    assert {decay for *_, decay in seen} == {0.0}


def test_half_precision_and_keyword_batches(build, architecture, tokens, logits):
    """Oracle: the float32 result, to bfloat16's rounding; texts as tokenizers give them, some of it padding."""
    name = "tokens" if architecture == "decoder" else "input_ids"
    batch = {name: tokens} if architecture == "decoder" else {name: tokens, "attention_mask": torch.ones_like(tokens)}
    method = LLMPruner(sparsity=0.5, steps=2)
    small, expected = method(build().bfloat16(), [batch]), method(build(), [tokens])
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert [p.shape for p in small.parameters()] == [p.shape for p in expected.parameters()]
    assert torch.isfinite(logits(small, tokens)).all()


def test_one_sample_of_many_is_enough(tokens):
    """Oracle: the first text alone."""
    first = LLMPruner(sparsity=0.5, samples=1, steps=0)(decoder(), [tokens])
    alone = LLMPruner(sparsity=0.5, steps=0)(decoder(), [tokens[:1]])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 must be 0 \(nothing is removed\) to below 1"),
        ({"taylor": "third"}, "taylor='third' must be one of vector, first, second, mixed"),
        ({"aggregation": "mean"}, "aggregation='mean' must be one of sum, prod, max, last"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"steps": -1}, "steps=-1 must be 0"),
        ({"lr": float("nan")}, "lr=nan must be 0 or more"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LLMPruner(**change)


def test_what_can_not_be_pruned_is_refused(tokens):
    with pytest.raises(ValueError, match="needs texts"):
        LLMPruner()(decoder())
    with pytest.raises(ValueError, match="no token with one before it"):
        LLMPruner()(decoder(), [tokens[:, :1]])
    with pytest.raises(ValueError, match="has no blocks"):
        LLMPruner()(nn.Sequential(nn.Embedding(61, 4)), [tokens])
    small = compress(decoder(), Wanda(), [tokens])
    message = r"layer 'layers\.1\.attention\.q_proj' is compressed already: prune the original model, and compress"
    with pytest.raises(ValueError, match=message):
        LLMPruner()(small, [tokens])
    ends = compress(decoder(), Wanda(), [tokens], target=["layers.0.*", "layers.3.*"])  # those are left whole
    assert LLMPruner(steps=0)(ends, [tokens]).layers[1].feed_forward.up_proj.out_features == 30
    broken = decoder()
    nn.init.constant_(broken.layers[0].attention_norm.weight, float("nan"))
    with pytest.raises(ValueError, match="the loss on calibration batch 0 is nan"):
        LLMPruner()(broken, [tokens])


# Claims


def test_claim_llama_7b_parameters(claim):
    """Share of LLaMA-7B's parameters that a quarter of heads and neurons in blocks 5 to 30 holds, by counting."""
    shape = {"vocabulary": 32000, "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128, "d_ff": 11008}
    with torch.device("meta"):
        block = sum(p.numel() for p in Block(Config(n_layers=1, **shape), 0).parameters())
    whole = 2 * 32000 * 4096 + 32 * block + 4096
    removed = []
    for groups, size in ((32, 128), (11008, 1)):
        family = Family((Member("", "out", torch.arange(groups).repeat_interleave(size)),), groups)
        removed.append(int((~LLMPruner().kept(family, torch.arange(groups))).sum()))
    first, last = whole_ends(32)
    gone = (32 - first - last) * 4096 * (removed[0] * 4 * 128 + removed[1] * 3)
    assert (whole, whole - gone) == (6738415616, 5422977024)
    claim("llm-pruner", "llama-7b-parameters", 100 * gone / whole)


class Measured:
    """A decoder trained for seconds on a text of which a table tells four tokens of five; what others lose on another such text."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(8, 8, 8, generator=generator).argmax(-1).tolist()
        text = [0, 0]
        for drawn in torch.randint(0, 10, (6000,), generator=generator).tolist():
            text.append(drawn if drawn < 2 else table[text[-2]][text[-1]])
        tokens, self.held_out = torch.tensor(text).split([4466, 1536])
        shape = {"vocabulary": 8, "d_model": 32, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "d_ff": 64}
        self.model = initialize_(Decoder(Config(n_layers=3, **shape)), generator, std=0.1)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        batches = windows(tokens, 8, 32, generator)
        train(self.model, optimizer, batches, steps=60, schedule=lambda progress: 1 - progress)
        self.whole = perplexity(self.model.eval(), self.held_out, 32, batch=48)
        self.texts = [part.view(-1, 32) for part in tokens[:3072].split(512)]
        self.layers = prunable_layers(self.model)
        self.families = coupled_groups(self.model, self.texts[0], self.layers)

    def lost(self, model):
        """Log-perplexity above the trained model's."""
        return math.log(perplexity(model, self.held_out, 32, batch=48) / self.whole)

    def without(self, scores):
        """The model without the half of its groups that scores least."""
        small = copy.deepcopy(self.model)
        kept = [LLMPruner(sparsity=0.5).kept(*pair) for pair in zip(self.families, scores, strict=True)]
        cut_(small, self.families, kept)
        return small


@pytest.fixture(scope="module")
def three():
    """Three models, of three texts: what one alone says of gradients and norms hangs on its seed."""
    return [Measured(seed) for seed in range(3)]


def losses_by_choice(measured, generator):
    """Log-perplexity lost with half of the groups: by gradients, at random, by norm, and by norm of the model written otherwise.

    What neurons and values make is divided by random numbers there, and multiplied by them where it is read, as channels of large
    models differ in size. Importance by gradients does not change by that: an identity.
    """
    scores = importance(measured.model, measured.families, measured.texts[:2])
    random, rescaled = [], []
    for _ in range(2):
        drawn = [torch.rand(family.n_groups, generator=generator) for family in measured.families]
        random.append(measured.lost(measured.without(drawn)))
        other = copy.deepcopy(measured.model)
        block = anatomy(other).blocks[1]
        for feed in (feed for feed in feeds(other, block) if feed.producer in (block.v, block.up)):
            channels = weight_of(other.get_submodule(feed.producer)).shape[0]
            rescale_(other, feed, torch.exp(torch.randn(channels, generator=generator)))
        rescaled.append(measured.lost(measured.without([norms(other, family) for family in measured.families])))
    for mine, same in zip(scores, importance(other, measured.families, measured.texts[:2]), strict=True):
        assert_close(mine, same, rtol=1e-4, atol=1e-7)
    plain = measured.lost(measured.without([norms(measured.model, family) for family in measured.families]))
    return measured.lost(measured.without(scores)), random, rescaled, plain


def test_claims_of_importance(three, claim):
    """What gradients lose over what the others do: beside chance and norms of channels that differ, all draws of three models
    together; beside norms as training leaves them, on each of the three."""
    generator = torch.Generator().manual_seed(1)
    found = [losses_by_choice(measured, generator) for measured in three]
    for name, place in (("gradients-beat-random", 1), ("gradients-beat-norms", 2)):
        ratios = [losses[0] / other for losses in found for other in losses[place]]
        claim("llm-pruner", name, statistics.median(ratios))
    claim("llm-pruner", "gradients-beat-norms-on-a-trained-model", max(losses[0] / losses[3] for losses in found))


def norms(model, family):
    """Sum of squared weights of each group."""
    total = torch.zeros(family.n_groups)
    for member in family.members:
        square = weight_of(model.get_submodule(member.layer)).square().sum(1 if member.side == "out" else 0)
        total.index_add_(0, member.group, square)
    return total


def test_claim_lora_recovers(three, claim):
    """Share of the gap between the pruned and the whole model that is gone when both have been tuned alike."""
    measured = three[0]
    small, whole = LLMPruner(sparsity=0.5, steps=0)(measured.model, measured.texts), copy.deepcopy(measured.model)
    before = measured.lost(small)
    for model in (small, whole):
        recover_(model, measured.texts, steps=18, lr=5e-3)
    claim("llm-pruner", "lora-recovers", 1 - (measured.lost(small) - measured.lost(whole)) / before)


def test_claim_single_weights_beat_structures(three, claim):
    """Log-perplexity lost to Wanda over that lost to LLM-Pruner without recovery, with half of the weights of the same layers gone."""
    ratios = []
    for measured in three:
        small = LLMPruner(sparsity=0.5, steps=0)(measured.model, measured.texts)
        held = [sum(m.get_submodule(name).weight.numel() for name in measured.layers) for m in (small, measured.model)]
        assert held[0] * 2 == held[1]
        single = compress(measured.model, Wanda(sparsity=0.5), measured.texts[:2], target=measured.layers)
        ratios.append(measured.lost(single) / measured.lost(small))
    claim("llm-pruner", "single-weights-beat-structures", statistics.median(ratios))
