"""Requests to serve, what each is answered alone, and a look at the memory from outside."""

import torch

from refimpl.inference.system_level.protocol import Request
from refimpl.model.generate import generate

SHAPES = [(5, 7, 0), (1, 1, 0), (23, 3, 0), (3, 9, 1), (6, 9, 1), (6, 12, 2), (2, 4, 60)]  # prompt, n, arrival


def trace(generator, shapes=SHAPES, common=0):
    """Requests of these shapes; prompts begin with the same tokens, as far as they are that long."""
    preamble = torch.randint(61, (common,), generator=generator).tolist()
    return [
        Request(
            prompt=(*preamble, *torch.randint(61, (length,), generator=generator).tolist())[:length], n=n, arrival=at
        )
        for length, n, at in shapes
    ]


def alone(model, request):
    """Its answer by `generate`."""
    return generate(model, torch.tensor([request.prompt]), request.n, stop=request.stop)[0].tolist()


def tensors(thing, seen=None):
    """All tensors inside containers and objects, each storage once: address to bytes."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return {}
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()}
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, list | tuple | set):
        parts = list(thing)
    else:
        parts = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    found = {}
    for part in parts:
        found |= tensors(part, seen)
    return found


def common(one, other):
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
