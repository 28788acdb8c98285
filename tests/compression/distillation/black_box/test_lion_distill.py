"""Lion: a teacher that is a program, over instructions of which it is known who can follow them."""

import itertools
import random
import re
from collections import Counter

import pytest
import torch
from torch import nn

from refimpl.compression.distillation.black_box import lion_distill
from refimpl.compression.distillation.black_box.lion_distill import Lion, Loop
from refimpl.compression.distillation.black_box.pools import Pools
from refimpl.compression.distillation.black_box.roles import Prompted
from refimpl.compression.distillation.protocol import TextOnly, distill, label_loss
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train
from refimpl.testbed.metrics import rouge_l

# A world: each of eight verbs stands for a permutation of ten names, which an instruction applies to four of them.

NAMES = ["anna", "boris", "clara", "daniel", "ella", "felix", "grace", "hugo", "ida", "jonas"]
VERBS = ["praise", "visit", "call", "greet", "help", "teach", "paint", "follow"]
RARE = VERBS[4:]
LENGTH = 4


class World:
    """A closed model: one function from prompt to text, which plays all roles. Its referee prefers what comes first."""

    def __init__(self, seed=0):
        self.draw, self.asked = random.Random(seed), []
        self.meaning = {verb: dict(zip(NAMES, self.draw.sample(NAMES, len(NAMES)), strict=True)) for verb in VERBS}

    def instruction(self, verb):
        return " ".join([verb, *self.draw.choices(NAMES, k=LENGTH)])

    def right(self, instruction):
        verb, *names = instruction.split()
        return " ".join(self.meaning[verb][name] for name in names)

    def ask(self, prompt):
        role = {"###": "teacher", "[In": "referee", "Tak": "generator"}[prompt[:3]]
        self.asked.append((role, prompt))
        if role == "teacher":
            return self.right(re.search(r"Instruction:\n(.*)\n", prompt)[1])
        if role == "generator":
            return self.instruction(re.search(r"#Given#:\n(\w+) ", prompt)[1])
        instruction, *answers = (re.search(rf"{name}]\n(.*)\n", prompt)[1] for name in ("Instruction", "t 1", "t 2"))
        right = self.right(instruction).split()
        first, second = (1 + 2 * sum(map(str.__eq__, answer.split(), right)) for answer in answers)
        return f"The first one is nice.\nScore of Assistant 1: {first + 1}\nScore of Assistant 2: {second}"


class Apprentice:
    """Can follow a verb once it has had so many lessons on it; otherwise it is wrong about the first name."""

    def __init__(self, world, needed):
        self.world, self.needed, self.lessons = world, needed, Counter()

    def learn(self, lessons):
        assert all(answer == self.world.right(instruction) for instruction, answer in lessons)
        self.lessons.update(instruction.split()[0] for instruction, _ in lessons)

    def knows(self, verb):
        return self.lessons[verb] >= self.needed

    def answer(self, instructions):
        right = map(self.world.right, instructions)
        return [
            text if self.knows(instruction.split()[0]) else "nobody " + text.split(" ", 1)[1]
            for instruction, text in zip(instructions, right, strict=True)
        ]


@pytest.fixture
def taught(generator):
    """A world, what was done in its rounds, and what was known before each: six of verbs 1 to 4, one of the others."""
    world = World()
    student = Apprentice(world, needed=6)
    seed = [world.instruction(verb) for verb in VERBS for _ in range(6 if verb not in RARE else 1)]
    known, answer = [], student.answer

    def watched(instructions):
        known.append({verb for verb in VERBS if student.knows(verb)})
        return answer(instructions)

    student.answer = watched
    rounds = Lion(growth=0.5).teach(student, Prompted(world.ask), seed, generator)
    return world, student, seed, rounds, known


def test_hard_is_what_the_student_cannot_do(taught):
    """Oracle: by construction; it gets 2 points less of 9 in both orders, though a referee's bias of 1 is against the second."""
    _, student, seed, rounds, known = taught
    cache = list(dict.fromkeys(seed))
    assert len(rounds) == 3 and known[0] == set(VERBS) - set(RARE)
    for found, knew in zip(rounds, known, strict=True):
        assert found.hard == [one for one in cache if one.split()[0] not in knew]
        assert found.easy == [one for one in cache if one.split()[0] in knew]
        assert all(one.split()[0] not in knew for one in found.new_hard)
        assert all(one.split()[0] in knew for one in found.new_easy)
        cache += found.new_hard + found.new_easy
    assert any(map(student.knows, RARE))  # the last pools had to tell them apart anew


def test_as_many_hard_as_easy_and_none_too_similar(taught):
    """Oracle: counting: half of 28 is 14, half of them hard; the testbed's ROUGE-L of each with all before it."""
    _, _, seed, rounds, _ = taught
    seen = list(seed)
    for found in rounds:
        assert len(found.new_hard) == len(found.new_easy) == 7
        for one in found.new_hard + found.new_easy:
            assert max(rouge_l(one, other) for other in seen) <= 0.7
            seen.append(one)


def test_the_teacher_is_asked_once_and_the_referee_twice(taught):
    """Oracle: counting calls of each role."""
    world, _, seed, rounds, _ = taught
    roles = Counter(role for role, _ in world.asked)
    sizes = [len(found.hard) + len(found.easy) for found in rounds]
    assert sizes == [28, 42, 56] and len(set(seed)) == 28
    assert roles["teacher"] == 28 + 3 * 14 and roles["referee"] == 2 * sum(sizes)
    assert roles["generator"] >= 3 * 14
    assert len({prompt for role, prompt in world.asked if role == "teacher"}) == roles["teacher"]


def test_the_student_learns_from_the_new_pool_only(taught):
    """Oracle: lessons of each verb: one pass over the seed and over what each round wrote."""
    _, student, seed, rounds, _ = taught
    new = [one for found in rounds for one in found.new_hard + found.new_easy]
    assert student.lessons == Counter(one.split()[0] for one in seed + new)


class Roles:
    """Scores and new instructions as told."""

    def __init__(self, gaps, new):
        self.gaps, self.new, self.asked = gaps, iter(new), []

    def answer(self, instructions):
        return ["T" for _ in instructions]

    def review(self, instruction, first, second):
        return tuple(5 + self.gaps[instruction] * (text == "T") for text in (first, second))

    def create(self, instructions, *, hard):
        self.asked.append((instructions, hard))
        return [next(self.new, None) for _ in instructions]


def test_a_gap_of_one_point_is_hard(generator):
    """Oracle: by hand: 1 is hard, just below is not, nor is a student who is better."""
    roles = Roles({"a": 1, "b": 0.99, "c": 4, "d": -2}, ["n 1 2", "m 3 4", "o 5 6", "p 7 8"])
    pools = Pools(list("abcd"), list("abcd"))
    found = Lion().round(pools, roles, lambda asked: ["S" for _ in asked], 2, generator)
    assert (found.hard, found.easy) == (["a", "c"], ["b", "d"])
    assert [hard for _, hard in roles.asked] == [True, False]
    assert set(roles.asked[0][0]) <= {"a", "c"} and set(roles.asked[1][0]) <= {"b", "d"}
    assert pools.train == ["n 1 2", "m 3 4", "o 5 6", "p 7 8"] and pools.cache == [*"abcd", *pools.train]
    strict = Lion(threshold=3).discriminate(pools, Roles(dict.fromkeys(pools.cache, 3), []), lambda asked: ["S"] * 8)
    assert strict == (pools.cache, [])


def test_one_kind_only_and_a_generator_that_fails(generator):
    """Oracle: by hand: all new ones after the one kind that there is; 20 tries for each, and then the old pool stays."""
    pools, roles = Pools(["a"], ["a"]), Roles({"a": 0}, ["n 1 2", None, "n 1 2", "m 3 4"])
    found = Lion().round(pools, roles, lambda asked: ["S"], 1, generator)
    assert found.hard == [] and (found.new_hard, found.new_easy) == (["n 1 2"], ["m 3 4"])
    assert [hard for _, hard in roles.asked] == [
        False
    ] * 4  # what was unusable and what was like another was asked for again
    none = Roles({"a": 2, "n 1 2": 2, "m 3 4": 0}, [])
    found = Lion().round(pools, none, lambda asked: ["S"] * 3, 2, generator)
    assert found.new_hard == found.new_easy == [] and pools.train == ["n 1 2", "m 3 4"]
    assert len(none.asked) == 2 * 20
    with pytest.raises(ValueError, match=r"seed=\[\]: at least one"):
        Lion().teach(None, roles, [], generator)


# Windows of plain text


def student_of(generator, vocabulary=7):
    config = Config(vocabulary=vocabulary, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
    return initialize_(Decoder(config), generator, std=0.3)


class Sealed(nn.Module):
    """A teacher that nobody can read."""

    def forward(self, tokens):
        raise AssertionError("a logit was asked for")


def counting(prompts, n, *, temperature=0.0, beams=None):
    """Counts on from the last token, modulo 7; where it is to be inventive, by leaps."""
    leaps = torch.randint(1, 7, (len(prompts), n), generator=torch.Generator().manual_seed(int(prompts.sum())))
    return (prompts[:, -1:] + (leaps if temperature else torch.ones_like(leaps)).cumsum(1)) % 7


def test_training_on_windows_needs_the_teachers_text_only(generator, monkeypatch):
    """Oracle: a sealed teacher; 24 steps: 12 on the text, 4 after each round (growth 1/3), and what each has learnt from."""
    real = lion_distill.writer
    monkeypatch.setattr(
        lion_distill, "writer", lambda model, g: counting if isinstance(model, TextOnly) else real(model, g)
    )
    runs = []

    class Watched(Lion):
        def begin(self, *arguments, **options):
            runs.append(super().begin(*arguments, **options))
            return runs[-1]

        def round(self, pools, roles, answer, n, generator):
            sizes.append((runs[-1].done - 1, len(pools.cache), n))
            runs[-1].place += 1  # wherever the last pool was left, the new one is read from its start
            found = super().round(pools, roles, answer, n, generator)
            firsts.append(pools.train[:3])
            return found

        def objective(self, student, given):
            seen.append(given)
            return super().objective(student, given)

    sizes, seen, firsts, modes = [], [], [], set()
    student = student_of(generator)
    student.norm.register_forward_pre_hook(lambda module, _: modes.add((module.training, torch.is_grad_enabled())))
    text = (torch.randint(0, 7, (3, 12), generator=generator) for _ in range(99))
    optimizer = torch.optim.AdamW(student.parameters(), 0.01)
    distill(student, Sealed(), Watched(growth=1 / 3), optimizer, text, 24, generator)
    assert [step for step, _, _ in sizes] == [12, 16, 20] == runs[0].starts()
    assert sizes[0][1:] == (36, 6) and {n for _, _, n in sizes} == {6}  # 12 batches of three; a third, half hard
    for given in seen:
        assert torch.equal(given.tokens[:, 6:], counting(given.tokens[:, :6], 6)) and given.mask.sum() == 3 * 6
    assert modes == {(True, True), (False, False)}  # it learns in training mode, and answers in evaluation mode
    assert [[tuple(row) for row in seen[step].tokens[:, :6].tolist()] for step, _, _ in sizes] == firsts
    pools = runs[0].pools
    asked = {tuple(row) for given in seen[20:] for row in given.tokens[:, :6].tolist()}
    assert asked == set(pools.train) and len(asked) == 12  # four batches of three: each once
    assert all(pools.cache.index(one) >= 36 for one in pools.train) and student.training


def test_few_steps_and_one_without_a_loop(generator):
    """Oracle: by hand: rounds that have no step between them are one; `step` alone imitates the batch."""
    assert Loop(Lion(), 4).starts() == [3, 3, 4] and Loop(Lion(iterations=0), 4).starts() == []
    assert Loop(Lion(growth=9.0, iterations=1), 4).starts() == [1]  # the text is read first, whatever its share
    teacher, student = student_of(generator), student_of(generator)
    batch = torch.randint(0, 7, (3, 8), generator=generator)
    text = generate(teacher, batch[:, :4], 4)
    expected = label_loss(student(torch.cat((batch[:, :4], text[:, :-1]), 1))[:, 3:], text)
    assert torch.equal(Lion().step(student, teacher, batch, generator), expected)
    run = Lion().begin(student, teacher, 4, generator)
    losses = [run.step(student, teacher, batch, generator) for _ in range(4)]
    assert torch.equal(losses[0], expected) and run.rounds == 2 and len(run.pools.cache) == 5


@pytest.mark.parametrize(
    "settings",
    [{"iterations": -1}, {"threshold": 0}, {"threshold": 9.5}, {"growth": 0}, {"similarity": 1.1}, {"prompt": 0}],
)
def test_settings_are_checked(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Lion(**settings)


# Claims


class SmallStudent:
    """A decoder of two layers that reads words."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.words = ["=", *VERBS, *NAMES]
        config = Config(
            vocabulary=len(self.words),
            d_model=24,
            n_layers=2,
            n_heads=2,
            n_kv_heads=2,
            head_dim=12,
            d_ff=96,
            tied_embeddings=True,
        )
        self.model = initialize_(Decoder(config), self.generator, std=0.1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 5e-3)
        self.steps, self.scores = 100, []

    def tokens(self, texts):
        return torch.tensor([[self.words.index(word) for word in text.split()] for text in texts])

    def learn(self, lessons):
        rows = self.tokens(f"{instruction} = {answer}" for instruction, answer in lessons)
        batches = (rows[torch.randint(len(rows), (32,), generator=self.generator)] for _ in range(self.steps))

        def loss(model, batch):
            return label_loss(model(batch[:, :-1])[:, LENGTH + 1 :], batch[:, LENGTH + 2 :])

        train(self.model, self.optimizer, batches, self.steps, loss=loss, schedule=lambda progress: 1 - 0.9 * progress)
        self.steps = 40
        self.scores.append(self.score())

    def answer(self, instructions):
        rows = generate(self.model.eval(), self.tokens(f"{one} =" for one in instructions), LENGTH)
        return [" ".join(self.words[token] for token in row) for row in rows.tolist()]

    def score(self):
        """Share of right names in answers to unseen instructions, of each verb as many."""
        world = World()
        world.draw = random.Random(9)
        asked = [world.instruction(verb) for verb in VERBS for _ in range(20)]
        pairs = zip(self.answer(asked), map(world.right, asked), strict=True)
        return sum(sum(map(str.__eq__, ours.split(), right.split())) for ours, right in pairs) / (LENGTH * len(asked))


class Blind(Lion):
    """Asks as much, and then pays no heed: new instructions after any."""

    def discriminate(self, pools, roles, answer):
        super().discriminate(pools, roles, answer)
        return pools.cache, []


def loop(method):
    """Scores after each imitation, rounds, the seed, and how often it answered and judged; of verbs 5 to 8 there is little."""
    world, student = World(), SmallStudent()
    seed = [world.instruction(verb) for verb in VERBS for _ in range(2 if verb in RARE else 50)]
    rounds = method.teach(student, Prompted(world.ask), seed, torch.Generator().manual_seed(0))
    calls = Counter(role for role, _ in world.asked if role != "generator")  # what is too similar is asked for again
    return student.scores, rounds, seed, calls


@pytest.fixture(scope="module")
def targeted():
    return loop(Lion(growth=0.25))


def share(instructions):
    return sum(one.split()[0] in RARE for one in instructions) / len(instructions)


def test_claim_targeted_beats_blind(claim, targeted):
    """Oracle: the same loop without regard to what is hard, with as many calls and as many new instructions."""
    blind = loop(Blind(growth=0.25))
    assert targeted[3] == blind[3] and targeted[3]["referee"] > 1000
    assert [len(r.new_hard + r.new_easy) for r in targeted[1]] == [len(r.new_hard + r.new_easy) for r in blind[1]]
    claim("lion-distill", "targeted-beats-blind", targeted[0][-1] - blind[0][-1])


def test_claim_more_of_what_is_hard(claim, targeted):
    """Oracle: counting verbs: those that the seed has few of, among what was written."""
    new = [one for found in targeted[1] for one in found.new_hard + found.new_easy]
    claim("lion-distill", "more-of-what-is-hard", share(new) / share(targeted[2]))


def test_claim_rounds_help(claim, targeted):
    """Oracle: scores on unseen instructions after the first imitation and after the last."""
    assert len(targeted[0]) == 4
    claim("lion-distill", "rounds-help", targeted[0][-1] - targeted[0][0])


def test_claim_every_round_helps(claim, targeted):
    """Oracle: scores on unseen instructions after each imitation."""
    claim("lion-distill", "every-round-helps", min(b - a for a, b in itertools.pairwise(targeted[0])))
