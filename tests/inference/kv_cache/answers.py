"""Answers of the testbed's model through a cache: the prompt is read, the right answer is said after it, and every token of it must be the likeliest."""

import torch

from refimpl import testbed
from refimpl.model.generate import pad

TASKS = ("single_doc_qa", "few_shot", "retrieval", "code_completion")


@torch.no_grad()
def right(make_cache, chunk=None, rows=12, length=512, tasks=TASKS):
    """Share of answers that are right in every token, over so many samples of each task; `chunk` tokens of a prompt are read at once."""
    model, tokenizer = testbed.load()
    found = []
    for name in tasks:
        samples = testbed.tasks.samples(name, rows, length, torch.Generator().manual_seed(3))
        prompts, padding = pad([tokenizer.encode(sample.prompt).ids for sample in samples])
        answers = [tokenizer.encode(f"{sample.answer}\n").ids for sample in samples]
        cache = make_cache(model.config, prompts.shape[1])
        for part in torch.split(prompts, chunk or prompts.shape[1], dim=1):
            first = model(part, cache, padding)[:, -1:]
        cache.compress_prefill()
        said = torch.tensor([answer + [0] * (max(map(len, answers)) - len(answer)) for answer in answers])
        logits = first if said.shape[1] == 1 else torch.cat((first, model(said[:, :-1], cache, padding)), dim=1)
        best = logits.argmax(dim=-1)
        found += [best[i, : len(a)].tolist() == a for i, a in enumerate(answers)]
    return sum(found) / len(found)
