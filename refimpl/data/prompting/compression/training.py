r"""Training of a token classifier on texts that a teacher shortened.

Source: `llmlingua-2` (arXiv 2403.12968), Section 4: the loss $\frac{1}{N}\sum_i \operatorname{CE}(y_i, p(x_i))$ over tokens, with Adam;
official code microsoft/LLMLingua@e0e9d99beb94098bbd924aa53c2c112eac41c758, `experiments/llmlingua2/model_training/train_roberta.py`.

Differs from the paper: the encoder starts from random weights, so that rate and number of steps are ours, and the rate falls; texts
keep their words and commas, where the code trains on lemmas; padding has no part in the loss.

Not here: the choice of the best epoch on held-out texts.

The classifier that comes with `llmlingua2.py` was made by

    python -m refimpl.testbed.pairs pairs.jsonl
    python -m refimpl.data.prompting.compression.training pairs.jsonl refimpl/testbed/checkpoint OUT.safetensors

which takes a minute on one core. A file of other pairs, one JSON list of original and compressed text in each line, and the folder of
another tokenizer give another one.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from refimpl.data.prompting.compression.annotation import Annotation, annotate, trusted
from refimpl.data.prompting.compression.token_classifier import TokenClassifier, save
from refimpl.model.config import Config
from refimpl.model.load import tokenizer
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train

IGNORED = -100  # label of padding
Labelled = tuple[list[int], list[int]]  # tokens of a text, and 1 for each that stays


def classification_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, over all tokens but padding.

    Args:
        model: a `TokenClassifier`.
        batch: `[2, batch, time]`, tokens and labels, as `stacked` makes it.
    """
    tokens, labels = batch
    logits = model(tokens, (labels == IGNORED).sum(dim=1))
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def labelled(annotations: Iterable[Annotation], tokenizer: Tokenizer) -> list[Labelled]:
    """Labels of words, given to their tokens: each has the label of the word that it ends in. Texts without tokens are left out."""
    found = []
    for words, labels, *_ in annotations:
        encoding = tokenizer.encode("".join(words), add_special_tokens=False)
        if not encoding.ids:
            continue
        ends = torch.tensor([len(word) for word in words]).cumsum(0)
        last = torch.tensor([end - 1 for _, end in encoding.offsets])
        of_word = torch.searchsorted(ends, last, right=True)
        found.append((encoding.ids, torch.tensor(labels).long()[of_word].tolist()))
    return found


def stacked(texts: Sequence[Labelled]) -> Tensor:
    """Texts of different lengths as one batch, `[2, batch, longest]`, tokens and labels, padded at the left."""
    longest = max(len(tokens) for tokens, _ in texts)
    rows = [
        ([0] * (longest - len(tokens)) + tokens, [IGNORED] * (longest - len(tokens)) + labels)
        for tokens, labels in texts
    ]
    return torch.tensor(rows).transpose(0, 1)


def train_classifier(
    texts: Sequence[Labelled],
    encoder: Decoder,
    generator: torch.Generator,
    *,
    steps: int,
    batch: int = 10,
    rate: float = 3e-3,
) -> tuple[TokenClassifier, list[float]]:
    """Draw weights, and train with Adam at a rate that falls to a tenth, on batches drawn from the texts.

    Args:
        texts: tokens and labels.
        encoder: its shape counts, its weights are drawn anew.
        generator: source of weights and order, on the CPU.
        steps: updates.
        batch: texts in each; the paper's 10.
        rate: the first steps' learning rate. The paper's $10^{-5}$ is for a pre-trained encoder.

    Returns:
        The classifier in evaluation mode, and the loss of each step.

    Raises:
        ValueError: no texts, or fewer than one step.
    """
    if not texts:
        raise ValueError("texts is empty; annotate some pairs")
    initialize_(encoder, generator)
    classifier = TokenClassifier(encoder)
    nn.init.zeros_(classifier.head.weight)
    nn.init.zeros_(classifier.head.bias)

    def batches() -> Iterator[Tensor]:
        while True:
            for rows in torch.split(torch.randperm(len(texts), generator=generator), batch):
                yield stacked([texts[i] for i in rows.tolist()])

    optimizer = torch.optim.Adam(classifier.parameters(), lr=rate)
    losses = train(
        classifier, optimizer, batches(), steps, loss=classification_loss, schedule=lambda done: 1 - 0.9 * done
    )
    return classifier.eval(), losses


def small_encoder(vocabulary: int, d_model: int = 48, n_layers: int = 2) -> Decoder:
    """An encoder that trains in a minute on one core."""
    return Decoder(
        Config(
            vocabulary=vocabulary,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=d_model // 16,
            n_kv_heads=d_model // 16,
            head_dim=16,
            d_ff=2 * d_model,
            tied_embeddings=True,
            max_positions=512,
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Annotate a file of pairs, leave out those not trusted, train, and save."""
    parser = argparse.ArgumentParser(
        description="Train a classifier of tokens on pairs of original and compressed text."
    )
    parser.add_argument("pairs", type=Path, help="JSON lines, each [original, compressed]")
    parser.add_argument("tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    encoder = tokenizer(given.tokenizer)
    pairs = [json.loads(line) for line in given.pairs.read_text(encoding="utf-8").splitlines()]
    found = trusted(annotate(original, compressed, window=max(1, len(original))) for original, compressed in pairs)
    classifier, losses = train_classifier(
        labelled(found, encoder),
        small_encoder(encoder.get_vocab_size()),
        torch.Generator().manual_seed(given.seed),
        steps=given.steps,
    )
    save(classifier, encoder, given.out)
    last = losses[-10:]
    print(f"{len(found)} of {len(pairs)} pairs; loss of the last {len(last)} steps {sum(last) / len(last):.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
