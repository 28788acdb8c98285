"""TinyBERT: each distance by hand and in loops, what a copy of the teacher costs, the stages, the matrices between widths."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.compression.distillation.inside import read
from refimpl.compression.distillation.protocol import Sequences, distill
from refimpl.compression.distillation.white_box.tinybert_layerwise import (
    Stages,
    TinyBERT,
    distance,
    score_distance,
    teacher_layers,
)
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train

SIZES = {"vocabulary": 13, "d_model": 16, "n_layers": 4, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 24}


def decoder(seed, **more):
    return initialize_(Decoder(Config(**{**SIZES, **more})), torch.Generator().manual_seed(seed), std=0.3)


@pytest.fixture
def teacher():
    return decoder(0).eval()


@pytest.fixture
def student():
    return decoder(1, n_layers=2)


@pytest.fixture
def given(generator):
    tokens = torch.randint(0, 13, (2, 8), generator=generator)
    return Sequences(tokens, torch.arange(7).expand(2, -1) >= 3)


# The distances


def test_layers_are_spread_evenly():
    """Oracle: Section 3.1: with 4 and 12 layers g(m) = 3m; the last layer learns from the last."""
    assert teacher_layers(4, 12) == [3, 6, 9, 12]
    assert teacher_layers(6, 12) == [2, 4, 6, 8, 10, 12]
    assert teacher_layers(1, 5) == [5] and teacher_layers(3, 3) == [1, 2, 3]
    with pytest.raises(ValueError, match="4 layers must divide the teacher's 6"):
        teacher_layers(4, 6)


def test_distances_by_hand():
    """Oracle: by hand: (1 + 4 + 9 + 16) / 4; with a matrix that doubles, and with the second position left out."""
    ours, theirs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.zeros(1, 2, 2)
    assert distance(ours, theirs, None, None) == 7.5
    assert distance(ours, theirs, 2 * torch.eye(2), None) == 30
    assert distance(ours, theirs, None, torch.tensor([[True, False]])) == 2.5
    with pytest.raises(ValueError, match="widths 2 and 3 differ"):
        distance(ours, torch.zeros(1, 2, 3), None, None)


def test_scores_by_hand():
    """Oracle: by hand: of 2 x 2 scores a causal query sees 1, 3 and 4; the mask leaves 3 and 4, or 1."""
    scores, seen = torch.tensor([[[[1.0, 9.0], [3.0, 4.0]]]]), torch.ones(2, 2, dtype=torch.bool).tril()
    ours, theirs = (scores, seen), (torch.zeros(1, 1, 2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert_close(score_distance(ours, theirs, None).item(), 26 / 3)
    assert score_distance(ours, theirs, torch.tensor([[False, True]])) == 12.5
    assert score_distance(theirs, ours, torch.tensor([[True, False]])) == 1
    with pytest.raises(ValueError, match="has 1 heads and the teacher 2"):
        score_distance(ours, (torch.zeros(1, 2, 2, 2), seen), None)


def test_the_inner_loss_is_the_sum_of_its_parts(student, teacher, given):
    """Oracle: in loops over layers, heads, queries and the keys they see, with torch's `mse_loss`."""
    ours, theirs = (read(model, given.tokens[:, :-1], scores=True) for model in (student, teacher))
    kept = given.mask
    total = F.mse_loss(ours.embedding[kept], theirs.embedding[kept])
    scores = torch.zeros(())
    for m, n in ((0, 1), (1, 3)):
        total = total + F.mse_loss(ours.hidden[m][kept], theirs.hidden[n][kept])
        for head in range(2):
            pairs = [
                (ours.scores[m][0][row, head, i, j], theirs.scores[n][0][row, head, i, j])
                for row in range(2)
                for i in range(3, 7)
                for j in range(i + 1)
            ]
            a, b = (torch.stack(x) for x in zip(*pairs, strict=True))
            scores = scores + F.mse_loss(a, b) / 2
    assert_close(TinyBERT().inner_loss(student, teacher, given), total + scores)
    assert_close(TinyBERT(attention=False).inner_loss(student, teacher, given), total)
    assert scores > 0.1


def test_a_copy_of_the_teacher_costs_nothing_and_a_changed_part_does(teacher, given):
    """Oracle: the optimum; and each part changed alone."""
    student = copy.deepcopy(teacher)
    assert TinyBERT().objective(student, teacher, given) < 1e-10
    for change in (
        student.embedding.weight,
        student.layers[0].feed_forward.down_proj.weight,
        student.layers[3].attention.q_proj.weight,
        student.lm_head.weight,
    ):
        kept = change.detach().clone()
        with torch.no_grad():
            change.mul_(1.5)
        assert TinyBERT().objective(student, teacher, given) > 1e-4
        with torch.no_grad():
            change.copy_(kept)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_predictions_are_a_soft_cross_entropy(generator, temperature):
    """Oracle: torch's cross-entropy with the teacher's chances as targets: the same gradient, and a constant between."""
    z, v = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    ours = TinyBERT(temperature=temperature).loss(z, v, torch.zeros(4, dtype=torch.int64))
    target = (v / temperature).softmax(-1)
    theirs = F.cross_entropy(z / temperature, target)
    entropy = -(target * target.log()).sum(-1).mean()
    assert_close(ours, theirs - entropy)
    assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z))


def test_no_gradient_reaches_the_teacher(student, teacher, given):
    TinyBERT().objective(student, teacher, given).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


# The stages, and what is learnt beside the student


def test_inner_layers_come_first(student, teacher, generator):
    """Oracle: the two losses themselves: of 8 steps, 20/23 are 6.96, and so 7."""
    run = TinyBERT().begin(student, teacher, 8, generator)
    batch = torch.randint(0, 13, (2, 8), generator=generator)
    inner = TinyBERT().inner_loss(student, teacher, Sequences(batch))
    predictions = TinyBERT().loss(student(batch[:, :-1]), teacher(batch[:, :-1]), batch[:, 1:])
    losses = [run.step(student, teacher, batch, generator) for _ in range(8)]
    assert_close(losses, [inner] * 7 + [predictions])
    assert run.parameters() == []  # of one width
    for share, expected in ((0.0, predictions), (1.0, inner)):
        first = TinyBERT(inner=share).begin(student, teacher, 1, generator)
        assert_close(first.step(student, teacher, batch, generator), expected)
    assert_close(TinyBERT().step(student, teacher, batch, generator), inner + predictions)


def test_matrices_between_widths_are_learnt_beside_the_student(teacher, generator):
    """Oracle: a student whose own layers stand still: the loss falls by the matrices alone; they are gone afterwards."""
    narrow = decoder(1, n_layers=2, d_model=6)
    batch = torch.randint(0, 13, (4, 12), generator=generator)
    with pytest.raises(ValueError, match="widths 6 and 16 differ"):
        TinyBERT().step(narrow, teacher, batch, generator)
    run = TinyBERT(inner=1.0).begin(narrow, teacher, 40, torch.Generator().manual_seed(3))
    assert isinstance(run, Stages) and [tuple(x.shape) for x in run.parameters()] == [(6, 16)] * 2
    drawn = torch.Generator().manual_seed(3)
    for matrix in run.parameters():  # two of variance 1/6
        assert_close(matrix.data, torch.randn(6, 16, generator=drawn) / 6**0.5)
    narrow.requires_grad_(False)
    narrow.norm.requires_grad_(True)  # the inner loss does not see it
    optimizer = torch.optim.SGD(narrow.norm.parameters(), lr=0.1)
    given = TinyBERT(inner=1.0), optimizer, iter([batch] * 40), 40, torch.Generator().manual_seed(3)
    losses = distill(narrow, teacher, *given, clip=None)
    assert losses[-1] < 0.95 * losses[0]
    assert len(optimizer.param_groups) == 1
    assert_close(losses[0], run.step(narrow, teacher, batch, generator).item())


def test_heads_that_differ_are_refused_or_left_out(teacher, given):
    narrow = decoder(1, n_layers=2, n_heads=1)
    with pytest.raises(ValueError, match="attention=False leaves them out"):
        TinyBERT().inner_loss(narrow, teacher, given)
    assert TinyBERT(attention=False).inner_loss(narrow, teacher, given) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(student, teacher, given, dtype):
    """Oracle: the same models in float32, to the rounding of their own layers; the loss is wide."""
    wide = TinyBERT().objective(student, teacher, given)
    loss = TinyBERT().objective(student.to(dtype), teacher.to(dtype), given)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(wide.item(), rel=0.05)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"inner": -0.1}, {"inner": 1.1}])
def test_settings_are_checked(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        TinyBERT(**settings)


# What it is worth. A source whose next token depends on the two before it, and a teacher that has learnt it.


def text(rows, time, seed):
    generator = torch.Generator().manual_seed(seed)
    table = (2 * torch.randn(13, 13, 13, generator=torch.Generator().manual_seed(0))).softmax(-1)
    tokens = torch.randint(0, 13, (rows, 2), generator=generator)
    while tokens.shape[1] < time:
        chances = table[tokens[:, -2], tokens[:, -1]]
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=generator)), dim=1)
    return tokens


class EmbeddingsOnly(TinyBERT):
    """The first stage without the transformer layers."""

    def inner_loss(self, student, teacher, given, to_hidden=None, to_embedding=None):
        ours, theirs = (read(model, given.tokens[:, :-1], scores=False).embedding for model in (student, teacher))
        return distance(ours, theirs.detach(), to_embedding, given.mask)


def test_what_the_inner_layers_are_worth(claim):
    """Oracle: the same student on the same text, all else equal: a first stage that imitates embeddings alone, as in the
    paper's ablation; and as many steps on the predictions alone. All judged on unseen text."""
    read_text, unseen = text(400, 18, 1), text(100, 18, 2)

    def batches(seed):
        drawn = torch.Generator().manual_seed(seed)
        while True:
            yield read_text[torch.randint(0, 400, (8,), generator=drawn)]

    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), lr=5e-3)

    knowing = decoder(0, d_model=24)
    train(knowing, optimizer(knowing), batches(0), 150)

    def far(method):
        student, drawn = decoder(1, n_layers=2), torch.Generator().manual_seed(3)
        distill(student, knowing, method, optimizer(student), batches(4), 300, drawn)
        with torch.no_grad():
            return float(TinyBERT().loss(student(unseen[:, :-1]), knowing(unseen[:, :-1]), unseen[:, 1:]))

    both = far(TinyBERT())
    claim("tinybert-layerwise", "transformer-layers", far(EmbeddingsOnly()) - both)
    claim("tinybert-layerwise", "equal-steps", far(TinyBERT(inner=0.0)) - both)
