r"""Greedy decoding of a block of sequences, layer by layer: a layer's weights are loaded once for all batches of the block.

Source: `flexgen` (arXiv 2303.06865), the section on the zig-zag block schedule, Algorithm 1; official code
FMInference/FlexGen@19753bc, flexgen/flex_opt.py (`generation_loop_overlap_multi_batch`).

Differs from the paper: the next layer's weights are loaded while one is computed; caches and activations of a batch are moved
when it is its turn. Embedding, last norm and output layer stay on the device; there they come and go as layers do. The last pass stores
its keys and values, too. A hidden state goes home between two layers, and not behind the embedding or before the output layer.

Not here: attention that the CPU computes; compression; several devices.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from refimpl.inference.system_level.design.offload_cost import Plan
from refimpl.inference.system_level.design.tiers import LINKS, Spread, SpreadWeights
from refimpl.model.model import Decoder
from refimpl.model.step import Step, positions_of


class Offloaded:
    """A model whose layers' weights are spread over device, CPU memory and disk.

    Args:
        model: gives embedding, output layer and shapes; its layers' parameters may be on the device `meta`, if `weights` is given.
        plan: shares and sizes.
        folder: for what goes to disk, empty.
        weights: of a layer, by name; None takes the model's own.

    Attributes:
        resident: bytes of the weights beside the layers', which stay on the device.
        traffic: bytes that have passed each link, by what they were: `weights`, `cache`, `activations`.
    """

    def __init__(
        self, model: Decoder, plan: Plan, folder: Path, weights: Callable[[int], Mapping[str, Tensor]] | None = None
    ) -> None:
        self.model, self.plan, self.folder = model, plan, folder
        self.traffic = {kind: Counter(dict.fromkeys(LINKS, 0)) for kind in ("weights", "cache", "activations")}
        like = model.embedding.weight
        self.resident = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
        self.homes = [
            SpreadWeights(
                dict(block.named_parameters()) if weights is None else weights(j),
                plan.weights,
                like.device,
                folder / f"layer-{j}.safetensors",
                self.traffic["weights"],
            )
            for j, block in enumerate(model.layers)
        ]
        largest = max(home.elements for home in self.homes)
        self.streamed = any(home.counts[0] < home.elements for home in self.homes)
        self.buffers = [like.new_empty(largest if self.streamed else 0) for _ in range(2)]
        self.caches: list[list[Spread]] = []  # by batch and layer, while a block runs
        self.hidden: list[Spread] = []  # by batch
        self.scratch: list[Tensor] = []  # a batch's cache and hidden state, put together
        self._turn = 0  # of the buffers

    @property
    def nbytes(self) -> tuple[int, int, int]:
        """Bytes held on the device, in CPU memory and on disk, beside the model's embedding and output layer."""
        spread = [home.nbytes for home in self.homes]
        spread += [x.nbytes for x in (*self.hidden, *(cache for batch in self.caches for cache in batch))]
        device, cpu, disk = (sum(part) for part in zip(*spread, strict=True))
        return device + sum(x.nbytes for x in (*self.buffers, *self.scratch)), cpu, disk

    @torch.no_grad()
    def run(self, tokens: Tensor, padding: Tensor, n: int) -> Generator[Tensor]:
        """Continue prompts greedily by n tokens, one pass of the model after the other.

        Args:
            tokens: `[block, time]`, padded at the left.
            padding: `[block]`.
            n: passes at most; the caller may stop before.

        Yields:
            `[block]`, the next token of each.
        """
        batches, time = torch.split(tokens, self.plan.batch), tokens.shape[1]
        paddings = torch.split(padding, self.plan.batch)
        try:
            self._open(batches, time + n - 1)
            with ThreadPoolExecutor(1) as loader:
                coming = self._load(loader, 0)
                for i in range(n):
                    passes = [
                        _Pass(self.model, batch, 0 if i == 0 else time + i - 1, pad)
                        for batch, pad in zip(batches, paddings, strict=True)
                    ]
                    for j in range(len(self.homes)):
                        parameters = coming.result()
                        last = i == n - 1 and j == len(self.homes) - 1
                        coming = coming if last else self._load(loader, (j + 1) % len(self.homes))
                        for k, one in enumerate(passes):
                            self._layer(j, k, one, parameters)
                        del parameters
                    batches = tuple(one.following for one in passes)
                    yield torch.cat(batches).squeeze(1)
        finally:
            self._close()

    def _layer(self, j: int, k: int, one: "_Pass", parameters: Mapping[str, Tensor]) -> None:
        """One layer of one batch: hidden state and cache are fetched, computed with, and brought home."""
        batch, time = one.tokens.shape
        cache, home = self.caches[k][j], self.hidden[k]
        rows, width = sum(part.shape[1] for part in cache.parts), sum(part.shape[1] for part in home.parts)
        past = cache.read(0, one.start, self.scratch[0][: one.start * rows].view(one.start, rows))
        if j == 0:
            x = self.model.embedding(one.tokens)
        else:
            x = home.read(0, time, self.scratch[1][: time * width].view(time, width))
            x = x.view(time, batch, -1).transpose(0, 1)
        config = self.model.config
        one.past = past.view(one.start, 2, batch, config.n_kv_heads, config.head_dim).permute(1, 2, 3, 0, 4)
        x = functional_call(self.model.layers[j], dict(parameters), (x, one.step))
        assert one.new is not None, "the layer has asked for its cache"
        cache.write(one.start, one.new.permute(3, 0, 1, 2, 4).reshape(time, rows))
        if j == len(self.homes) - 1:
            logits = self.model.logits(self.model.norm(x[:, -1:]))
            one.following = logits.argmax(dim=-1)
        else:
            home.write(0, x.transpose(0, 1).reshape(time, width))

    def _load(self, loader: ThreadPoolExecutor, j: int) -> "Future[dict[str, Tensor]]":
        """Weights of a layer, on their way to the buffer that the layer before does not use."""
        home = self.homes[j]
        if home.counts[0] == home.elements:
            return loader.submit(home.views, home.home[0])
        self._turn = 1 - self._turn
        return loader.submit(torch.no_grad()(home.load), self.buffers[self._turn])

    def _open(self, batches: tuple[Tensor, ...], length: int) -> None:
        """Caches and activations of a block."""
        config, like, time = self.model.config, self.model.embedding.weight, batches[0].shape[1]
        entry = 2 * config.n_kv_heads * config.head_dim
        for k, batch in enumerate(batches):
            self.caches.append([])
            for j in range(len(self.homes)):
                file = self.folder / f"cache-{k}-{j}"
                self.caches[k].append(
                    Spread(length, len(batch) * entry, self.plan.cache, like, file, self.traffic["cache"])
                )
            width, file = len(batch) * config.d_model, self.folder / f"hidden-{k}"
            self.hidden.append(Spread(time, width, self.plan.activations, like, file, self.traffic["activations"]))
        largest = len(batches[0])
        self.scratch = [like.new_empty(largest * length * entry), like.new_empty(largest * time * config.d_model)]

    def _close(self) -> None:
        for spread in (*self.hidden, *(cache for batch in self.caches for cache in batch)):
            spread.close()
        for held in (self.hidden, self.caches, self.scratch):
            held.clear()  # in place, so that who looked at it sees that it is gone


class _Pass:
    """One pass of one batch: what its layers share, and their cache (`refimpl.model.cache.Cache`)."""

    def __init__(self, model: Decoder, tokens: Tensor, start: int, padding: Tensor) -> None:
        self.tokens, self.start = tokens, start
        self.past: Tensor | None = None  # [2, batch, kv_heads, start, head_dim] of the layer to come
        self.new: Tensor | None = None  # [2, batch, kv_heads, time, head_dim], of the layer that was
        self.following = tokens
        pad = padding if bool((padding > 0).any()) else None
        positions = positions_of(start, start + tokens.shape[1], pad, tokens.device)
        rotated = model.rotary(positions, model.embedding.weight.dtype)
        self.step = Step(start, positions, *rotated, self, pad, model.score_bias)

    @property
    def length(self) -> int:
        """Tokens before these."""
        return self.start

    @property
    def nbytes(self) -> int:
        """Of what was fetched."""
        return 0 if self.past is None else self.past.nbytes

    def update(
        self,
        layer: int,  # noqa: ARG002 - the protocol's, as the last two
        k: Tensor,
        v: Tensor,
        queries: Tensor,  # noqa: ARG002
        positions: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, None]:
        """The past that was fetched, and the new behind it; see `Cache.update`."""
        assert self.past is not None
        self.new = torch.stack((k, v))
        k, v = torch.cat((self.past, self.new), dim=3)
        return k, v, None

    def compress_prefill(self) -> None:
        """Nothing: all is kept."""

    def reset(self) -> None:
        """Nothing: what was fetched is the executor's."""
