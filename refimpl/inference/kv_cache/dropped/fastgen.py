r"""FastGen: each head keeps as much as its attention over the prompt calls for, by a policy of its own.

Source: `fastgen` (arXiv 2310.01801), Algorithms 1 and 2, Sections 3.3 and 3.4, ratios and thresholds of Section 5.1. The authors' repository,
machilusZ/FastGen@fb707b6b883b06087b2e828c7c26be3ae295e8f0, has no code and points to a reproduction,
AnswerDotAI/cold-compress@15bb3005c5661e0d97e295c71c6e5fced1a863cc, cache.py (`KVCacheHybrid`). When the prompt is over, each key
head gets the first policy of the ladder that recovers enough (see `head_policies`) and drops what that does not keep. Afterwards
each keeps to it: special tokens and punctuation that come are kept by all policies that keep them; the window, a share of the
prompt's length, moves on; of the tokens still held those stay that have received the most attention so far, a share of the length
so far, which grows.

Differs from the paper: the first tokens count as special, since not every model's text begins with one that is; see
`head_policies` for a query's own token and for heads that share keys. Differs from the reproduction: a union is one of sets, so
that a frequent token within the window counts once; what tokens have received is summed, and not averaged over the queries.

Which tokens are special or punctuation is told by their ids. A decoder tells a cache its tokens before its first layer; of tokens
that come without ids, as embeddings do, none but the first are special.

Prompts read in chunks: all is kept until `compress_prefill`, queries too, and the choice is that of the prompt read at once. Heads hold
entries of their own, in flat tensors; what a step attends to is set side by side for as long as it takes. Without a call of
`compress_prefill` nothing is dropped.

Not here: a kernel for ragged heads; special strings of more than one token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.kv_cache.dropped.attention_scores import attention_blocks
from refimpl.inference.kv_cache.dropped.head_policies import (
    FREQUENT,
    FULL,
    LOCAL,
    PUNCTUATION,
    cheapest,
    most,
    recovered,
)
from refimpl.inference.kv_cache.dropped.ragged_tokens import RaggedTokens
from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.inference.kv_cache.protocol import LayerCache
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.config import Config

UNSEEN = 2**30  # position of what fills up shorter heads, behind all queries


@dataclass(frozen=True, kw_only=True)
class FastGen:
    """A cache whose heads choose by the prompt what they keep.

    Args:
        recovery: T, share of a head's attention that what is kept must leave it, 0 to 1.
        special: ids of special tokens.
        punctuation: ids of punctuation tokens.
        local: r_l, the window over the prompt's length, 0 to 1.
        frequent: r_f, tokens kept for the attention they have received, over the length so far, 0 to 1.
        first: first tokens that count as special, for the one that begins the texts of the paper's models; the count is ours.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=40)
        >>> cache, x = FastGen().cache(config), torch.zeros(1, 2, 10, 4)
        >>> x[:, 0, 0] = 9.0  # the first head looks at the first token, the second at all alike
        >>> whole = cache.update(0, x, x, x + 1.0, torch.arange(10)[None])
        >>> cache.compress_prefill()
        >>> cache.update(0, *[x[:, :, 1:2]] * 3, torch.tensor([[10]]))[2].tolist()
        [[[0, -1, -1, -1, -1, -1, -1, -1, -1, -1, 10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]]
    """

    recovery: float = 0.95
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    local: float = 0.3
    frequent: float = 0.3
    first: int = 1

    def __post_init__(self) -> None:
        for name, said in (("recovery", "0.91 to 0.98"), ("local", "0.3"), ("frequent", "0.3")):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 to 1; the paper's is {said}")
        if self.first < 0:
            raise ValueError(f"first={self.first} must be at least 0")
        for name in ("special", "punctuation"):
            ids = tuple(getattr(self, name))
            if any(not isinstance(token, int) or token < 0 for token in ids):
                raise ValueError(f"{name}={ids} must be ids of tokens, whole numbers from 0 on")
            object.__setattr__(self, name, ids)  # YAML has lists

    def cache(self, config: Config) -> "FastGenCache":
        """An empty cache."""
        return FastGenCache(self, config)


class FastGenCache(LayeredCache):
    """A `LayeredCache` that is told its tokens."""

    def __init__(self, method: FastGen, config: Config) -> None:
        self.method, self.windows, self.told = method, config.sliding_window, _Told()
        super().__init__(lambda layer: _Layer(method, self.windows[layer], self.told, None))

    def read(self, tokens: Tensor) -> None:
        """The tokens `[batch, time]` that each layer will hand over next."""
        special, punctuation = (
            torch.tensor(ids, device=tokens.device) for ids in (self.method.special, self.method.punctuation)
        )
        self.told.kinds = torch.stack((torch.isin(tokens, special), torch.isin(tokens, punctuation)), dim=1)

    def reset(self) -> None:
        """Forget everything, and free it."""
        super().reset()
        self.told.kinds = None

    def update(
        self, layer: int, k: Tensor, v: Tensor, queries: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in a layer's new keys and values; see `Cache.update`. After the last layer the tokens are forgotten."""
        found = super().update(layer, k, v, queries, positions)
        if layer == len(self.windows) - 1:
            self.told.kinds = None
        return found

    def policies(self, layer: int) -> Tensor:
        """What the key heads of a layer do, `[batch, kv_heads]`, SPECIAL to FULL of `head_policies`.

        Raises:
            ValueError: there was no prompt yet.
        """
        found = [state.policy for state in self._layers.get(layer, []) if isinstance(state, _Layer)]
        if not found or any(policy is None for policy in found):
            raise ValueError("heads have no policy before a prompt is read and `compress_prefill` called")
        every = torch.cat([policy for policy in found if policy is not None])
        rows = [part.rows for part in self._parts if part.rows is not None]
        return every[torch.cat(rows).argsort()] if rows else every

    def _states(self, layer: int) -> list[LayerCache]:
        return [_Layer(self.method, self.windows[layer], self.told, part.rows) for part in self._parts]


@dataclass
class _Told:
    """Which tokens of the present call are special, and which punctuation, `[batch, 2, time]`; None if nobody said."""

    kinds: Tensor | None = None


class _Layer:
    """The prompt, until it is over; then what each head keeps of the text."""

    def __init__(self, method: FastGen, window: int | None, told: _Told, rows: Tensor | None) -> None:
        self.method, self.window, self.told, self.rows = method, window, told, rows
        self.prompt: list[Tokens] = [Tokens() for _ in range(4)]  # keys, values, queries, kinds
        self.policy: Tensor | None = None  # [rows, kv_heads]
        self.local = 0
        self.held = RaggedTokens()  # keys, values, positions, attention received, whether it stays whatever comes

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """All that is held and the new tokens; after the prompt each head then drops what its policy does not keep."""
        kinds = self._kinds(k, start)
        if self.policy is None:
            for held, new in zip(self.prompt, (k, v, queries, kinds), strict=True):
                held.append(new)
            return self.prompt[0].all(), self.prompt[1].all(), None
        end = start + k.shape[2]
        (keys, values, at, received, lasting), there = self.held.padded()
        new = torch.arange(start, end, dtype=torch.int32, device=k.device).expand(*k.shape[:3])
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        at = torch.cat((at.masked_fill(~there, UNSEEN), new), dim=2)
        received = torch.nn.functional.pad(received, (0, k.shape[2]))
        lasting = torch.cat((lasting, self._lasting(kinds)), dim=2)
        if bool(((self.policy == FREQUENT) | (self.policy == LOCAL)).any()):
            for weights in attention_blocks(queries, keys, at, start, end if self.window is None else self.window):
                received += weights.sum(dim=(2, 3))
        self._hold([keys, values, at, received, lasting], at < end, end)
        return keys, values, at.long().masked_fill(at == UNSEEN, -1)

    def compress_prefill(self) -> None:
        """Choose each head's policy, and drop what it does not keep; later calls find no prompt, and do nothing."""
        if self.policy is not None or not self.prompt[0].length:
            return
        method, (keys, values, queries, kinds) = self.method, (held.all() for held in self.prompt)
        n = keys.shape[2]
        self.local = int(method.local * n + 0.5)
        special, punctuation = kinds.unbind(dim=1)
        shares, received = recovered(queries, keys, special, punctuation, self._frequent(n), self.local, self.window)
        self.policy, self.prompt = cheapest(shares, method.recovery), []
        at = torch.arange(n, dtype=torch.int32, device=keys.device).expand(*keys.shape[:3])
        lasting = self._lasting(kinds)
        self._hold([keys, values, at, received, lasting], torch.ones_like(lasting), n)

    def _hold(self, entries: list[Tensor], there: Tensor, end: int) -> None:
        """Of entries that are there, those that the policies keep after `end` tokens of text."""
        *_, at, received, lasting = entries
        policy = torch.as_tensor(self.policy).unsqueeze(2)
        frequent = most(received.masked_fill(~there, float("-inf")), self._frequent(end))
        stay = lasting | ((policy >= FREQUENT) & frequent) | ((policy >= LOCAL) & (at >= end - self.local))
        self.held.hold(entries, stay & there)

    def _frequent(self, length: int) -> int:
        """Tokens that are kept for the attention they have received."""
        return int(self.method.frequent * length + 0.5)

    def _lasting(self, kinds: Tensor) -> Tensor:
        """What heads keep for what it is, `[rows, kv_heads, time]`, of kinds `[rows, 2, time]`."""
        policy, (special, punctuation) = torch.as_tensor(self.policy).unsqueeze(2), kinds.unsqueeze(2).unbind(dim=1)
        return special | ((policy >= PUNCTUATION) & punctuation) | (policy == FULL)

    def _kinds(self, k: Tensor, start: int) -> Tensor:
        """Which of new tokens are special, and which punctuation, `[rows, 2, time]`."""
        time, told = k.shape[2], self.told.kinds
        kinds = torch.zeros(len(k), 2, time, dtype=torch.bool, device=k.device)
        if told is not None:
            kinds |= (told if self.rows is None else told[self.rows])[:, :, -time:]
        kinds[:, 0, : max(0, self.method.first - start)] = True
        return kinds
