"""The corpus: real text, a part of it held out, and lines whose tokens add up."""

import ast

import pytest
import torch

from refimpl.testbed import corpus
from refimpl.testbed.tokenizer import END, tokenizer


def test_no_document_is_in_both_splits():
    train, held_out = corpus.documents("train"), corpus.documents("held-out")
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / len(train) < 0.1
    assert not {"json/tool.py", "json/decoder.py"} - {*train, *held_out}


def test_documents_are_the_interpreters_own():
    """Oracle: Python itself can read them."""
    modules = {name: text for name, text in corpus.documents("held-out").items() if name.endswith(".py")}
    assert len(modules) > 5
    assert all(ast.parse(text) for text in modules.values())


def test_tokens_begin_with_the_first_document_and_end_each():
    """Oracle: the tokenizer's own decoding."""
    documents = corpus.documents("held-out")
    tokens = corpus.tokens("held-out")
    ends = (tokens == tokenizer().token_to_id(END)).nonzero().flatten()
    assert len(ends) == len(documents)
    first = tokenizer().decode(tokens[: ends[0]].tolist())
    assert first == next(iter(documents.values()))


def test_fewer_tokens_are_the_beginning_of_more():
    assert torch.equal(corpus.tokens("held-out", 1000), corpus.tokens("held-out")[:1000])


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"'held-out' has [\d,]+ tokens, fewer than n=1,000,000,000"):
        corpus.tokens("held-out", 10**9)
    with pytest.raises(ValueError, match="split='test' must be"):
        corpus.documents("test")


@pytest.mark.parametrize("language", ["code", "prose", "any"])
def test_sizes_of_lines_add_up(language):
    """Oracle: the tokenizer on all of them at once."""
    lines = corpus.lines("held-out", language)
    assert len(lines.lines) == len(lines.sizes) == len(lines.until) - 1
    assert lines.until[-1] == sum(lines.sizes)
    assert lines.until[200] == len(tokenizer().encode("".join(lines.lines[:200])).ids)


def test_code_is_code_and_prose_is_not():
    code, prose = (corpus.lines("held-out", language).lines for language in ("code", "prose"))

    def share(lines):
        return sum(line.strip().startswith(("def ", "return", "if ", "self.")) for line in lines) / len(lines)

    assert share(code) > 0.1 > 0.05 > share(prose)
