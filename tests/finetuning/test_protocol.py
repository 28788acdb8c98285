"""What holds for every fine-tuning method; the list of methods is the taxonomy's."""

import copy
from dataclasses import asdict

import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import taxonomy

METHODS = taxonomy.load().find(category="finetuning", implemented=True)
TOKENS = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=METHODS, ids=lambda method: method.id)
def entry(request):
    """A method as the taxonomy knows it."""
    return request.param


@pytest.fixture
def method(entry):
    """The method at its default settings."""
    return entry.load()()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def train(method, model, steps=3):
    """A few steps of AdamW on what the method trains."""
    optimizer = torch.optim.AdamW(method.trainable(model).values(), lr=0.02, weight_decay=0.0)
    for _ in range(steps):
        loss = cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def adapted(method, model, seed=0):
    return train(method, method.inject(model, torch.Generator().manual_seed(seed)))


def test_there_are_methods():
    assert METHODS


def test_training_moves_what_trainable_names_and_nothing_else(method, llama):
    """Oracle: the state before, entry by entry, bit by bit."""
    model = method.inject(llama(), torch.Generator())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = dict(method.trainable(model))
    assert named and all(parameter.requires_grad for parameter in named.values())
    after = train(method, model).state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == set(named)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in named)


def test_few_parameters_train(entry, method, llama):
    """Oracle: the facet `training`."""
    if entry.facets.training != "partial":
        pytest.skip(f"facet training: {entry.facets.training}")
    model = llama()
    all_of_it = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in method.trainable(method.inject(model)).values())
    assert 0 < trained < all_of_it / 4


def test_merging_changes_no_output(method, llama):
    """Oracle: the unmerged model, after training has moved its outputs."""
    model = adapted(method, llama())
    expected = logits(model)
    assert (expected - logits(llama())).abs().max() > 0.01  # negative control
    assert_close(logits(method.merge(model)), expected, rtol=1e-4, atol=1e-4)  # logits of size 10 through 2 layers


def test_merging_restores_the_modules(entry, method, llama):
    """Oracle: the model before, and the facet `changes_architecture`."""
    if entry.facets.changes_architecture:
        pytest.skip("facet changes_architecture: the served model has other modules")

    def outline(model):
        return {n: type(m) for n, m in model.named_modules()}, {
            n: (v.shape, v.dtype) for n, v in model.state_dict().items()
        }

    model = method.inject(llama())
    assert outline(method.merge(model)) == outline(llama())


def test_the_bases_tensors_are_never_written(entry, method, llama):
    """Oracle: a copy of every tensor the model held."""
    if entry.facets.training == "full":
        pytest.skip("facet training: full, the weights themselves are trained")
    model = llama()
    held = [(tensor, tensor.clone()) for tensor in (p.detach() for p in model.parameters())]
    method.merge(adapted(method, model))
    assert all(torch.equal(tensor, value) for tensor, value in held)


def test_what_trains_is_all_that_needs_storing(method, llama):
    """Oracle: the adapted model. Base, settings, seed and the trained values rebuild it."""
    model = adapted(method, llama())
    stored = {name: parameter.detach().clone() for name, parameter in method.trainable(model).items()}
    again = method.inject(llama(), torch.Generator().manual_seed(0))
    again.load_state_dict(stored, strict=False)
    assert torch.equal(logits(again), logits(model))


def test_a_batch_equals_its_rows(method, llama):
    """Oracle: the rows one by one."""
    model = adapted(method, llama()).eval()
    assert_close(
        logits(model), torch.cat([logits(model, row[None]) for row in TOKENS]), rtol=1e-4, atol=1e-4
    )  # as above


def test_same_seed_same_result(method, llama):
    assert torch.equal(logits(adapted(method, llama())), logits(adapted(method, llama())))


def test_a_configuration_holds_nothing_of_a_model(method, llama):
    """Oracle: a fresh configuration; two models adapted by one share no parameter and do not see each other."""
    first, untouched = adapted(method, llama()), copy.deepcopy(method)
    expected = logits(first)
    second = adapted(method, llama(), seed=1)
    assert torch.equal(logits(first), expected) and method == untouched
    assert not set(method.trainable(first).values()) & set(method.trainable(second).values())


def test_configuration_survives_yaml(method):
    assert type(method)(**yaml.safe_load(yaml.safe_dump(asdict(method)))) == method


def test_works_on_any_module(method):
    """Oracle: merging changes no output; a model that is not transformers' and has layers of the usual names."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(9, 11) for _ in range(3))

        def forward(self, x):
            return (self.q_proj(x) * self.k_proj(x)).tanh() + self.v_proj(x)

    torch.manual_seed(0)
    model, x = method.inject(Mixer()), torch.randn(5, 9)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(x)
        assert_close(method.merge(model)(x), expected)
