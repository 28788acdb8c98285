"""A decoder that looks facts up in its text, written by hand, and texts for it."""

import math

import torch

from refimpl.model.config import Config, Rope
from refimpl.model.model import Decoder

FACTS = 23
START, FILLER = 2 * FACTS, 2 * FACTS + 1  # after the facts, and the questions for them
SHARPNESS = 12.0  # score of what a query looks for; all else has 0


def question(fact):
    return fact + FACTS


def lookup_decoder():
    """One layer and one head. A question looks for its fact, whose value says it; every other token looks for START.

    The residual holds the token, one-hot, and room for the answer. Query and key meet in the slots of pairs that hardly turn.
    """
    vocabulary = FILLER + 1
    config = Config(
        vocabulary=vocabulary,
        d_model=vocabulary + FACTS,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=32,
        d_ff=1,
        rope=Rope(theta=1e30),
    )
    model = Decoder(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    slots = torch.tensor([4 + i // 2 + 16 * (i % 2) for i in range(FACTS + 1)])  # the last is START's
    facts, layer = torch.arange(FACTS), model.layers[0]
    gain = math.sqrt(SHARPNESS * math.sqrt(32) / config.d_model)  # norms make a one-hot sqrt(d_model) long
    model.embedding.weight[:, :vocabulary] = torch.eye(vocabulary)
    for norm in (layer.attention_norm, layer.feed_forward_norm, model.norm):
        norm.weight.fill_(1)
    layer.attention.k_proj.weight[slots[facts], facts] = gain
    layer.attention.k_proj.weight[slots[-1], START] = gain
    layer.attention.q_proj.weight[slots[facts], question(facts)] = gain
    layer.attention.q_proj.weight[slots[-1], [*facts, START, FILLER]] = gain
    layer.attention.v_proj.weight[facts, facts] = 1
    layer.attention.o_proj.weight[vocabulary + facts, facts] = 1
    model.lm_head.weight[facts, vocabulary + facts] = 1
    return model


def text(*parts):
    """Tokens `[1, time]` after START: a number n stands for n fillers, a list for its tokens, each after five fillers."""
    tokens = [START]
    for part in parts:
        tokens += [FILLER] * part if isinstance(part, int) else [t for token in part for t in [FILLER] * 5 + [token]]
    return torch.tensor([tokens])


def share_right(model, cache, prompt, questions, chunk=None):
    """Of the questions for these facts that are answered by their fact, asked one after another behind a prompt."""
    for part in prompt.split(chunk or prompt.shape[1], dim=1):
        model(part, cache)
    cache.compress_prefill()
    said = [int(model(torch.tensor([[question(fact)]]), cache)[0, -1].argmax()) for fact in questions]
    return sum(x == fact for x, fact in zip(said, questions, strict=True)) / len(questions)
