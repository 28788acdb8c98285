r"""A transformer encoder that says of every token whether it should stay.

Source: `llmlingua-2` (arXiv 2403.12968), Section 4, token classification model: $h = f_\theta(x)$,
$p(x_i) = \operatorname{softmax}(W h_i + b)$; official code microsoft/LLMLingua@e0e9d99beb94098bbd924aa53c2c112eac41c758,
`experiments/llmlingua2/model_training/train_roberta.py`.

Differs from the paper: the encoder is no XLM-RoBERTa or BERT, but this project's decoder with attention to both sides; there are no
special tokens around a text.

Not here: training (`training.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from refimpl.model.config import Config, Rope
from refimpl.model.generate import pad
from refimpl.model.model import Attention, Decoder, attend


class TokenClassifier(nn.Module):
    """Logits of discarding and keeping each token, from the tokens on both sides of it.

    Args:
        encoder: a decoder; from here on its attention sees both sides.

    Examples:
        >>> config = Config(vocabulary=9, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
        >>> classifier = TokenClassifier(Decoder(config))
        >>> classifier(torch.tensor([[1, 2, 3]])).shape, classifier.probabilities([[4, 5]])[0].shape
        (torch.Size([1, 3, 2]), torch.Size([2]))
    """

    def __init__(self, encoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.d_model, 2)
        for module in encoder.modules():
            if isinstance(module, Attention):
                module.attend = attend_both_sides

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits `[batch, time, 2]`, index 1 for keeping; what stands at padding means nothing.

        Args:
            tokens: `[batch, time]`.
            padding: `[batch]`, tokens of left padding in each row.
        """
        return self.head(self.encoder.hidden(tokens, padding=padding))  # type: ignore[no-any-return]

    @torch.no_grad()
    def probabilities(self, texts: Sequence[Sequence[int]], batch: int = 50) -> list[Tensor]:
        """Probability of keeping each token, for each text `[its tokens]`, float32, on the CPU.

        Args:
            texts: tokens of each, one or more.
            batch: texts at once; those of like length go together.
        """
        found: dict[int, Tensor] = {}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(texts), batch):
            rows = order[first : first + batch]
            tokens, padding = (x.to(self.head.weight.device) for x in pad([list(texts[i]) for i in rows]))
            logits = self(tokens, padding if padding.any() else None).float()
            for i, row in zip(rows, logits.softmax(dim=-1)[..., 1].cpu(), strict=True):
                found[i] = row[len(row) - len(texts[i]) :]
        return [found[i] for i in range(len(texts))]


def attend_both_sides(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:  # noqa: ARG001 - the substrate's
    """Attention of every token to all that are no padding: to those that the last one sees; see `AttentionFunction`."""
    return attend(q, k, v) if mask is None else attend(q, k, v, mask=mask[:, :, -1:, :])


def save(classifier: TokenClassifier, tokenizer: Tokenizer, path: Path) -> None:
    """Write weights in float16, shape and tokenizer into one safetensors file."""
    weights = {name: value.detach().to("cpu", torch.float16) for name, value in classifier.state_dict().items()}
    shape = json.dumps(asdict(classifier.encoder.config))
    save_file(weights, path, {"config": shape, "tokenizer": tokenizer.to_str()})


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[TokenClassifier, Tokenizer]:
    """Read what `save` wrote: the classifier, in evaluation mode and float32, and its tokenizer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was not written by `save`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `save` writes what `train_classifier` made")
    with safe_open(path, framework="pt") as file:
        stated = file.metadata() or {}
        if not {"config", "tokenizer"} <= stated.keys():
            raise ValueError(f"{path}: holds no classifier; `save` writes one with its shape and tokenizer")
        shape = json.loads(stated["config"])
        shape |= {"rope": Rope(**shape["rope"]), "sliding_window": tuple(shape["sliding_window"])}
        classifier = TokenClassifier(Decoder(Config(**shape)))
        classifier.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118 - no mapping
    return classifier.to(device).eval(), Tokenizer.from_str(stated["tokenizer"])
