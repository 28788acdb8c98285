"""What the testbed's model can do: `python -m refimpl.testbed.evaluate`. It also writes the model's card.

Scores come from greedy answers, as a user would get them, not from teacher forcing. Beside each stands the score of who guesses
without reading, and that of the same model that is shown the last 128 tokens only.
"""

import json
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from refimpl import testbed
from refimpl.model.model import Decoder
from refimpl.model.train import perplexity

CUT = 128  # tokens that the model without long context is shown


def scores(subject: testbed.Subject, n: int, length: int) -> dict[str, dict[str, float]]:
    """For every task: `score`, `guess` and `cut`, each the mean of n samples of `length` tokens."""
    found = {}
    for name in testbed.tasks.NAMES:
        samples = testbed.tasks.samples(name, n, length, torch.Generator().manual_seed(0))
        found[name] = {
            "score": subject.score(name, samples),
            "guess": testbed.tasks.blind_score(name, n, length, torch.Generator().manual_seed(0)),
            "cut": subject.score(name, samples, last=CUT),
        }
    return found


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# The testbed of effllm

A model of the Llama family of {parameters:,} parameters, shaped as Qwen2, on which the survey's methods are run: {config}. Context {length} tokens, a
tokenizer of 2,048 entries with single digits. Stored in bfloat16, {bytes:.1f} MB; loads in `transformers` with the same logits.

**Data.** The sources and the documentation of CPython {python}'s standard library (every twentieth file held out, by its name) and
the seven tasks of `refimpl/testbed/tasks`, drawn anew in every step around that text.

**Training.** `python -m refimpl.testbed.train`, seed {seed}: {steps:,} steps of {row_tokens:,} tokens, {tokens:.0f} million in all: {stages};
copies are rows of random tokens that repeat themselves. The weights it starts from hold a circuit that copies (`refimpl/testbed/start.py`),
which is trained with all the rest. Muon for the matrices, AdamW for the rest, bfloat16 autocast. The loss is the mean over the steps since the
row before, in nats: that of answers plus that of all other tokens; the scores are shares of answers right in every token, by teacher
forcing, at the longest of these lengths. {remark}

{curve}

**What it can do.** {n} held-out samples of each task, {length} tokens long, answered greedily. *Guess* is the score of who knows the task and
has not read the text; *cut* is this model shown the last {cut} tokens only.

{scores}

Perplexity of held-out text, in windows of {length} tokens: {perplexity:.2f}.

**What it can't do.** It knows no language beyond these texts: no chat, no facts of the world, no reasoning but the two hops that it was
taught. Scores say what a method preserves of it, not how good it would be on a large model.
"""


def card(model: Decoder, found: dict[str, dict[str, float]], text_perplexity: float, n: int, length: int) -> str:
    """The model's card, in Markdown."""
    from refimpl.testbed import train

    stored = json.loads((testbed.CHECKPOINT / "training.json").read_text(encoding="utf-8"))
    config = model.config
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        config=(
            f"{config.n_layers} layers, d_model {config.d_model}, {config.n_heads} heads of {config.head_dim} over "
            f"{config.n_kv_heads} key heads with biases, SwiGLU of {config.d_ff}, RoPE of base {config.rope.theta:,.0f}, tied embeddings"
        ),
        length=length,
        bytes=(testbed.CHECKPOINT / "model.safetensors").stat().st_size / 1e6,
        python=stored["python"],
        seed=train.SEED,
        steps=stored["log"][-1]["step"],
        row_tokens=train.ROW_TOKENS,
        tokens=stored["log"][-1]["step"] * train.ROW_TOKENS / 1e6,
        stages=", then ".join(_stage(**stage) for stage in stored["stages"]),
        remark=stored["remark"],
        curve=_table([_rounded(row) for row in stored["log"]]),
        n=n,
        cut=CUT,
        scores=_table([{"task": name} | _rounded(row) for name, row in found.items()]),
        perplexity=text_perplexity,
    )


def _stage(steps: int, lengths: Sequence[int], copies: float) -> str:
    """A stage of training in words.

    Examples:
        >>> _stage(1500, [256, 256, 1024], 0.2)
        '1,500 at lengths 256, 256 or 1024 with 20% copies'
    """
    *others, last = map(str, lengths)
    words = f"{steps:,} at length{'s' if others else ''} {', '.join(others)}{' or ' if others else ''}{last}"
    return words + (f" with {copies:.0%} copies" if copies else "")


def _rounded(row: dict[str, float]) -> dict[str, str]:
    return {
        key: f"{value:,.0f}" if key in ("step", "length", "seconds") else f"{value:.2f}" for key, value in row.items()
    }


def _table(rows: Sequence[dict[str, str]]) -> str:
    head = list(rows[0])
    body = [head, ["---"] * len(head), *([row[key] for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)


def main(
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 200,
    write: Annotated[bool, typer.Option("--write", help="Write the model's card, too.")] = False,
) -> None:
    """Measure the committed model on every task."""
    subject = testbed.subject()
    model, length = subject.model, subject.model.config.max_positions
    found = scores(subject, samples, length)
    text = perplexity(model, testbed.corpus.tokens("held-out"), length)
    typer.echo(json.dumps({"perplexity": text, **found}, indent=1))
    if write:
        (testbed.CHECKPOINT / "README.md").write_text(card(model, found, text, samples, length), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
