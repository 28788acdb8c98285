"""What goes on from a packed end equals the whole text under a mask, holds no more than it must, and leaves the pack as it was."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.data.prompting.compression.gist_mask import Hiding
from refimpl.data.prompting.compression.packed_prefix import Ends, GistCache, Packed
from refimpl.model.cache import STEP, FullCache
from refimpl.model.config import Config
from refimpl.model.generate import pad
from refimpl.model.model import Decoder, initialize_

PROMPTS, K = [[1, 2, 3, 4, 5, 6, 7], [8, 1, 2, 9], [3, 3, 5, 2, 6]], 2


def decoder(**shape):
    config = Config(
        **{"vocabulary": 13, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24}
        | shape
    )
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).double().eval().requires_grad_(False)


def packed(model, prompts, keep=K):
    tokens, padding = pad(prompts)
    padding = padding if padding.any() else None
    ends = Ends(keep)
    model.hidden(tokens, ends, padding)
    return Packed(ends.kept, tokens.shape[1], padding, model.config.sliding_window)


def masked(model, prompt, after, keep=K):
    """Outputs behind one prompt, of which they see the last `keep` tokens, the whole read at once."""
    n, time = len(prompt), len(prompt) + len(after)
    hides = torch.zeros(1, time, time, dtype=torch.bool)
    hides[0, n:, : n - keep] = True
    return model.hidden(torch.tensor([[*prompt, *after]]), Hiding(hides))[0, n:]


@pytest.mark.parametrize("shape", [{}, {"sliding_window": (4, None)}, {"n_kv_heads": 1, "qk_norm": True}])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_going_on_equals_the_masked_whole(shape, keep):
    """Oracle: each row's whole text at once, under a mask, without padding; read on in parts, of prompts of different lengths."""
    model, after = decoder(**shape), [10, 11, 4, 2, 7]
    pack = packed(model, PROMPTS, keep)
    cache = pack.cache()
    found = torch.cat(
        [model.hidden(torch.tensor([part] * 3), cache, pack.padding) for part in (after[:3], after[3:4], after[4:])],
        dim=1,
    )
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert_close(row, masked(model, prompt, after, keep))
    if not shape:
        assert not torch.allclose(
            found[0], masked(model, PROMPTS[0], after, 7), atol=1e-3
        )  # negative control: all is seen


def test_positions_count_on_from_the_whole_prompt():
    """Oracle: the masked whole; negative control: a cache of the same entries that counts from 0 gives something else."""
    model, after = decoder(), [10, 11]
    pack = packed(model, PROMPTS[:1])
    right, wrong = pack.cache(), pack.cache()
    assert right.length == 7
    wrong.before = 0
    expected = masked(model, PROMPTS[0], after)
    assert_close(model.hidden(torch.tensor([after]), right)[0], expected)
    assert not torch.allclose(model.hidden(torch.tensor([after]), wrong)[0], expected, atol=1e-3)


def test_no_more_is_held_than_what_is_kept():
    """Oracle: arithmetic on storages, not on views: 2 layers, keys and values, 2 heads of 8 numbers of 8 bytes; whatever the prompt's length."""
    model = decoder()
    for prompt in (PROMPTS[0], PROMPTS[0] * 30):
        pack = packed(model, [prompt])
        held = sum(x.untyped_storage().nbytes() for layer in pack.kept for x in layer)
        assert held == pack.nbytes == 2 * 2 * 2 * 8 * 8 * K
        cache = pack.cache(3)
        assert cache.nbytes == 3 * held
        model.hidden(torch.tensor([[1], [2], [3]]), cache)
        assert cache.nbytes == 3 * held // K * (K + 1 + STEP)  # the token, and room for more
        assert cache.length == len(prompt) + 1


def test_one_prompt_serves_many_requests_and_stays_as_it_was():
    """Oracle: each request alone; the packed tensors before and after."""
    model, requests = decoder(), torch.tensor([[10, 1], [4, 4], [7, 2]])
    pack = packed(model, PROMPTS[:1])
    before = [x.clone() for layer in pack.kept for x in layer]
    together = model.hidden(requests, pack.cache(3))
    for row, request in zip(together, requests, strict=True):
        assert_close(row, masked(model, PROMPTS[0], request.tolist()))
    assert all(torch.equal(a, b) for a, b in zip(before, (x for layer in pack.kept for x in layer), strict=True))
    with pytest.raises(ValueError, match="rows=2 can't share 3 prompts"):
        packed(model, PROMPTS).cache(2)


def test_it_can_go_back_and_forget():
    """Oracle: a cache that never went on; a full cache for one that forgot."""
    model = decoder()
    cache = packed(model, PROMPTS[:1]).cache()
    assert isinstance(cache, GistCache)
    model.hidden(torch.tensor([[1, 2, 3]]), cache)
    cache.truncate(8)
    assert cache.length == 8
    assert_close(model.hidden(torch.tensor([[5]]), cache)[0], masked(model, PROMPTS[0], [1, 5])[1:])
    with pytest.raises(ValueError, match="can't be gone back to"):
        cache.truncate(4)
    cache.reset()
    assert cache.length == cache.nbytes == 0
    tokens = torch.tensor([[1, 2]])
    assert_close(model.hidden(tokens, cache), model.hidden(tokens, FullCache()))


def test_ends_forget():
    ends = Ends(2)
    decoder().hidden(torch.tensor([[1, 2, 3]]), ends)
    assert ends.nbytes == 2 * 2 * 2 * 8 * 8 * 2 and ends.length == 0
    ends.compress_prefill()
    ends.reset()
    assert ends.nbytes == 0
