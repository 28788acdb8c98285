"""The layer that continues features: its formula, its losses, and what it learns of a chain whose features are known."""

import torch
from torch.testing import assert_close

from refimpl.inference.decoding.speculative import feature_draft as module
from refimpl.inference.decoding.speculative.feature_draft import FeatureDraft, losses_of, train_draft
from refimpl.model.cache import FullCache
from refimpl.model.train import windows


def turned(x, positions, theta):
    """Rotary positions of `[heads, time, 8]`, pair (i, i + 4) by complex numbers."""
    angles = positions[:, None] * theta ** -(torch.arange(4) / 4)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def rms(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def by_formula(draft, target, tokens, features):
    """One row, head by head: no norm before attention, one before the feed-forward, none at the end."""
    config, time = target.config, len(tokens)
    attention, forward = draft.layer.attention, draft.layer.feed_forward
    x = draft.fc.weight @ torch.cat((target.embedding.weight[tokens], features), dim=1).T + draft.fc.bias[:, None]
    x = x.T
    q, k, v = (
        layer(x).view(time, -1, 8).transpose(0, 1) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if config.qk_norm:
        q, k = rms(q, attention.q_norm.weight), rms(k, attention.k_norm.weight)
    q, k = (turned(y, torch.arange(time), config.rope.theta) for y in (q, k))
    mixed = []
    for head in range(4):
        scores = (q[head] @ k[head // 2].T / 8**0.5).masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ v[head // 2])
    x = x + torch.cat(mixed, dim=1) @ attention.o_proj.weight.T
    y = rms(x, draft.layer.feed_forward_norm.weight)
    gate = y @ forward.gate_proj.weight.T
    return x + (gate * gate.sigmoid() * (y @ forward.up_proj.weight.T)) @ forward.down_proj.weight.T


@torch.no_grad()
def test_the_layer_follows_its_formula(target, generator):
    """Oracle: the formula, head by head, rotations as complex numbers; whole, and in two parts with a cache. Windows do not matter."""
    draft = FeatureDraft(target, generator)
    tokens, features = torch.randint(0, 61, (2, 9), generator=generator), torch.randn(2, 9, 32, generator=generator)
    found = draft(target, tokens, features)
    for row in range(2):
        assert_close(found[row], by_formula(draft, target, tokens[row], features[row]), rtol=1e-4, atol=1e-5)
    cache = FullCache()
    parts = [draft(target, tokens[:, a:b], features[:, a:b], cache) for a, b in ((0, 4), (4, 9))]
    assert_close(torch.cat(parts, dim=1), found, rtol=1e-4, atol=1e-5)
    beside = draft(target, tokens.roll(1, dims=1), features)
    assert not torch.allclose(beside, found, atol=0.1)  # control: it sees the tokens


def test_losses_by_hand(target, generator):
    """Oracle: smooth L1 and cross-entropy, entry by entry, in float64; of the tokens after the first, against the features after them."""
    target, draft = target.double(), FeatureDraft(target, generator).double()
    batch = torch.randint(0, 61, (2, 6), generator=generator)
    with torch.no_grad():
        features = target.hidden(batch)
        noise = 0.1 * torch.ones(2, 5, 32, dtype=torch.float64)
        found = draft(target, batch[:, 1:], features[:, :-1] + noise)
        off = (found - features[:, 1:]).abs()
        wanted = sum(float(x * x / 2 if x < 1 else x - 0.5) for x in off.flatten()) / off.numel()
        p, q = (target.logits(x).softmax(-1) for x in (features[:, 1:], found))
        entropy = -sum(float((p[b, t] * q[b, t].log()).sum()) for b in range(2) for t in range(5)) / 10
        regression, classification = losses_of(draft, target, batch, noise)
    assert_close(
        (float(regression), float(classification)), (wanted, entropy), rtol=1e-5, atol=1e-5
    )  # the second in float32
    assert 0 < wanted < float(off.mean())


def test_it_learns_the_features_of_a_chain_and_leaves_the_target(chain, generator, monkeypatch):
    """Oracle: closed form: a chain's next feature is that of the token that is seen beside the feature, and its chances are that token's.

    Control: before training they are not.
    """
    monkeypatch.setattr(module, "RATE", 0.03)  # for so small a layer
    target, table, _ = chain
    text = torch.randint(0, 6, (1500,), generator=generator)  # any text has each token followed by each
    state = {name: value.clone() for name, value in target.state_dict().items()}
    draft = FeatureDraft(target, generator)
    seen = torch.randint(0, 6, (4, 30), generator=generator)

    def furthest():
        with torch.no_grad():
            said = target.logits(draft(target, seen[:, 1:], target.hidden(seen[:, :-1]))).softmax(-1)
        return (said - table[seen[:, 1:]]).abs().max()

    before = furthest()
    losses = train_draft(draft, target, windows(text, 4, 32, generator), 150, generator)
    assert furthest() < 0.1 < 0.3 < before and losses[-1] < losses[0] / 2
    assert not any(parameter.requires_grad for parameter in draft.parameters())
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


def test_training_is_the_papers(chain, generator, monkeypatch):
    """Oracle: the paper: the weights of the losses, noise between -0.1 and 0.1, gradients of at most 0.5, AdamW's betas; a linear rise
    and fall of the rate by hand.
    """
    target, _, _ = chain
    seen = []

    def spy(draft, target, batch, noise):
        seen.append(noise)
        regression, classification = losses_of(draft, target, batch, noise)
        return 1e4 * regression, 1e4 * classification  # so large that gradients must be clipped

    monkeypatch.setattr(module, "losses_of", spy)
    draft, batch = FeatureDraft(target, generator), torch.randint(0, 6, (4, 33), generator=generator)
    train_draft(draft, target, [batch], 1, generator)
    assert max(float(parameter.grad.abs().max()) for parameter in draft.parameters()) == 0.5
    (noise,) = seen
    assert noise.shape == (4, 32, 6) and -0.1 <= noise.min() < -0.09 and 0.09 < noise.max() <= 0.1
    whole = module._loss(draft, batch, target=target, generator=torch.Generator().manual_seed(1))
    noise = 0.1 * (2 * torch.rand(4, 32, 6, generator=torch.Generator().manual_seed(1)) - 1)
    regression, classification = losses_of(draft, target, batch, noise)
    assert_close(whole, 1e4 * (regression + 0.1 * classification))
    assert module.BETAS == (0.9, 0.95)
    assert [round(module._linear(done), 6) for done in (0, 0.05, 0.1, 0.55, 1)] == [0, 0.5, 1, 0.5, 0]


def test_a_draft_as_a_decoder_takes_tokens(target, generator):
    """Oracle: the layer beside features that are 0."""
    draft, tokens, cache = FeatureDraft(target, generator), torch.tensor([[5, 7, 33]]), FullCache()
    with torch.no_grad():
        logits = draft.as_decoder(target)(tokens, cache)
        assert_close(logits, target.logits(draft(target, tokens, torch.zeros(1, 3, 32))))
    assert cache.length == 3
