"""Sequence-level distillation: the teacher's likeliest text by enumeration, and students of a world that has two ways to say it."""

import copy
import itertools

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.distillation.black_box.overlap import sentence_bleu
from refimpl.compression.distillation.black_box.sequence_kd import SequenceKD, nearest
from refimpl.compression.distillation.protocol import Sequences, distill, label_loss, writer
from refimpl.model.beam import beam_search
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train

SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 24}


def decoder(generator, vocabulary=5, std=0.5, **sizes):
    return initialize_(Decoder(Config(vocabulary=vocabulary, **{**SIZES, **sizes})), generator, std=std)


@torch.no_grad()
def all_texts(model, prompt, n):
    """Every text of n tokens after a prompt `[time]`, and its log-chance."""
    texts = torch.tensor(list(itertools.product(range(5), repeat=n)))
    rows = torch.cat((prompt.expand(len(texts), -1), texts), 1)
    chances = model(rows[:, :-1]).log_softmax(-1)[:, len(prompt) - 1 :]
    return texts, chances.gather(2, texts[:, :, None]).sum((1, 2))


# What is learnt


def test_the_teachers_likeliest_text_is_learnt(generator):
    """Oracle: all 125 texts by enumeration: with a beam for each beginning of two tokens it is the likeliest of all."""
    teacher = decoder(generator)
    batch = torch.randint(0, 5, (6, 7), generator=generator)
    given = SequenceKD(beams=25, prompt=0.6).sequences(batch, None, writer(teacher, generator), generator)
    for row, tokens in zip(batch, given.tokens, strict=True):
        texts, scores = all_texts(teacher, row[:4], 3)
        assert tokens.tolist() == row[:4].tolist() + texts[scores.argmax()].tolist()
    assert given.mask.tolist() == [[False, False, False, True, True, True]] * 6
    assert not torch.equal(given.tokens, batch)


def test_the_loss_is_that_of_whole_sequences_where_the_teacher_is_sure(generator):
    r"""Oracle: Section 3.2, $-\sum_t p(t \mid s) \log q(t \mid s)$ over all texts by enumeration, of which the mode is a point of."""
    teacher, student = decoder(generator), decoder(generator, n_layers=1)
    batch = torch.randint(0, 5, (4, 6), generator=generator)
    method = SequenceKD(beams=25)

    def losses():
        given = method.sequences(batch, student, writer(teacher, generator), generator)
        whole = torch.zeros(())
        for row in batch:
            _, log_p = all_texts(teacher, row[:3], 3)
            whole -= (log_p.exp() * all_texts(student, row[:3], 3)[1]).sum() / 3  # a token's mean
        return method.objective(student, given), whole / len(batch)

    unsure, sure = losses(), None
    with torch.no_grad():
        teacher.norm.weight.mul_(1000)
    sure = losses()
    assert_close(*sure)
    assert (
        unsure[0] - unsure[1]
    ).abs() > 0.01  # the mode stands for all where one text has all the chance, and only there


def test_only_what_was_written_is_learnt(table):
    """Oracle: by hand: the mean of the written tokens' log-chances; a token that stands in the source only has no gradient."""
    student = table(4)
    given = SequenceKD().sequences(
        torch.tensor([[3, 0, 1, 1]]), student, lambda prompts, n, *, beams: torch.tensor([[[2, 1], [0, 0]]]), None
    )
    loss = SequenceKD().objective(student, given)
    log_q = student.logits.log_softmax(-1)
    assert_close(loss, -(log_q[0, 2] + log_q[2, 1]) / 2)
    (gradient,) = torch.autograd.grad(loss, student.logits)
    assert (gradient[[1, 3]] == 0).all() and (gradient[[0, 2]] != 0).all()


def test_another_vocabulary_is_no_obstacle(generator):
    """Oracle: `label_loss` of the teacher's text: a student may know more tokens than the teacher writes."""
    teacher, student = decoder(generator), decoder(generator, vocabulary=9)
    batch = torch.randint(0, 5, (3, 8), generator=generator)
    loss = SequenceKD().step(student, teacher, batch, generator)
    text = beam_search(teacher, batch[:, :4], 4, 5).tokens[:, 0]
    assert_close(loss, label_loss(student(torch.cat((batch[:, :4], text[:, :-1]), 1))[:, 3:], text))


# Interpolation


def test_interpolation_takes_the_text_nearest_the_humans():
    """Oracle: by hand: BLEU orders of one row; among equals the likeliest; each row has its own."""
    candidates = torch.tensor(
        [
            [[1, 2, 3, 9], [1, 2, 3, 4], [7, 7, 7, 7]],
            [[5, 5, 5, 5], [4, 3, 2, 1], [1, 2, 9, 9]],
            [[8, 8, 8, 8], [9, 9, 9, 9], [7, 7, 7, 7]],
        ]
    )
    references = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert nearest(candidates, references).tolist() == [[1, 2, 3, 4], [1, 2, 9, 9], [8, 8, 8, 8]]


def test_interpolation_stays_within_the_beam(generator):
    """Oracle: BLEU of each text of the beam search; the one of plain distillation is the beam's first."""
    teacher, batch = decoder(generator), torch.randint(0, 5, (8, 12), generator=generator)
    plain, nearer = (
        SequenceKD(interpolate=choice).sequences(batch, None, writer(teacher, generator), generator).tokens[:, 6:]
        for choice in (False, True)
    )
    beams = beam_search(teacher, batch[:, :6], 6, 5).tokens
    assert torch.equal(plain, beams[:, 0]) and not torch.equal(plain, nearer)
    for row in range(8):
        scores = [sentence_bleu(text, batch[row, 6:].tolist()) for text in beams[row].tolist()]
        assert sentence_bleu(nearer[row].tolist(), batch[row, 6:].tolist()) == max(scores)


# What the teacher gives away


def test_a_beam_search_gives_text_and_no_score(generator):
    """Oracle: the tokens of `beam_search`; what comes back is integers and nothing else."""
    teacher, prompts = decoder(generator), torch.tensor([[1, 2], [3, 4]])
    out = writer(teacher, generator)(prompts, 3, beams=4)
    assert type(out) is torch.Tensor and out.dtype == torch.int64 and out.shape == (2, 4, 3)
    assert torch.equal(out, beam_search(teacher, prompts, 3, 4).tokens)
    with pytest.raises(ValueError, match=r"beams=4 take the likeliest tokens: leave temperature=0\.7 out"):
        writer(teacher, generator)(prompts, 3, beams=4, temperature=0.7)


@pytest.mark.parametrize("settings", [{"beams": 0}, {"prompt": 0.0}, {"prompt": 1.0}])
def test_settings_are_checked(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SequenceKD(**settings)
    with pytest.raises(ValueError, match="rows of 1 tokens"):
        SequenceKD().sequences(torch.zeros(2, 1, dtype=torch.int64), None, None, None)


# Claims: six words are said by three synonyms each. Most people say them in order, the first in its usual form and the
# others as they like; the rest say them backwards and always alike, which is the likeliest text of all, behind an unlikely start.

WORDS, LENGTH = 6, 4
MARK = 4 * WORDS
WORLD = SequenceKD(prompt=(LENGTH + 1.5) / (2 * LENGTH + 1))


def said(source, generator):
    """A human's words for each row of a source."""
    kinds = torch.randint(1, 4, source.shape, generator=generator)
    kinds[:, 0] = 1
    formal = torch.rand(len(source), 1, generator=generator) < 0.4
    return torch.where(formal, source.flip(1) + 3 * WORDS, source + WORDS * kinds)


def human_text(generator, rows=32):
    while True:
        source = torch.randint(0, WORDS, (rows, LENGTH), generator=generator)
        yield torch.cat((source, torch.full((rows, 1), MARK), said(source, generator)), 1)


def translation_loss(model, batch):
    return label_loss(model(batch[:, :-1])[:, LENGTH:], batch[:, LENGTH + 1 :])


def falling(progress):
    return min(1.0, 10 * progress + 0.1) * (1 - progress)


@pytest.fixture(scope="module")
def figures():
    """A student taught by people and one taught by the teacher, same start and sources: BLEU of both decodings, and the rest."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"vocabulary": MARK + 1, "std": 0.1, "n_kv_heads": 2, "tied_embeddings": True}
    teacher = decoder(generator, d_model=32, head_dim=16, d_ff=64, **sizes)
    alone = decoder(generator, n_layers=1, d_ff=32, **sizes)
    taught = copy.deepcopy(alone)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (teacher, alone, taught)]
    train(teacher, optimizers[0], human_text(generator), 250, loss=translation_loss, schedule=falling)
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    train(alone, optimizers[1], human_text(seeds[0]), 200, loss=translation_loss, schedule=falling)
    distill(taught, teacher, WORLD, optimizers[2], human_text(seeds[1]), 200, seeds[1], schedule=falling)
    test = next(human_text(generator, 256))
    source, human = test[:, : LENGTH + 1], test[:, LENGTH + 1 :]

    def bleu(texts):
        return sum(map(sentence_bleu, texts.tolist(), human.tolist())) / len(texts)

    found = {}
    for name, model in (("alone", alone), ("taught", taught)):
        model.eval()
        beams = beam_search(model, source, LENGTH, 5)
        with torch.no_grad():
            perplexity = float(translation_loss(model, test).exp())
        greedy = bleu(generate(model, source, LENGTH))
        found[name] = {
            "greedy": greedy,
            "gain": bleu(beams.tokens[:, 0]) - greedy,
            "mode": float(beams.scores[:, 0].exp().mean()),
            "perplexity": perplexity,
        }
    return found


def test_the_worlds_sources_are_what_the_method_keeps():
    """Oracle: by hand: four words and the mark are the source, four words the text."""
    batch = next(human_text(torch.Generator().manual_seed(1)))
    given = WORLD.sequences(batch, None, lambda prompts, n, *, beams: prompts[:, :1, None].expand(-1, beams, n), None)
    assert torch.equal(given.tokens[:, :5], batch[:, :5]) and given.mask.sum() == 32 * 4


def test_claim_better_outputs(claim, figures):
    """Oracle: BLEU of greedy outputs against a human's text of unseen sources."""
    claim("sequence-kd", "better-outputs", 100 * (figures["taught"]["greedy"] - figures["alone"]["greedy"]))


def test_claim_greedy_suffices(claim, figures):
    """Oracle: what a beam of five adds to the BLEU of greedy decoding."""
    assert figures["alone"]["gain"] > 0.02  # there is something to gain
    claim("sequence-kd", "greedy-suffices", figures["taught"]["gain"] / figures["alone"]["gain"])


def test_claim_peaked(claim, figures):
    """Oracle: chance that the student gives its own likeliest text."""
    claim("sequence-kd", "peaked", figures["taught"]["mode"] / figures["alone"]["mode"])


def test_claim_worse_perplexity(claim, figures):
    """Oracle: perplexity of a human's text of unseen sources."""
    claim("sequence-kd", "worse-perplexity", figures["taught"]["perplexity"] / figures["alone"]["perplexity"])


def test_objective_is_plain_training(generator):
    """Oracle: `label_loss` of any text: nothing of the student's training changes."""
    student, tokens = decoder(generator), torch.randint(0, 5, (3, 7), generator=generator)
    assert_close(SequenceKD().objective(student, Sequences(tokens)), label_loss(student(tokens[:, :-1]), tokens[:, 1:]))
