"""Few-shot learning: the label is that of the word's kind, which only the examples tell."""

import re

from refimpl.testbed import tasks, world

KIND = {word: kind for kind, fact in world.FACTS.items() for word in fact.values if kind != "colour"}


def test_the_label_is_that_of_the_kind(generator):
    """Oracle: the word lists, and the examples of the text."""
    for sample in tasks.samples("few_shot", 30, 512, generator):
        shown = re.findall(r"^- (\w+) => (\w+)$", sample.context, re.M)
        labels = {KIND[word]: label for word, label in shown}
        assert len(set(labels.values())) == len(labels) >= 2
        for question, answer in ((sample.question, sample.answer), *sample.more):
            word = re.fullmatch(r"- (\w+) =>", question)[1]
            assert word not in dict(shown)
            assert answer.strip() == labels[KIND[word]]


def test_labels_mean_something_else_in_every_text(generator):
    seen = {
        (KIND[word], label)
        for sample in tasks.samples("few_shot", 30, 512, generator)
        for word, label in re.findall(r"^- (\w+) => (\w+)$", sample.context, re.M)
    }
    assert len(seen) > 3 * 6  # a fixed code would give one label for each of the six kinds
