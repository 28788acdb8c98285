"""InfLLM: all of it written out with nothing evicted, distances and stand-ins by hand, bytes, claims."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from refimpl import testbed
from refimpl.inference.kv_cache.retrieved.infllm import InfLLM
from refimpl.model.config import Rope
from refimpl.model.generate import generate
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape
from tests.inference.kv_cache.dropped.lookup import lookup_decoder, question, share_right, text
from tests.inference.kv_cache.retrieved.written_out import stepped, turned

TOKENS = torch.randint(0, 61, (2, 60), generator=torch.Generator().manual_seed(1))
ANGLES = {"rtol": 1e-5, "atol": 1e-5}  # of positions up to 60, in float32


def written_out(model, method):
    """Every token is held; a query sees near ones where they stand, and all before but those in blocks that were not chosen."""
    sizes, layers = method.sizes, {}

    def find(layer, q, k, v, start):
        n, window = k.shape[2], model.config.sliding_window[layer] or math.inf
        state = layers.setdefault(layer, SimpleNamespace(stand_ins=[], received=torch.zeros(*q.shape[:2], 0)))
        state.received = torch.cat([state.received, state.received.new_zeros(*q.shape[:2], n - start)], dim=2)
        own, one, placed = (
            turned(model, q, range(start, n)),
            turned(model, q, [sizes.local]),
            turned(model, k, range(n)),
        )
        k = turned(model, k, [0])  # which scales them where the rotation does
        found = []
        for first in range(start, n, sizes.chunk):
            part = slice(first - start, min(first + sizes.chunk, n) - start)
            now = torch.arange(n)[start:][part]
            hidden = torch.zeros(*q.shape[:2], n, dtype=torch.bool)
            if state.stand_ins:
                worth = (torch.stack(state.stand_ins, dim=2) * one[:, :, None, part].sum(dim=3)).sum(dim=(1, 3))
                ranks = worth.argsort(dim=1, descending=True).argsort(dim=1)
                unread = (ranks >= sizes.blocks).repeat_interleave(sizes.block, dim=1)
                hidden[:, :, sizes.initial : sizes.initial + unread.shape[1]] = unread.unsqueeze(1)
            behind = now[:, None] - torch.arange(n)
            near = (behind >= 0) & (behind < sizes.local)
            scores = torch.where(near, own[:, :, part] @ placed.mT, one[:, :, part] @ k.mT) / math.sqrt(q.shape[3])
            seen = (behind >= 0) & (behind < window) & (near | ~hidden.unsqueeze(2))
            weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            found.append(weights @ v)
            state.received += (weights * near).sum(dim=2)
            while (begin := sizes.initial + len(state.stand_ins) * sizes.block) + sizes.block + sizes.local <= now[
                -1
            ] + 1:
                inside = slice(begin, begin + sizes.block)
                best = state.received[:, :, inside].argsort(dim=2, descending=True)[:, :, : method.representatives]
                state.stand_ins.append(
                    k[:, :, inside].gather(2, best[..., None].expand(*best.shape, k.shape[3])).mean(dim=2)
                )
        return torch.cat(found, dim=2)

    return find


@pytest.mark.parametrize(
    ("changes", "method", "sizes"),
    [
        ({}, {}, [40] + [1] * 20),
        ({"n_kv_heads": 1}, {"chunk": 512, "initial": 0, "representatives": 1}, [40, 1, 1, 18]),
        ({"n_kv_heads": 4, "sliding_window": (9, 22)}, {"representatives": 9}, [1] * 30 + [30]),
        ({"rope": Rope(theta=500.0, type="yarn", factor=4.0, original_max_positions=32)}, {"blocks": 0}, [50, 10]),
    ],
    ids=["shared blocks", "chunks of a window", "windows", "nothing looked up"],
)  # fmt: skip
def test_equals_the_method_written_out(changes, method, sizes):
    """Oracle: all keys held unrotated, masks for what is not seen, stand-ins taken from the whole text's keys."""
    model = decoder(**changes)
    method = InfLLM(
        **{"budget": 24, "initial": 2, "block_size": 3, "blocks": 2, "representatives": 2, "chunk": 5} | method
    )
    expected = stepped(model, TOKENS, sizes, written_out(model, method))
    assert_close(run(model, TOKENS, method.cache(model.config), sizes), expected, **ANGLES)
    assert (expected - model(TOKENS)).abs().max() > 0.1  # negative control


def test_chunks_of_one_are_token_by_token():
    """Oracle: the same text, read in calls of one token."""
    model, method = decoder(), InfLLM(budget=24, block_size=3, blocks=2, chunk=1)
    whole = run(model, TOKENS, method.cache(model.config), [60])
    assert_close(whole, run(model, TOKENS, method.cache(model.config), 1))
    assert not torch.allclose(
        whole, run(model, TOKENS, InfLLM(budget=24, block_size=3, blocks=2).cache(model.config), [60])
    )


@pytest.mark.parametrize("length", [30, 31, 50])
def test_all_distant_tokens_are_at_the_windows_length(length):
    """Oracle: by hand: keys alike, one radian a token: a near key's score is cos(distance), a far one's cos(12) however far it is."""
    config = shape(n_heads=1, n_kv_heads=1, head_dim=2)
    method = InfLLM(budget=18, initial=2, block_size=2, blocks=2, representatives=1)
    assert method.sizes.local == 12
    raw, v = torch.tensor([1.0, 0.0]).expand(1, 1, length, 2), torch.zeros(1, 1, length, 2)
    v[:, :, 1] = 1
    *_, (_, found, positions) = feed(method.cache(config), config, raw, v, [20] + [1] * (length - 20))
    far = (
        2 + 4 + (length - 1 - 2 - 12) % 2 + 1
    )  # the first, two blocks, and what did not fill one before the last token came
    near = sum(math.exp(math.cos(distance) / math.sqrt(2)) for distance in range(12))
    distant = math.exp(math.cos(12) / math.sqrt(2))
    assert positions is None
    assert_close(found[0, 0, 0], torch.full((2,), distant / (near + far * distant)), **ANGLES)


def test_stand_ins_by_hand():
    """Oracle: by hand: of a block's three keys the two that later queries look at stand for it: products are 12, -12 and 6."""
    config = shape(n_heads=1, n_kv_heads=1, head_dim=4, rope=Rope(theta=1e30))  # channels 1 and 3 do not turn
    cache = InfLLM(budget=24, initial=0, block_size=3, blocks=2, representatives=2).cache(config)
    k = torch.zeros(1, 1, 26, 4)
    k[0, 0, 0, 1], k[0, 0, 1, 3], k[0, 0, 2, 3] = 4.0, -4.0, 2.0
    cache.update(0, k, k, torch.tensor([0.0, 3.0, 0.0, 3.0]).expand(1, 1, 26, 4), torch.arange(26)[None])
    layer = cache._layers[0][0]
    assert (layer.sizes.local, layer.memory.count) == (18, 2)
    assert_close(layer.stand_ins.all()[0, 0], torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [
        (6272, (128, 128, 16, 4096, 512)),
        (6273, (128, 128, 16, 4097, 512)),
        (224, (5, 28, 2, 163, 163)),
        (12, (1, 1, 3, 8, 8)),
        (1, (0, 1, 0, 1, 1)),
    ],
)
def test_sizes_by_hand(budget, sizes):
    """Oracle: by hand; 6,272 is the official 128 + 16 * 128 + 4,096."""
    assert InfLLM(budget=budget).sizes == sizes


def test_smaller_blocks_of_a_small_budget_keep_the_official_shares():
    """Oracle: by hand: 2.0, 32.7 and 65.3 % of 224 tokens are 4.6, 73.1 and 146.3; blocks are whole, the window has the rest."""
    assert InfLLM(budget=224, block_size=16, blocks=128).sizes == (5, 16, 4, 155, 155)
    assert InfLLM(budget=224, initial=4, block_size=16, blocks=4).sizes == (4, 16, 4, 156, 156)


def test_what_lies_where(device):
    """Oracle: by hand, in tokens of 64 numbers of two bytes: 200 tokens less 2 first and 23 to 25 recent ones are in 58 blocks of three, four of which are on the device, too."""
    config = shape(n_heads=2, n_kv_heads=1)
    cache = InfLLM(budget=32, initial=2, block_size=3, blocks=2).cache(config)
    x = torch.ones(1, 1, 200, 32, dtype=torch.bfloat16, device=device)
    cache.update(0, x, x, x.expand(1, 2, 200, 32), torch.arange(200, device=device)[None])
    layer = cache._layers[0][0]
    assert (layer.memory.count, layer.keys.length, layer.first_keys.length) == (58, 24, 2)
    assert layer.memory.slots == 2 * 2  # the official 32 for 16 blocks
    token = 64 * 2
    assert 58 * 3 * token <= cache.host_bytes <= 58 * 3 * token * 17 / 16
    assert layer.memory._host.all().device.type == "cpu"
    assert layer.keys.all().device.type == layer.stand_ins.all().device.type == device.type
    room, stand_ins = 24 + 24, 58 * 2 * 32 * 2
    held = (4 * 3 + 2 + room) * token + room * 2 * 4 + stand_ins * 17 / 16 + 16 * 4
    assert cache.nbytes - cache.host_bytes <= held
    assert cache.loaded_bytes > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget=0 must be at least 1; the official 6272"),
        ({"initial": -1}, "initial=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"blocks": -1}, "blocks=-1 must be at least 0; the official 16"),
        ({"representatives": 0}, "representatives=0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        InfLLM(**change)


def test_dynamic_frequencies_are_refused():
    with pytest.raises(ValueError, match="rope type='dynamic'"):
        InfLLM().cache(shape(rope=Rope(type="dynamic", factor=2.0)))


# Claims


def remembered(blocks, apart):
    """Share of facts found at the end of a text, said `apart` tokens from each other, which were asked for soon after they were said, and not since."""
    model, facts = lookup_decoder(), [3, 8, 11]
    parts = [part for fact in facts for part in (apart, [fact, question(fact)])]
    method = InfLLM(budget=256, initial=5, block_size=16, blocks=blocks)
    return share_right(model, method.cache(model.config), text(*parts, 1000), facts, chunk=1024)


def test_claim_planted_passkey(claim):
    claim("infllm", "planted-passkey", remembered(4, 3000))


def test_claim_lookup_needed(claim):
    claim("infllm", "lookup-needed", remembered(0, 400))


@torch.no_grad()
def test_claim_passkey(claim):
    """Needles in the testbed's text, all of which the full cache finds; a quarter of the tokens is seen by each."""
    (model, tokenizer), task, scores = testbed.subject(), testbed.tasks.task("needle"), []
    for sample in testbed.tasks.samples("needle", 2, 896, torch.Generator().manual_seed(0)):
        prompt = torch.tensor([tokenizer.encode(sample.prompt).ids])
        cache, ends = InfLLM(budget=224, block_size=16, blocks=128).cache(model.config), [tokenizer.token_to_id("Ċ")]
        said = generate(model, prompt, task.ANSWER_TOKENS, stop=ends, cache=cache)[0].tolist()
        scores.append(task.score(tokenizer.decode(said).split("\n")[0], sample.answer))
    claim("infllm", "passkey", statistics.fmean(scores))


@torch.no_grad()
def test_claim_beyond_the_trained_length(claim):
    """Twice the 1,024 tokens that the testbed's model was trained on; the last 512 count."""
    model = testbed.subject().model
    tokens = torch.as_tensor(testbed.corpus.tokens("held-out")[:2049]).long()[None]
    cache, losses = InfLLM(budget=768, block_size=16, blocks=128).cache(model.config), []
    parts = [model.hidden(part, cache) for part in tokens[:, :2048].split(256, dim=1)]
    for hidden in (torch.cat(parts, dim=1), model.hidden(tokens[:, :2048])):
        losses.append(torch.nn.functional.cross_entropy(model.logits(hidden[0, 1536:]), tokens[0, 1537:]))
    claim("infllm", "beyond-the-trained-length", float((losses[0] - losses[1]).exp()))


def test_claim_device_memory(claim, generator):
    """Sizes an eighth of the official ones, for an eighth of 128K tokens."""
    config = shape(n_heads=1, n_kv_heads=1)
    cache = InfLLM(budget=784, initial=16, block_size=16).cache(config)
    k, v = draw(generator, config, 16_384)
    for _ in feed(cache, config, k, v, [1024] * 16):
        pass
    claim("infllm", "device-memory", (cache.nbytes - cache.host_bytes) / (k.nbytes + v.nbytes))
