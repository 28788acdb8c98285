r"""Lookahead decoding: Jacobi iterations on a window ahead of the text leave n-grams, which are checked in the same calls.

Source: `lookahead-decoding` (arXiv 2402.02057), the sections on the lookahead branch, the verification branch and sampling; official
code hao-ai-lab/LookaheadDecoding@eed010d, lade/decoding.py (`jacobi_greedy_search_multilevel`, `jacobi_sample_multilevel`,
`update_token_map`, `fill_pool_with_prompt`) and `jforward_multilevel` in lade/models/modeling_llama.py; W = 7, N = 5, G = 7 as in its
README.

Differs from the paper: batches. Where a whole n-gram stands, the token that the call gives behind it is taken, too (the official
code begins the next step without it). A token is drawn and looked up among the guesses, instead of accepting guesses in turn: the
distribution is the same, see `grow_and_verify`. Stop tokens do not stay in the window, which the official code sees to where it samples
alone. With `from_prompt`, n-grams of the new text are those that stand in it (the official greedy search files repetitions of its last
token where several were accepted). Random tokens of the window come from a generator of this module's, of seed 0, so that greedy
decoding needs none.

Not here: several devices; a window that jumps on by as many tokens as were accepted (off in the official code, too).
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from refimpl.inference.decoding.draft_and_verify import Rows
from refimpl.inference.decoding.grow_and_verify import Guesses, choose, follow, grow_and_verify
from refimpl.inference.decoding.protocol import Decoded, Decoding
from refimpl.inference.decoding.tree import Tree
from refimpl.model.generate import check_arguments
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class Lookahead(Decoding):
    """Guesses of the target itself, made while it decodes.

    Args:
        window: places ahead on which the iteration goes on, W.
        ngram: tokens of an n-gram, N; the window remembers N - 1 iterations.
        guesses: n-grams that are remembered for each first token, and checked at a time, G.
        from_prompt: whether n-grams of the prompt, and of the text as it grows, are remembered as well.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=5, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
        >>> target = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> decoded = Lookahead().decode(target, torch.tensor([[1, 2, 3]]), 60)  # greedy text of so small a model repeats
        >>> decoded.tokens.shape, decoded.target_calls < 30
        (torch.Size([1, 60]), True)
    """

    window: int = 7
    ngram: int = 5
    guesses: int = 7
    from_prompt: bool = False

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ngram", 2), ("guesses", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def decode(
        self,
        target: Decoder,
        tokens: Tensor,
        n: int,
        *,
        draft: nn.Module | None = None,  # noqa: ARG002 - the target guesses for itself
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop: Collection[int] = (),
        padding: Tensor | None = None,
    ) -> Decoded:
        """Continue prompts by up to n tokens; see `protocol.Decoding.decode`.

        Args:
            target: the model whose distribution the tokens follow.
            tokens: `[batch, time]`, the prompts, padded at the left.
            n: new tokens, 1 or more.
            draft: not used.
            temperature: 0 is greedy; the window's own tokens are always the likeliest.
            generator: source of the draws, on the model's device; needed if temperature is not 0.
            stop: tokens that end a row.
            padding: `[batch]`, tokens of left padding in each row.

        Raises:
            ValueError: an argument outside its range.
        """
        check_arguments(target, tokens, n, temperature, generator, padding)
        grower = _Window(self, target, tokens, padding, stop)
        rule = partial(follow, choose=partial(choose, target, temperature=temperature, generator=generator))
        return grow_and_verify(target, tokens, n, grower, rule, stop=stop, padding=padding)


class _Window:
    """The 2D window of each row, and the n-grams that it left.

    Place (l, j) of the window stands l + j behind a row's last token, which is place (0, 0). It sees the places (0, 0) to (0, j)
    and (1, j) to (l, j): level l holds what the target said of level l - 1, one iteration later.

    Args:
        settings: of the method.
        target: whose likeliest tokens fill the window.
        tokens: `[batch, time]`, the prompts.
        padding: theirs.
        stop: tokens that the window does not keep: what follows the end of a text tells nothing.
    """

    calls = 0

    def __init__(
        self, settings: Lookahead, target: Decoder, tokens: Tensor, padding: Tensor | None, stop: Collection[int]
    ) -> None:
        self.settings, self.target, self.prompt = settings, target, tokens.shape[1]
        self.stops = torch.tensor(sorted(stop), device=tokens.device)
        self.generator = torch.Generator().manual_seed(0)
        self.padding = torch.zeros(len(tokens), dtype=torch.int64) if padding is None else padding.cpu()
        self.pools: list[dict[int, list[tuple[int, ...]]]] = [{} for _ in tokens]
        self.known = self.padding.clone()  # how far the text's own n-grams are in the pool
        lengths = torch.full((len(tokens),), tokens.shape[1])
        first = self._random(tokens, lengths, settings.window + settings.ngram - 2)
        self.window = first[:, None]  # [b, levels, columns]

    def propose(self, rows: Rows) -> Guesses:
        """The window, and behind the last token the n-grams that began with it, once the window is full and the prompt is read."""
        last = rows.last(1)
        self.window = torch.cat((torch.cat((last, self.window[:, 0, 1:]), dim=1)[:, None], self.window[:, 1:]), dim=1)
        if self.settings.from_prompt:
            self._remember_text(rows)
        levels, columns = self.window.shape[1:]
        found: list[list[tuple[int, ...]]] = [[] for _ in self.pools]
        # With the prompt only the window is read, a chain: n-grams are a tree, and who sees whom grows with the square of its length.
        if levels == self.settings.ngram - 1 and int(rows.lengths.max()) > self.prompt:
            found = [pool.get(token, []) for pool, token in zip(self.pools, last[:, 0].tolist(), strict=True)]
        most, length = max(map(len, found)), self.settings.ngram - 1
        grams = torch.zeros(len(found), most, length, dtype=torch.int64)
        for row, some in enumerate(found):
            if some:
                grams[row, : len(some)] = torch.tensor(some)
        there = torch.arange(most) < torch.tensor([[len(some)] for some in found])
        tokens = torch.cat((self.window.flatten(1), grams.flatten(1).to(last.device)), dim=1)
        open_ = torch.zeros_like(tokens, dtype=torch.bool)
        open_[:, levels * columns :] = there.repeat_interleave(length, dim=1).to(last.device)
        return Guesses(_tree(levels, columns, most, length, last.device), tokens, open_)

    def learn(self, rows: Rows, guesses: Guesses, hidden: Tensor, path: Tensor, kept: Tensor) -> None:  # noqa: ARG002
        """One iteration on: what the target says behind the newest level is the next, and ends as many n-grams."""
        levels, columns = self.window.shape[1:]
        newest = hidden[:, (levels - 1) * columns : levels * columns]
        window = torch.cat((self.window, self.target.logits(newest).argmax(dim=-1)[:, None]), dim=1)
        if levels < self.settings.ngram - 1:
            self.window = window[:, :, 1:]
        else:
            for pool, grams in zip(self.pools, window.transpose(1, 2).tolist(), strict=True):
                self._remember(pool, grams)
            self.window = window[:, 1:]
        ends = torch.isin(self.window[:, -1], self.stops)
        if bool(ends.any()):
            fresh = self._random(rows.text, rows.lengths, self.window.shape[2])
            self.window[:, -1] = torch.where(ends, fresh, self.window[:, -1])

    def _random(self, text: Tensor, lengths: Tensor, count: int) -> Tensor:
        """Tokens drawn from each row's text, `[batch, count]`."""
        share = torch.rand(len(text), count, generator=self.generator)
        places = self.padding[:, None] + (share * (lengths - self.padding)[:, None]).long()
        return text.gather(1, places.to(text.device))

    def _remember(self, pool: dict[int, list[tuple[int, ...]]], grams: list[list[int]]) -> None:
        """Put n-grams into a row's pool under their first tokens; of each, the last G that were seen stay."""
        for first, *rest in grams:
            held, gram = pool.setdefault(first, []), tuple(rest)
            if gram in held:
                held.remove(gram)
            elif len(held) == self.settings.guesses:
                del held[0]
            held.append(gram)

    def _remember_text(self, rows: Rows) -> None:
        """Put the text's own n-grams into the pools, those that have come since the last time."""
        size = self.settings.ngram
        for row, length in enumerate(rows.lengths.tolist()):
            new = rows.text[row, int(self.known[row]) : length].tolist()
            grams = [new[i : i + size] for i in range(len(new) - size + 1)]
            self._remember(self.pools[row], grams)
            self.known[row] += len(grams)


@cache
def _tree(levels: int, columns: int, grams: int, length: int, device: torch.device) -> Tree:
    """The window's first level is a chain, the others stand on it column by column; each n-gram is a chain behind the root."""
    window = [i - 1 if i < columns else i - columns for i in range(levels * columns)]
    chains = [0 if i % length == 0 else levels * columns + i - 1 for i in range(grams * length)]
    return Tree.of([*window, *chains], device)
