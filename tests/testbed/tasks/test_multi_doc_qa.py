"""Multi-document QA: two look-ups in two documents give every answer."""

import re

from refimpl.testbed import tasks


def test_every_answer_follows_from_two_documents(generator):
    """Oracle: regular expressions over the text."""
    for sample in tasks.samples("multi_doc_qa", 30, 512, generator):
        for question, answer in ((sample.question, sample.answer), *sample.more):
            name = re.search(r"boss of (\w+) live", question)[1]
            (boss,) = re.findall(rf"- {name} works for (\w+)\.", sample.context)
            assert boss != name
            (city,) = re.findall(rf"- {boss} lives in (\w+)\.", sample.context)
            assert question.endswith(f"\nAnswer: {name} works for")
            assert answer == f" {boss}. {boss} lives in {city}"
            assert tasks.task("multi_doc_qa").score(f"Otto. Otto lives in {city}", answer) == 1
            assert tasks.task("multi_doc_qa").score(f"{boss}. {boss} lives in", answer) == 0


def test_documents_are_numbered_and_tell_of_one_person_each(generator):
    for sample in tasks.samples("multi_doc_qa", 10, 512, generator):
        numbers = [int(n) for n in re.findall(r"^Document (\d+)$", sample.context, re.M)]
        assert numbers == list(range(1, len(numbers) + 1))
        people = re.findall(r"^Document \d+\n- (\w+) works for \w+\.\n- (\w+) lives in", sample.context, re.M)
        assert len(people) == len(numbers)
        assert all(first == second for first, second in people)
        assert len({first for first, _ in people}) == len(people)
