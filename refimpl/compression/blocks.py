r"""The blocks of a model: where they are, and how to keep some of them.

Blocks are the layers of a transformer in the sense of the papers: modules of one class in one `torch.nn.ModuleList`, run one
after the other (`layers` of `refimpl.model`, `model.layers` of Llama, `model.decoder.layers` of OPT, `transformer.h` of GPT-2).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from refimpl.model.config import Config

INDICES = ("layer", "layer_idx", "layer_id")  # what modules call their place, by which a cache knows them


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every list of modules of one class that have parameters, by name; lists inside of others left out."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        alike = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        if alike and not inside and next(module.parameters(), next(module.buffers(), None)) is not None:
            found[name] = cast(nn.ModuleList, module)
    return found


def find_blocks(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The model's blocks and the name of their list.

    Args:
        model: any module.
        name: the list's, where the model has several.

    Raises:
        ValueError: there is no list of blocks, there are several and none is named, or the name is none of theirs.

    Examples:
        >>> model = nn.Module()
        >>> model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> find_blocks(model)[0]
        'layers'
    """
    found = block_lists(model)
    if not found:
        raise ValueError(
            "the model has no blocks: no torch.nn.ModuleList of modules of one class; a model without one can't be "
            "shortened"
        )
    if name is None and len(found) > 1:
        raise ValueError(f"the model has several lists of blocks, {sorted(found)}: name one by `blocks`")
    if name is not None and name not in found:
        raise ValueError(f"blocks={name!r} is no list of blocks of the model; it has {sorted(found)}")
    chosen = next(iter(found)) if name is None else name
    return chosen, found[chosen]


def keep_blocks(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Keep some blocks of a model and drop the others, in place.

    Blocks get the places that they now have, so that a cache holds one entry for each; the configuration says their number.

    Args:
        model: `refimpl.model`'s decoder, or one of transformers; configurations of other libraries stay as they are.
        name: of the list of blocks, as `find_blocks` gives it.
        kept: places of those to keep, in rising order.
    """
    parent, _, child = name.rpartition(".")
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    before = len(blocks)
    remaining = [blocks[place] for place in kept]
    for new, (old, block) in enumerate(zip(kept, remaining, strict=True)):
        for module in block.modules():
            for attribute in INDICES:
                if vars(module).get(attribute) == old:
                    setattr(module, attribute, new)
    setattr(model.get_submodule(parent), child, nn.ModuleList(remaining))
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    owners: list[Any] = above + [module for block in remaining for module in block.modules()]
    done: set[int] = set()
    for owner in owners:
        config = getattr(owner, "config", None)
        if config is not None and id(config) not in done:
            done.add(id(config))
            if isinstance(config, Config):
                windows = tuple(config.sliding_window[place] for place in kept)
                owner.config = dataclasses.replace(config, n_layers=len(kept), sliding_window=windows)
            else:
                _shorten(config, before, kept)


def _shorten(config: Any, before: int, kept: Sequence[int]) -> None:
    """Write into a configuration of transformers how many blocks are left; lists with an entry for each lose theirs."""
    if getattr(config, "num_hidden_layers", None) != before:
        return
    config.num_hidden_layers = len(kept)
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == before:
            setattr(config, key, [value[place] for place in kept])
