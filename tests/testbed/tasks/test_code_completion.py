"""Code completion: a call is completed as the definition says."""

import re

from refimpl.testbed import tasks


def test_the_call_repeats_the_parameters(generator):
    """Oracle: a regular expression over the module."""
    for sample in tasks.samples("code_completion", 30, 512, generator):
        for question, answer in ((sample.question, sample.answer), *sample.more):
            name = re.fullmatch(r"result = (\w+)\(", question)[1]
            assert re.findall(rf"^def {name}\((.*)\):$", sample.context, re.M) == [answer.removesuffix(")")]


def test_definitions_are_whole(generator):
    """Nothing is woven between a definition and its body."""
    for sample in tasks.samples("code_completion", 10, 512, generator):
        for question, _ in ((sample.question, ""), *sample.more):
            name = question.removeprefix("result = ").removesuffix("(")
            assert re.search(rf"^def {name}\(.*\):\n    pass$", sample.context, re.M)
