r"""Layers of a block that share the factors of their input channels: who makes that input, and whose output judges the factors.

Source: `awq` (arXiv 2306.00978), Section 3.2; official code mit-han-lab/llm-awq@d6e797a42b9ef7778de8ee2352116e0f48a78d61,
awq/quantize/auto_scale.py (`auto_scale_block`).

Differs from the paper: what a norm feeds is judged by the attention or the feed-forward that reads it, as in the official code; where
that is the block itself (OPT's feed-forward), by the layer. Where the official code has no GPT-2, its rules for the like are taken (MPT,
BigCode): values scale the output layer, and the input of the last layer, which no operator can absorb behind a GELU, is divided at run
time. With grouped heads, where several columns of the output layer read one value, that layer keeps its scale, as in the official code.

Not here: other architectures.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from refimpl.compression.anatomy import BlockParts, Feed, feeds
from refimpl.compression.block_inputs import Given, without_cache
from refimpl.model.linear import linear_at, sizes

Calls = dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]  # what modules are called with, by name, batch by batch


@dataclass(frozen=True, eq=False)
class Scaling:
    """Layers that share their factors.

    Attributes:
        feed: who makes their input, and how it reaches them; its producer is empty where nothing can take the factors.
        around: name of the module whose output judges the factors; None: the one layer does.
    """

    feed: Feed
    around: str | None


def scalings(model: nn.Module, part: BlockParts, name: str) -> Iterator[Scaling]:
    """The scalings of a block, in the order in which data reaches the layers.

    Args:
        model: that of the block.
        part: the block's parts.
        name: of the block.
    """
    for feed in feeds(model, part):
        if len(torch.unique(feed.source)) == len(feed.source):  # with grouped heads, several columns read one value
            parent = feed.consumers[0].rpartition(".")[0]
            by_norm = feed.producer in (part.attention_norm, part.feed_forward_norm)
            yield Scaling(feed, parent if by_norm and parent != name else None)
    if not part.scales_through:
        yield Scaling(Feed("", (part.down,), torch.arange(sizes(linear_at(model, part.down))[1])), None)


def calls_of(model: nn.Module, name: str, watched: Iterable[str], given: list[Given]) -> Calls:
    """What modules of a block are called with.

    Args:
        model: that of the block.
        name: of the block.
        watched: names of the modules.
        given: what the block is called with, as `block_inputs` gives it.
    """
    calls: Calls = {path: [] for path in watched}

    def watch(path: str) -> Any:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[path].append((args, {key: without_cache(value) for key, value in kwargs.items()}))

        return note

    with ExitStack() as hooks:
        for path in calls:
            hooks.enter_context(model.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True))
        for x, _, args, kwargs in given:
            model.get_submodule(name)(x, *args, **kwargs)
    return calls
