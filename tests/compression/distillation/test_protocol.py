"""What holds for every distillation method; the list of methods is the taxonomy's. A toy black-box method stands for its kind."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.testing import assert_close

import taxonomy
from refimpl.compression.distillation import protocol
from refimpl.compression.distillation.protocol import (
    BlackBox,
    Run,
    Sequences,
    WhiteBox,
    check_logits,
    distill,
    label_loss,
    logits_of,
    writer,
)
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_

METHODS = taxonomy.load().find(category="compression/distillation", implemented=True)
SIZES = {"vocabulary": 13, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 24}


@dataclasses.dataclass(frozen=True)
class Copying(BlackBox):
    """Learns the teacher's greedy continuation of each batch's first five tokens."""

    def sequences(self, batch, student, write, generator):
        prompt, n = batch[:, :5], batch.shape[1] - 5
        mask = torch.arange(batch.shape[1] - 1).expand(len(batch), -1) >= 4
        return Sequences(torch.cat((prompt, write(prompt, n)), dim=1), mask)


@pytest.fixture(params=[None, *METHODS], ids=lambda method: method.id if method else "toy-black-box")
def method(request):
    """A method at its default settings."""
    return request.param.load()() if request.param else Copying()


@pytest.fixture
def white_box(method):
    if not isinstance(method, WhiteBox):
        pytest.skip("a black-box method has no loss over the teacher's logits")
    return method


@pytest.fixture
def teacher(generator):
    return initialize_(Decoder(Config(**SIZES)), generator, std=0.3)


@pytest.fixture
def student():
    return initialize_(Decoder(Config(**{**SIZES, "n_layers": 1})), torch.Generator().manual_seed(7), std=0.3)


def batches(seed=5):
    seeded = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, 13, (3, 12), generator=seeded)


def trained(method, student, teacher, steps=4):
    student = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    losses = distill(student, teacher, method, optimizer, batches(), steps, torch.Generator().manual_seed(1))
    return student, losses


def logits(generator, dtype=torch.float32):
    student, teacher = (torch.randn(2, 5, 13, generator=generator).to(dtype) for _ in range(2))
    labels = torch.randint(0, 13, (2, 5), generator=generator)
    mask = torch.tensor([[True] * 5, [False, True, True, False, False]])
    return student, teacher, labels, mask


def test_there_are_methods():
    assert METHODS


def test_only_the_student_moves(method, student, teacher):
    """Oracle: the state of both before."""
    before = copy.deepcopy(teacher.state_dict())
    after, losses = trained(method, student, teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters()) and not teacher.training
    assert any(not torch.equal(x, y) for x, y in zip(after.parameters(), student.parameters(), strict=True))
    assert len(losses) == 4 and all(torch.isfinite(torch.tensor(losses)))


def test_the_same_seed_gives_the_same_student_and_nothing_is_left(method, student, teacher):
    fresh = copy.deepcopy(method)
    first = trained(method, student, teacher)[1]
    assert trained(method, student, teacher)[1] == first == trained(fresh, student, teacher)[1]
    assert method == fresh


def test_a_loss_falls_on_what_is_repeated(method, student, teacher):
    """Oracle: 60 steps on one batch; what is learnt is there at the end."""
    batch = next(batches())
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    losses = distill(student, teacher, method, optimizer, iter([batch] * 60), 60, torch.Generator().manual_seed(1))
    assert losses[-1] < 0.7 * losses[0]


def test_what_the_mask_leaves_out_changes_nothing(white_box, generator):
    """Oracle: other logits and labels there, NaN included; and the counted positions alone."""
    student, teacher, labels, mask = logits(generator)
    student.requires_grad_()
    loss = white_box.loss(student, teacher, labels, mask)
    (gradient,) = torch.autograd.grad(loss, student)
    other = teacher.masked_fill(~mask[..., None], float("nan")), labels.masked_fill(~mask, 0)
    assert torch.equal(white_box.loss(student, *other, mask), loss)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(-1).all()
    assert_close(white_box.loss(student[mask], teacher[mask], labels[mask]), loss)
    assert (white_box.loss(student, teacher, labels) - loss).abs() > 1e-3  # negative control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_accumulated_in_float32(white_box, generator, dtype):
    """Oracle: the same numbers in float32 (float64 for itself)."""
    student, teacher, labels, mask = logits(generator, dtype)
    loss = white_box.loss(student, teacher, labels, mask)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide and loss.ndim == 0
    assert_close(loss, white_box.loss(student.to(wide), teacher.to(wide), labels, mask))


def test_no_gradient_reaches_the_teachers_logits(white_box, generator):
    student, teacher, labels, mask = logits(generator)
    teacher.requires_grad_()
    white_box.loss(student.requires_grad_(), teacher, labels, mask).backward()
    assert teacher.grad is None and student.grad is not None


def test_what_does_not_fit_is_refused(white_box, generator):
    student, teacher, labels, mask = logits(generator)
    for arguments, message in (
        ((student[..., :9], teacher, labels, mask), "vocabulary has 9 tokens and the teacher's 13"),
        ((student[:, :3], teacher, labels, mask), "must be"),
        ((student, teacher, labels[:, :3], mask), "must be"),
        ((student, teacher, labels, mask[:1]), "must be"),
        ((student, teacher, labels, mask.float()), "must be bool"),
        ((student, teacher, labels, ~mask & mask), "no position counts"),
        ((student[:, :0], teacher[:, :0], labels[:, :0], None), "no position counts"),
    ):
        with pytest.raises(ValueError, match=message):
            white_box.loss(*arguments)


def test_models_of_transformers_are_read_too(white_box, student, teacher):
    """Oracle: the same models, whose output stands in an object's `logits`."""

    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return SimpleNamespace(logits=self.model(tokens))

    batch = next(batches())
    steps = [
        white_box.step(*models, batch, torch.Generator().manual_seed(1))  # the same draws, where a model writes
        for models in ((student, teacher), (Wrapped(student), Wrapped(teacher)))
    ]
    assert_close(*steps)  # with a cache and without one a model writes the same, up to rounding


def test_what_a_run_trains_is_lent_to_the_optimizer_and_taken_back(student, teacher):
    """Oracle: the optimizer's groups and states before and after; and the matrix, which has moved at the same rate."""
    matrix = nn.Parameter(torch.zeros(16, 16))
    asked = []

    class Watching(Run):
        def step(self, student, teacher, batch, generator):
            return label_loss(logits_of(student, batch[:, :-1]), batch[:, 1:]) + (matrix - 1).square().mean()

        def parameters(self):
            return [matrix]

    class Remembering(Copying):
        def begin(self, student, teacher, steps, generator, unseen=None):
            asked.append((steps, unseen))
            return Watching(self)

    optimizer, unseen = torch.optim.AdamW(student.parameters(), lr=0.01), next(batches())
    distill(student, teacher, Remembering(), optimizer, batches(), 3, torch.Generator(), unseen=unseen)
    assert asked == [(3, unseen)] and matrix.min() > 0.025  # three steps of 0.01
    assert len(optimizer.param_groups) == 1 and matrix not in optimizer.state
    assert len(optimizer.state) == len(list(student.parameters()))
    with pytest.raises(ValueError, match="batches end"):
        distill(student, teacher, Remembering(), optimizer, iter([unseen]), 3, torch.Generator())
    assert len(optimizer.param_groups) == 1  # also after an error


class Sealed(Decoder):
    """A teacher that reads nothing but while it writes."""

    writes = False

    def forward(self, *args, **kwargs):
        assert self.writes, "the teacher was asked for logits"
        return super().forward(*args, **kwargs)


@pytest.fixture
def sealed(teacher, monkeypatch):
    """The teacher, sealed; the two functions that `writer` calls, and no others, open the seal, and only until they return."""
    model = Sealed(teacher.config)
    model.load_state_dict(teacher.state_dict())

    def opening(search):
        def opened(writing, *args, **kwargs):
            model.writes = writing is model
            try:
                return search(writing, *args, **kwargs)
            finally:
                model.writes = False

        return opened

    for name in ("generate", "beam_search"):
        monkeypatch.setattr(protocol, name, opening(getattr(protocol, name)))
    return model


def test_a_black_box_method_meets_no_logit(method, student, sealed, teacher):
    """Oracle: a teacher that raises when it is read, but for writing; the same training with a teacher that may be read; and what
    the method is handed: modules without a weight, and a function that returns tokens.
    """
    if not isinstance(method, BlackBox):
        with pytest.raises(AssertionError, match="asked for logits"):
            trained(method, student, sealed)
        pytest.skip("a white-box method sees the teacher's logits")
    handed, wrote = [], []

    class Watched(type(method)):
        def begin(self, student, teacher, *args, **kwargs):
            handed.append(teacher)
            run = super().begin(student, teacher, *args, **kwargs)
            step = run.step

            def watched(student, teacher, batch, generator):
                handed.append(teacher)
                return step(student, teacher, batch, generator)

            run.step = watched
            return run

        def sequences(self, batch, student, write, generator):
            wrote.append(write(batch[:, :3], 4))
            return super().sequences(batch, student, write, generator)

    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    assert trained(method, student, sealed, steps=6)[1] == trained(method, student, teacher, steps=6)[1]
    trained(Watched(**settings), student, sealed, steps=6)
    assert len(handed) == 7 and not any(module.state_dict() or list(module.modules())[1:] for module in handed)
    assert wrote and all(out.dtype == torch.int64 and out.shape == (3, 4) for out in wrote)


def found_in(write):
    """The model that a function encloses."""
    return next(c.cell_contents for c in write.__closure__ if isinstance(c.cell_contents, nn.Module))


class Asking(Copying):
    """A cheat: its step asks what it is handed for logits."""

    def step(self, student, teacher, batch, generator):
        return label_loss(logits_of(student, batch[:, :-1]), logits_of(teacher, batch[:, :-1]).argmax(-1))


class Digging(Copying):
    """A cheat: it takes the teacher out of the function that writes."""

    def sequences(self, batch, student, write, generator):
        logits_of(found_in(write), batch)
        return super().sequences(batch, student, write, generator)


class DiggingDeeper(Copying):
    """A cheat: it takes the teacher out of what it is handed in its place."""

    def step(self, student, teacher, batch, generator):
        logits_of(found_in(writer(teacher, generator)), batch)
        return super().step(student, teacher, batch, generator)


@pytest.mark.parametrize(
    ("cheat", "error", "message"),
    [
        (Asking, TypeError, "shows its text only"),
        (Digging, AssertionError, "asked for logits"),
        (DiggingDeeper, AssertionError, "asked for logits"),
    ],
)
def test_who_reads_the_teacher_in_secret_is_found_out(cheat, error, message, student, sealed, teacher):
    """Oracle: negative controls of the test above: methods that reach for logits, of which it must not think well."""
    with pytest.raises(error, match=message):
        trained(cheat(), student, sealed)
    if error is AssertionError:
        trained(cheat(), student, teacher, steps=1)  # without the seal none would notice


def test_the_teacher_writes_as_generate_does(teacher):
    """Oracle: `generate`."""
    prompts = next(batches())[:, :4]
    write = writer(teacher, torch.Generator().manual_seed(2))
    assert torch.equal(write(prompts, 6), generate(teacher, prompts, 6))
    drawn = generate(teacher, prompts, 6, temperature=1.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(write(prompts, 6, temperature=1.0), drawn)
    with pytest.raises(ValueError, match="teacher=Linear can't write"):
        writer(nn.Linear(2, 2), torch.Generator())(prompts, 3)


def test_configuration_survives_yaml(method):
    settings = dataclasses.asdict(method)
    assert type(method)(**yaml.safe_load(yaml.safe_dump(settings))) == method


def test_label_loss_by_hand():
    """Oracle: by hand: chances 1/4 and 3/4 of the right token, one of three positions left out."""
    logits = torch.tensor([[[1.0, 3.0], [3.0, 1.0], [9.0, 1.0]]]).log()
    labels, mask = torch.tensor([[0, 0, 0]]), torch.tensor([[True, True, False]])
    expected = -(torch.tensor(0.25).log() + torch.tensor(0.75).log()) / 2
    assert_close(label_loss(logits, labels, mask), expected)
    assert torch.equal(logits_of(nn.Identity(), logits), logits)
    check_logits(logits, logits, labels, mask)
