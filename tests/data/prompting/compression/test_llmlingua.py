"""LLMLingua: which tokens stay by reading everything anew, parts with budgets of their own, and what the paper claims."""

import pytest
import torch

from refimpl.data.prompting.compression.llmlingua import DEMONSTRATIONS as DEMONSTRATION
from refimpl.data.prompting.compression.llmlingua import ByPerplexity, LLMLingua, paragraphs
from refimpl.data.prompting.compression.protocol import most, portions
from refimpl.data.prompting.compression.selective_context import SelectiveContext
from refimpl.data.prompting.compression.self_information import beginning
from refimpl.testbed import corpus, tasks
from refimpl.testbed.pairs import told
from refimpl.testbed.tokenizer import tokenizer

TIMES = 5
DEMONSTRATIONS = [
    "- Anna lives in Rome.\n- Leo drinks tea.",
    "import os, sys",
    "def main(path):\n    print(path)",
    "class Table:",
]


def information(model, before, tokens):
    """-log p of each token, everything read anew in one forward without a cache."""
    logits = model(torch.tensor([[*before, *tokens]]))[0, len(before) - 1 : -1]
    return -logits.double().log_softmax(-1)[range(len(tokens)), tokens]


def by_reading_anew(model, tokens, size, quotas):
    """Algorithm 2 without a cache: each segment after the start and all that was kept before."""
    before, kept = beginning(tokenizer()), []
    for first, quota in zip(range(0, len(tokens), size), quotas, strict=True):
        segment = tokens[first : first + size]
        chosen = most(information(model, before, segment), quota).tolist()
        kept += [first + i for i in chosen]
        before = before + [segment[i] for i in chosen]
    return kept


@pytest.mark.parametrize(("segment", "budget"), [(7, 30), (10, 5), (33, 60), (100, 12)])
def test_iterative_compression_by_reading_anew(tiny, segment, budget):
    """Oracle: every segment read after what was kept, by a forward without a cache; sizes do not divide, some keep nothing of a segment."""
    text = "\n".join(DEMONSTRATIONS) * 2
    tokens = tokenizer().encode(text).ids
    lengths = [len(tokens[i : i + segment]) for i in range(0, len(tokens), segment)]
    quotas = portions(lengths, budget)
    found = LLMLingua(segment=segment).compressor(tokenizer(), tiny).compress([text], [budget])[0]
    assert found.kept.tolist() == by_reading_anew(tiny, tokens, segment, quotas)
    if len(lengths) > 2:  # negative control: it matters what the segments are judged after
        once = information(tiny, beginning(tokenizer()), tokens).split(lengths)
        plain = [
            a * segment + i for a, (x, q) in enumerate(zip(once, quotas, strict=True)) for i in most(x, q).tolist()
        ]
        assert found.kept.tolist() != plain


def test_demonstrations_go_whole_by_perplexity(tiny):
    """Oracle: Algorithm 1 by hand on perplexities read one by one: in falling order until twice the budget is passed."""
    text = "\n\n".join(DEMONSTRATIONS)
    parts = paragraphs(text)
    assert "".join(parts) == text and len(parts) == 4
    starts = beginning(tokenizer())
    rows = [tokenizer().encode(part).ids for part in parts]
    assert [token for row in rows for token in row] == tokenizer().encode(text).ids
    ranked = sorted(range(4), key=lambda i: -information(tiny, starts, rows[i]).mean())
    budget, stays, used = 8, set(), 0  # by their sums, and not their means, others would stay
    for i in ranked:
        if used > 2 * budget:
            break
        stays, used = stays | {i}, used + len(rows[i])
    assert 0 < len(stays) < 4
    place = [i for i, row in enumerate(rows) for _ in row]
    found = LLMLingua().compressor(tokenizer(), tiny).compress([text], [budget])[0]
    assert {place[i] for i in found.kept.tolist()} <= stays
    wide = LLMLingua(coarse=100.0, segment=8).compressor(tokenizer(), tiny).compress([text], [budget])[0]
    assert not {place[i] for i in wide.kept.tolist()} <= stays  # negative control: with more room others stay too


@pytest.mark.parametrize("segment", [9, 100])
def test_parts_have_rates_of_their_own(tiny, segment):
    """Oracle: counting, by Eq. (2): 0.85 of the instruction, 0.9 of the question, the rest from the demonstrations, in segments that reach
    over parts, too."""
    instruction, question = "Read what is told of people, and answer.", "Question: Where does Anna live?\nAnswer:"
    made = LLMLingua(segment=segment).compressor(tokenizer(), tiny)
    whole = made.compress_parts(instruction, DEMONSTRATIONS, question, 10**6)
    assert tokenizer().decode(whole.ids.tolist()) == "\n\n".join([instruction, *DEMONSTRATIONS, question])
    first = len(tokenizer().encode(instruction + "\n\n").ids)
    last = len(tokenizer().encode(question).ids)
    ins, que = round(0.85 * first), round(0.9 * last)
    found = made.compress_parts(instruction, DEMONSTRATIONS, question, ins + que + 11)
    kept, n = found.kept, len(found.tokens)
    counts = [int((kept < first).sum()), int((kept >= n - last).sum())]
    assert counts == [ins, que] and len(kept) == ins + que + 11
    whole = LLMLingua(instruction_rate=1.0, question_rate=1.0).compressor(tokenizer(), tiny)
    text = tokenizer().decode(
        whole.compress_parts(instruction, DEMONSTRATIONS, question, first + last + 5).ids.tolist()
    )
    assert text.startswith(instruction + "\n\n") and text.endswith(question)


def test_parts_may_be_empty(tiny):
    """Oracle: `compress` on the demonstrations joined, and counting."""
    made = LLMLingua().compressor(tokenizer(), tiny)
    alone = made.compress_parts("", DEMONSTRATIONS, "", 9)
    assert alone.kept.tolist() == made.compress(["\n\n".join(DEMONSTRATIONS)], [9])[0].kept.tolist()
    assert len(made.compress_parts("Answer the question, please", [], "Where is it?", 15).kept) == 15
    assert made.compress_parts("", [], "", 3).ids.tolist() == []


def test_what_parts_demonstrations_may_stay(tiny):
    """Oracle: by hand: the six line breaks between four demonstrations are kept, and of seven tokens none is inside one or after the
    last; without the rule some go, and the last, which surprises, stays."""
    between, inside = {12, 13, 18, 19, 32, 33}, {6, 26, 38}
    demonstrations = [*DEMONSTRATIONS[:-1], DEMONSTRATIONS[-1] + "\n"]
    text = "\n\n".join(demonstrations)
    assert {i for i, t in enumerate(tokenizer().encode(text).tokens) if t == "Ċ"} == between | inside
    kept, plain = (
        set(made.compress_parts("", demonstrations, "", 7).kept.tolist())
        for made in (LLMLingua(keep_split=keeps, coarse=100.0).compressor(tokenizer(), tiny) for keeps in (True, False))
    )
    assert between <= kept and not inside & kept
    assert not between <= plain and 38 in plain


def test_texts_cut_after_empty_lines():
    """Oracle: by hand."""
    assert paragraphs("") == [] and paragraphs("a") == ["a"] and paragraphs("\n") == ["\n"]
    assert paragraphs("a\n\nb\n\n") == ["a\n\n", "b\n\n"]
    assert "".join(paragraphs("\n\n\na\n\n\n\nb")) == "\n\n\na\n\n\n\nb"


def test_tokens_read_are_those_of_the_papers_cost(tiny, monkeypatch):
    """Oracle: Eq. (9) by counting: L for the perplexities, what the coarse step leaves, and what is kept, but for the last segment's part."""
    read, real = [], type(tiny).hidden
    monkeypatch.setattr(
        type(tiny), "hidden", lambda self, tokens, *a, **k: read.append(tokens.numel()) or real(self, tokens, *a, **k)
    )
    text = "\n".join(DEMONSTRATIONS)  # one demonstration, so that the coarse step leaves all
    n = len(tokenizer().encode(text).ids)
    kept = LLMLingua(segment=10).compressor(tokenizer(), tiny).compress([text], [n // 3])[0].kept
    before_last = int((kept < (n - 1) // 10 * 10).sum())
    assert read[0] == n + 1  # with a line break before
    assert sum(read[1:]) == n + 1 + before_last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment": 0}, "segment=0 must be at least 1 token; the paper uses 100"),
        ({"instruction_rate": 1.2}, r"instruction_rate=1.2 must be in \[0, 1\]"),
        ({"question_rate": float("nan")}, r"question_rate=nan must be in \[0, 1\]"),
        ({"coarse": 0.5}, "coarse=0.5 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LLMLingua(**change)


def test_budgets_are_checked(tiny):
    made = LLMLingua().compressor(tokenizer(), tiny)
    assert isinstance(made, ByPerplexity)
    with pytest.raises(ValueError, match="budget=0 must be at least 1 token"):
        made.compress_parts("a", [], "b", 0)
    with pytest.raises(ValueError, match=r"instruction and question keep at rates of 0\.85 and 0\.9"):
        made.compress_parts("Read what is told and answer.", ["import os"], "Where does Anna live?", 3)


@pytest.fixture(scope="module")
def left(asked):
    """What is left of each context at a fifth of the tokens: by LLMLingua, judging all at once, and by Selective Context."""
    methods = LLMLingua(), LLMLingua(segment=asked.model.config.max_positions), SelectiveContext()
    return [asked.left(method.compressor(asked.tokenizer, asked.model), TIMES) for method in methods]


def test_claim_beats_selective_context(asked, left, claim):
    """Logarithm of a right token's probability less that after Selective Context; with the whole contexts it is near 0."""
    assert asked.likelihood([torch.arange(n) for n in asked.lengths]) > -0.1
    claim("llmlingua", "beats-selective-context", asked.likelihood(left[0]) - asked.likelihood(left[2]))


def test_claim_iterative(asked, left, claim):
    """Score less that where all tokens are judged in one segment."""
    claim("llmlingua", "iterative", asked.score(left[0]) - asked.score(left[1]))


def share_told(asked, left):
    """Share kept of the tokens in lines that tell what questions may be about."""
    kept = total = 0
    for text, stays in zip(asked.contexts, left, strict=True):
        tells = torch.tensor([told(line.rstrip("\n")) for line in text.splitlines(keepends=True) for _ in line])
        mine = torch.tensor([bool(tells[b - 1]) for _, b in asked.tokenizer.encode(text).offsets])
        kept, total = kept + int(mine[stays].sum()), total + int(mine.sum())
    return kept / total


def test_claim_keeps_what_is_told(asked, left, claim):
    """Share kept of what is told, over Selective Context's."""
    claim("llmlingua", "keeps-what-is-told", share_told(asked, left[0]) / share_told(asked, left[2]))


def test_claim_iterative_planted(asked, claim):
    """Seven words are told among random tokens, which are more surprising, and again among code: share kept, less that of one segment."""
    text, shares = corpus.tokens("held-out", 5000), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        (needle,) = tasks.samples("needle", 1, 120, generator)
        phrase = asked.tokenizer.encode(f"The pass phrase of Anna is:{needle.answer}\n").ids
        more = 100 - len(phrase)
        noise, code = torch.randint(300, 2048, (more,), generator=generator), text[500 + 700 * seed :][:more]
        tokens = torch.cat((torch.tensor(phrase), noise, torch.tensor(phrase), code))
        words = torch.arange(len(phrase) - 8, len(phrase) - 1)
        kind, forced = torch.full((200,), DEMONSTRATION), torch.zeros(200, dtype=torch.bool)
        for segment in (100, 200):
            made = LLMLingua(segment=segment).compressor(asked.tokenizer, asked.model)
            place = made._iterate(tokens, kind, forced, (0, 50, 0))  # tokens that no text has
            told_once = torch.isin(words, place) | torch.isin(words + 100, place)
            shares.append(float(told_once.float().mean()))
    claim("llmlingua", "iterative-planted", sum(shares[::2]) / 3 - sum(shares[1::2]) / 3)
