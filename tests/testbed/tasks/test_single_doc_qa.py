"""Single-document QA: a solver by rules finds every answer in the text."""

import re

from refimpl.testbed import tasks

# how it is asked -> how it is told
READ = {
    r"Where does (\w+) live\?": r"- {} lives in (\w+)\.",
    r"What does (\w+) work as\?": r"- {} works as a (\w+)\.",
    r"Which pet does (\w+) have\?": r"- {} has a (\w+)\.",
    r"Which colour does (\w+) like\?": r"- {} likes (\w+)\.",
    r"What does (\w+) cook\?": r"- {} cooks (\w+)\.",
    r"What does (\w+) drink\?": r"- {} drinks (\w+)\.",
    r"What does (\w+) play\?": r"- {} plays the (\w+)\.",
}


def solve(context, question):
    for asked, told in READ.items():
        if found := re.search(asked, question):
            return re.findall(told.format(found[1]), context)
    raise AssertionError(question)


def test_every_answer_stands_in_the_text_once(generator):
    """Oracle: regular expressions over the text."""
    kinds = set()
    for sample in tasks.samples("single_doc_qa", 40, 512, generator):
        for question, answer in ((sample.question, sample.answer), *sample.more):
            assert [answer.strip()] == solve(sample.context, question)
            lead = question.partition("\nAnswer: ")[2]
            assert f"- {lead}{answer}." in sample.context.splitlines()  # begun as it was told
            kinds.add(lead.partition(" ")[2])
    assert len(kinds) >= len(READ) - 1


def test_longer_texts_hold_more_facts(generator):
    def most(length):
        return max(s.context.count("\n- ") for s in tasks.samples("single_doc_qa", 30, length, generator))

    assert most(1024) > 1.5 * most(256)
