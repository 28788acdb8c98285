"""Train the testbed's model: `python -m refimpl.testbed.train`. About an hour on two cores; it resumes where it was stopped.

A step sees rows of real text, rows of the tasks, and rows of random tokens that repeat themselves; the answers' mean loss counts as
much as that of all other tokens. The weights it starts from copy already (`start`). Some contexts have the 1,024 tokens of the
tasks from the beginning, so that no distance is new later.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from refimpl.model.config import Config, Rope
from refimpl.model.load import save
from refimpl.model.model import Decoder
from refimpl.testbed import corpus, tasks, world
from refimpl.testbed.sample import Sample
from refimpl.testbed.start import start
from refimpl.testbed.tokenizer import CHECKPOINT, END, END_ID, VOCABULARY, learn, tokenizer

CONFIG = Config(
    vocabulary=VOCABULARY,
    d_model=192,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    d_ff=512,
    rope=Rope(theta=100_000.0),
    qkv_bias=True,
    tied_embeddings=True,
    max_positions=1024,
)
SEED = 0
ROW_TOKENS = 8192  # in a step
SHARES = {
    "text": 0.20,
    "single_doc_qa": 0.12,
    "multi_doc_qa": 0.14,
    "summarization": 0.10,
    "few_shot": 0.08,
    "code_completion": 0.09,
    "retrieval": 0.15,
    "needle": 0.12,
}
QUESTION_TOKENS = {
    "single_doc_qa": 42,
    "multi_doc_qa": 51,
    "few_shot": 128,
    "code_completion": 42,
    "retrieval": 128,
}  # of context, for each


@dataclass(frozen=True)
class Stage:
    """Steps with one mixture of rows.

    Attributes:
        steps: how many.
        lengths: of contexts; each step draws one of these.
        copies: share of rows that only repeat themselves.
    """

    steps: int
    lengths: tuple[int, ...]
    copies: float = 0.0


STAGES = (Stage(1000, (256, 256, 1024), copies=0.15), Stage(1600, (256, 1024, 1024, 1024), copies=0.1))
WARMUP, DECAY = 100, 1000  # steps
MUON_RATE, ADAM_RATE = 0.004, 3e-3
M = TypeVar("M", bound=nn.Module)
ANSWER, OTHER, NOTHING = 2, 1, 0  # what a token is as a target


class Batch(NamedTuple):
    """Rows `[rows, length + 1]` of tokens, and what each is as a target: part of an answer, another one, or none."""

    tokens: Tensor
    roles: Tensor


def batch_at(step: int, stage: Stage) -> Batch:
    """The rows of one step; they depend on the seed, the step and the stage alone, so that a resumed run sees the same."""
    draw = Random(f"{SEED}/{step}/{stage}")
    length = draw.choice(stage.lengths)
    shares = {name: (1 - stage.copies) * share for name, share in SHARES.items()}
    if stage.copies:
        shares["copy"] = stage.copies
    kinds = draw.choices(list(shares), list(shares.values()), k=ROW_TOKENS // length)
    rows = [
        _text(length, draw) if kind == "text" else _copy(length, draw) if kind == "copy" else _task(kind, length, draw)
        for kind in kinds
    ]
    tokens, roles = zip(*rows, strict=True)
    return Batch(torch.stack(tokens), torch.stack(roles))


def _copy(length: int, draw: Random) -> tuple[Tensor, Tensor]:
    """Tokens without sense, again and again: all that can be learnt from it is to look up what came next the last time."""
    period = draw.randint(8, length // 4)
    tokens = torch.tensor(draw.choices(range(VOCABULARY), k=period))
    roles = torch.full((length + 1,), OTHER)
    roles[:period] = NOTHING
    return tokens.repeat(length // period + 1)[: length + 1], roles


def _text(length: int, draw: Random) -> tuple[Tensor, Tensor]:
    text = corpus.tokens("train")
    start = draw.randrange(len(text) - length)
    return text[start : start + length + 1], torch.full((length + 1,), OTHER)


def _task(name: str, length: int, draw: Random) -> tuple[Tensor, Tensor]:
    """A row of one task, filled up with ends that are no targets; longer ones ask more."""
    module = tasks.task(name)
    size = draw.choice((length, length, length // 2)) if length > 256 else length
    options = _needles(length, draw) if name == "needle" else {}
    if name in QUESTION_TOKENS:
        options["turns"] = max(2, size // QUESTION_TOKENS[name])
    sample = module.sample(size, corpus.lines("train", module.FILLER), draw, **options)
    return encode(sample, length + 1)


def _needles(length: int, draw: Random) -> dict[str, int]:
    """Mostly a few short phrases; now and then a single one of up to 64 words."""
    if length >= 256 and draw.random() < 0.25:
        return {"words": draw.randint(8, 64 if length > 256 else 48), "needles": 1}
    return {"words": draw.randint(1, 8), "needles": draw.randint(1, 4)}


def encode(sample: Sample, length: int) -> tuple[Tensor, Tensor]:
    """A sample with all its questions as one row of `length` tokens, and what each is; ends fill it up and are no targets."""
    pieces, said = [sample.context], [OTHER]
    for question, answer in ((sample.question, sample.answer), *sample.more):
        pieces += [question, f"{answer}\n"]
        said += [OTHER, ANSWER]
    encoded = [encoding.ids for encoding in tokenizer().encode_batch_fast(pieces)]
    tokens = [token for ids in encoded for token in ids]
    roles = [role for ids, role in zip(encoded, said, strict=True) for _ in ids]
    gap = length - len(tokens)
    if gap < 0:
        raise ValueError(f"a sample of {len(tokens)} tokens does not fit in {length}")
    return torch.tensor(tokens + [END_ID] * gap), torch.tensor(roles + [NOTHING] * gap)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens plus that of the others, in nats; the model gives logits of tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.tokens[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    roles = batch.roles[:, 1:].flatten()
    answers, others = ((roles == role).float() for role in (ANSWER, OTHER))
    return (losses * answers).sum() / answers.sum().clamp_min(1) + (losses * others).sum() / others.sum().clamp_min(1)


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of linear layers but an output layer's, AdamW for all else: embeddings, norms, biases, decays."""
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    matrices = [module.weight for module in linears]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rates: up over `WARMUP` steps, level, down to zero over the last `DECAY`."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / DECAY)


class Run(Generic[M]):
    """A training run: model, optimizers and step, which a folder keeps.

    Args:
        folder: where state and log are written, and read if they are there.
        model: what to train, as it is before the first step.
        loss: of the model and a batch; a compiled form of `loss_of`, for one that takes half the time.
    """

    def __init__(self, folder: Path, model: M, loss: Callable[[M, Batch], Tensor] = loss_of) -> None:
        self.folder, self.model, self.loss = folder, model, loss
        self.optimizers = optimizers_of(self.model)
        self.step = 0
        self.log: list[dict[str, float]] = []
        if (folder / "state.safetensors").exists():
            self._read()

    def __iter__(self) -> Iterator[Stage]:
        """The stages of the steps that remain."""
        stages = [stage for stage in STAGES for _ in range(stage.steps)]
        while self.step < len(stages):
            yield stages[self.step]

    def advance(self, stage: Stage) -> float:
        """One step; the loss before it."""
        steps = sum(stage.steps for stage in STAGES)
        self.model.train()
        loss = self.loss(self.model, batch_at(self.step, stage))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(self.step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def write(self) -> None:
        """Put the state into the folder; the old one stands until the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{i}/{j}/{key}": value.contiguous() for key, value in state.items()}
        fresh = self.folder / "state.safetensors.new"
        save_file(tensors, fresh, {"step": str(self.step), "log": json.dumps(self.log)})
        fresh.replace(self.folder / "state.safetensors")

    def _read(self) -> None:
        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        self.step, self.log = int(about["step"]), json.loads(about["log"])
        self.model.load_state_dict(
            {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        )
        for i, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer/{i}/"):
                    _, _, j, key = name.split("/")
                    states.setdefault(int(j), {})[key] = tensor
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


@torch.no_grad()
def teacher_forced(model: nn.Module, name: str, rows: int, length: int) -> float:
    """Share of first answers that are right in every token if the tokens before are given."""
    model.eval()
    samples = tasks.samples(name, rows, length, torch.Generator().manual_seed(1))
    right = 0
    for group in range(0, rows, 16):
        pairs = [encode(sample._replace(more=()), length + 1) for sample in samples[group : group + 16]]
        tokens, roles = (torch.stack(column) for column in zip(*pairs, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            best = model(tokens[:, :-1]).argmax(dim=-1)
        right += int(((best == tokens[:, 1:]) | (roles[:, 1:] != ANSWER)).all(dim=1).sum())
    return right / rows


def fresh() -> Decoder:
    """The model before its first step."""
    return start(CONFIG, torch.Generator().manual_seed(SEED))


def main(
    folder: Annotated[Path, typer.Option(help="State and log of the run.")] = Path("build/testbed"),
    every: Annotated[int, typer.Option(help="Steps between scores, which are also those between saved states.")] = 200,
    compiled: Annotated[
        bool, typer.Option(help="Compile the step: half the time, but it needs a C++ compiler.")
    ] = True,
) -> None:
    """Train, or go on with a run that was stopped."""
    if not (CHECKPOINT / "tokenizer.json").exists():
        CHECKPOINT.mkdir(exist_ok=True)
        learn_tokenizer().save(str(CHECKPOINT / "tokenizer.json"))
    run = Run(folder, fresh(), torch.compile(loss_of, dynamic=False) if compiled else loss_of)
    finish(run, every)
    publish(run, STAGES)


def finish(run: Run[Any], every: int) -> None:
    """All steps that remain; after every so many, scores are logged and the state is written."""
    since, losses = time.perf_counter(), list[float]()
    for stage in run:
        losses.append(run.advance(stage))
        if run.step % every == 0:
            scores = {name: teacher_forced(run.model, name, 64, max(stage.lengths)) for name in tasks.NAMES}
            seconds = time.perf_counter() - since
            row = {
                "step": run.step,
                "length": max(stage.lengths),
                "loss": sum(losses) / len(losses),
                "seconds": seconds,
                **scores,
            }
            run.log.append(row)
            typer.echo(" ".join(f"{key} {value:.3g}" for key, value in row.items()))
            run.write()
            since, losses = time.perf_counter(), []


def learn_tokenizer() -> Tokenizer:
    """The tokenizer of the corpus, in which the words of the tasks' world are single tokens."""
    lines = [f"{world.GRAMMAR}\n", *(f"- {word}\n" for word in sorted(world.WORDS))]
    return learn(corpus.documents("train").values(), lines)


def publish(run: Run[Decoder], stages: Sequence[Stage], remark: str = "") -> None:
    """Write the checkpoint: weights in bfloat16, config, tokenizer's config, and a log.

    Args:
        run: what was trained.
        stages: those that it went through.
        remark: what else whoever reads the log should know, where these stages alone would not give the same weights.
    """
    save(run.model.bfloat16(), CHECKPOINT)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": CONFIG.max_positions}
    (CHECKPOINT / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    log = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": corpus.digest(),
        "stages": [asdict(stage) for stage in stages],
        "remark": remark,
        "log": run.log,
    }
    (CHECKPOINT / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
