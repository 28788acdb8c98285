"""The testbed's tokenizer: byte-level BPE of 2,048 entries in which every digit and every line break stands alone.

Tokens never reach over a line's end, so that a text has as many as its lines together.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CHECKPOINT = Path(__file__).parent / "checkpoint"
VOCABULARY = 2048
END, END_ID = "<|end|>", 0  # between documents; special tokens are numbered first


@cache
def tokenizer() -> Tokenizer:
    """The committed tokenizer.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = CHECKPOINT / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `python -m refimpl.testbed.train` makes it")
    return Tokenizer.from_file(str(path))


def learn(texts: Iterable[str], lines: Iterable[str]) -> Tokenizer:
    """A tokenizer of these texts in which each word of `lines`, with the space before it, is one entry.

    Args:
        texts: what merges are counted in.
        lines: made of the words of the tasks' world; BPE has no list of words, so they are counted in as often as it takes.

    Returns:
        The tokenizer; 2,048 entries if the texts are long enough.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*texts, *(line * 2000 for line in lines)], trainer)
    return made
