r"""The same text in fewer calls of the model: how many, how much faster, and is it the same text?

The target is the testbed's model (or a checkpoint of the user's), the prompts are windows of real text that it has not seen. The
draft is a model of one layer: the target's embedding, first layer and head, trained to predict the next token on 300 batches of
the testbed's training text (20 in the quick form) from a fixed seed, once a process; a method may take it or leave it, or
`prepare` what it needs. Plain decoding is timed in turn with the method, prompt by prompt, in the same process.

Guesses pay where a call over several tokens takes as long as over one and a draft's call takes far less. A target of a few
million parameters on a CPU is small for that: a draft of one layer in six has the same embedding and head, and costs far more
than a sixth of a call, and a call over ten tokens takes longer than one over one. Both costs are measured here.

`expected_speedup` says what the acceptance would give at these costs: Theorem 3.8 of `speculative-decoding` (arXiv 2211.17192),
tokens of a call over the time of a round. Ours are the tokens of each round's own number of guesses, the chances by depth of a tree,
and the time of calls over several tokens (`refimpl.inference.decoding.speedup`). What a method does between calls is left out.
"""

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.inference.decoding.protocol import Decoded, Decoding, Plain
from refimpl.inference.decoding.speedup import expected_speedup, expected_tokens_of
from refimpl.model.cache import FullCache
from refimpl.model.model import Decoder
from refimpl.model.train import train, windows

PROMPTS, PROMPT, NEW = 8, 64, 64  # texts, their tokens, tokens decoded
TIMED = 9  # calls of each width, for their median
DRAFT_STEPS, QUICK_DRAFT_STEPS, DRAFT_BATCH, DRAFT_LENGTH, DRAFT_RATE = 300, 20, 8, 128, 1e-3
TRAIN_TOKENS, QUICK_TRAIN_TOKENS, UNSEEN_TOKENS = 400_000, 50_000, 40_000

ABOUT = (
    "The testbed's model continues real text by 64 tokens: calls of the model, guesses kept, time of a token, and "
    "speed against plain decoding, which is timed in turn with each method; against itself it tells how far the clock is to "
    "be trusted. The expected speed-up is that of Leviathan et al. (Theorem 3.8) from the measured acceptance; ours are rounds "
    "of unequal guesses, trees by depth, and the measured time of a call over several tokens. "
    "A method that takes a draft model has the target's first layer, trained on the same text."
)
VERSION = 3
METRICS = (
    Metric("target_calls_per_token", "calls for each token of a row", "lower"),
    Metric("accepted_length", "guesses of a round that stand, mean; the target adds one token", "higher"),
    Metric("accepted_share", "share of the guesses that stand; of a tree, of its longest branch", "higher"),
    Metric("seconds_per_token", "seconds", "lower", exact=False),
    Metric("speedup", "times as fast as plain decoding", "higher", exact=False),
    Metric("expected_speedup", "times, from the acceptance and the time of calls", "higher", exact=False),
    Metric("identical", "share of greedy texts equal to plain decoding's", "higher"),
)
BASELINE = "plain decoding"
AXES: dict[str, tuple[Any, ...]] = {"temperature": (0.0, 1.0), "batch": (1, 4)}
QUICK: dict[str, tuple[Any, ...]] = {"temperature": (0.0,), "batch": (1,)}


def baseline(conditions: Conditions) -> dict[str, float]:
    """Plain decoding; its speed against itself says how far the clock is to be trusted."""
    return _figures(Plain(), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`."""
    return _figures(implementation(**settings), conditions)


def _figures(method: Decoding, conditions: Conditions) -> dict[str, float]:
    given, generator = testbed.subject(conditions.model, conditions.device), conditions.generator
    learnt, unseen = (
        given.text("train", QUICK_TRAIN_TOKENS if conditions.quick else TRAIN_TOKENS),
        given.text("held-out", UNSEEN_TOKENS),
    )
    rows = 2 if conditions.quick else PROMPTS
    places = torch.randint(len(unseen) - PROMPT, (rows, 1), generator=generator)
    prompts = unseen[places + torch.arange(PROMPT)].to(conditions.device)
    seed = int(torch.randint(2**31, (), generator=generator))
    small = None if isinstance(method, Plain) else draft_of(given.model, learnt, conditions)
    draft = method.prepare(given.model, small, learnt, torch.Generator().manual_seed(seed))
    temperature, batch = conditions.axes.get("temperature", 0.0), conditions.axes.get("batch", 1)
    run = partial(_timed, given.model, draft, seed)
    run(method, prompts[:batch], temperature)  # the first call of anything is slow
    pairs = [
        (run(Plain(), group, temperature), run(method, group, temperature)) for group in torch.split(prompts, batch)
    ]
    greedy = pairs
    if temperature > 0:
        greedy = [(run(Plain(), group, 0.0), run(method, group, 0.0)) for group in torch.split(prompts, batch)]
    runs, seconds = [mine for _, (mine, _) in pairs], sum(taken for _, (_, taken) in pairs)
    rounds, accepted, length = (
        sum(int(getattr(decoded, name).sum()) for decoded in runs) for name in ("rounds", "stood", "depths")
    )
    calls, drafts = (sum(getattr(decoded, f"{who}_calls") for decoded in runs) for who in ("target", "draft"))
    widths = torch.cat([decoded.widths for decoded in runs]).tolist()
    cost, reading = _costs(draft, given.model, prompts[:batch], set(widths))
    return {
        "target_calls_per_token": calls / (NEW * len(pairs)),
        "accepted_length": accepted / rounds,
        "accepted_share": accepted / max(length, 1),
        "seconds_per_token": seconds / (NEW * rows),
        "speedup": sum(taken for (_, taken), _ in pairs) / seconds,
        "expected_speedup": expected_speedup(
            expected_tokens_of(runs), drafts / calls, cost, statistics.fmean(reading[width] for width in widths)
        ),
        "identical": sum(int((x.tokens == y.tokens).all(dim=1).sum()) for (x, _), (y, _) in greedy) / rows,
    }


def _timed(
    target: Decoder, draft: nn.Module | None, seed: int, method: Decoding, prompts: Tensor, temperature: float
) -> tuple[Decoded, float]:
    """Decode prompts, and the seconds it took."""
    generator = torch.Generator(prompts.device).manual_seed(seed)
    start = clock(prompts.device)
    decoded = method.decode(target, prompts, NEW, draft=draft, temperature=temperature, generator=generator)
    return decoded, clock(prompts.device) - start


_drafts: dict[tuple[Any, ...], Decoder] = {}  # of this process


def draft_of(target: Decoder, text: Tensor, conditions: Conditions) -> Decoder:
    """The target's first layer as a model of its own, trained for some steps; the same for every cell of a process."""
    steps = QUICK_DRAFT_STEPS if conditions.quick else DRAFT_STEPS
    key = (conditions.model, steps, conditions.device)
    if key not in _drafts:
        config = replace(target.config, n_layers=1, sliding_window=target.config.sliding_window[:1])
        draft = Decoder(config).to(conditions.device)
        draft.load_state_dict(
            {name: value for name, value in target.state_dict().items() if name in draft.state_dict()}
        )
        batches = windows(text, DRAFT_BATCH, DRAFT_LENGTH, torch.Generator().manual_seed(0))
        on_device = (batch.to(conditions.device) for batch in batches)
        optimizer = torch.optim.AdamW(draft.parameters(), lr=DRAFT_RATE)
        train(draft, optimizer, on_device, steps, schedule=lambda done: 1 - done)
        _drafts[key] = draft.eval()
    return _drafts[key]


@torch.no_grad()
def _costs(
    draft: nn.Module | None, target: Decoder, prompts: Tensor, widths: set[int]
) -> tuple[float, dict[int, float]]:
    """Time of calls behind a prompt over that of a target's call over one token: medians of nine, in turn.

    Args:
        draft: one that is no decoder says by `as_decoder(target)` what a call of it is.
        target: the model.
        prompts: `[batch, time]`.
        widths: tokens of a row that the target is to read in a call, those of a tree as if they were a chain.

    Returns:
        Of a draft's call over one token; of the target's calls, by their width.
    """
    guesser = draft if isinstance(draft, Decoder) else getattr(draft, "as_decoder", lambda model: model)(target)
    ways, time = sorted({1, *widths}), prompts.shape[1]
    calls = [(guesser, 1), *((target, width) for width in ways)]
    caches, seconds = [FullCache(reserve=time + width) for _, width in calls], [[0.0] * TIMED for _ in calls]
    for (model, _), cache in zip(calls, caches, strict=True):
        model(prompts, cache)
    for i in range(TIMED):
        for (model, width), cache, taken in zip(calls, caches, seconds, strict=True):
            new = prompts[:, -1:].expand(-1, width)
            start = clock(prompts.device)
            model(new, cache)
            taken[i] = clock(prompts.device) - start
            cache.truncate(time)
    of_draft, one, *more = (statistics.median(taken) for taken in seconds)
    return of_draft / one, {width: taken / one for width, taken in zip(ways, (one, *more), strict=True)}
