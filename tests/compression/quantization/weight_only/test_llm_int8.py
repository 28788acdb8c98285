"""LLM.int8(): the decomposition written out token by token, and limiting cases."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.arena.weights import substrate
from refimpl.compression.folder import load_compressed, save_compressed
from refimpl.compression.protocol import compress
from refimpl.compression.quantization.activations import Activations, integer_weight
from refimpl.compression.quantization.weight_only.llm_int8 import LLMInt8
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_


def layer(generator, out=6, columns=20, rows=9, outliers=(3, 11)):
    """A weight, and inputs with outlier features, in each of which some tokens stay below the threshold."""
    weight, inputs = torch.randn(out, columns, generator=generator), torch.randn(rows, columns, generator=generator)
    inputs[::2, list(outliers)] *= 30
    return weight, inputs


def by_hand(weight, inputs, threshold):
    """The decomposition in float64, number by number; int8 codes are Python integers."""
    apart = {h for h in range(inputs.shape[1]) if any(abs(x) >= threshold for x in inputs[:, h].tolist())}
    output = torch.zeros(len(inputs), len(weight), dtype=torch.float64)
    for t, token in enumerate(inputs.double().tolist()):
        c_x = max(abs(x) for x in token if abs(x) < threshold) / 127
        for o, row in enumerate(weight.double().tolist()):
            c_w = max(abs(w) for w in row) / 127
            codes = [round(w / c_w) for w in row]
            integer = sum(
                round(x / c_x) * q for h, (x, q) in enumerate(zip(token, codes, strict=True)) if h not in apart
            )
            exact = sum(x * q * c_w for h, (x, q) in enumerate(zip(token, codes, strict=True)) if h in apart)
            output[t, o] = exact + integer * c_x * c_w
    return output.float(), apart


@pytest.mark.parametrize("threshold", [6.0, 2.0])
def test_equals_the_decomposition_by_hand(threshold, generator):
    """Oracle: Eq. (8), number by number in float64, with a token's scale from its entries below the threshold."""
    weight, inputs = layer(generator)
    expected, apart = by_hand(weight, inputs, threshold)
    held = LLMInt8(threshold=threshold)(weight)
    assert held.outliers(inputs).tolist() == sorted(apart)
    assert {3, 11} <= apart and len(apart) < 20
    assert_close(held.multiply(inputs), expected)
    assert not torch.allclose(LLMInt8(threshold=None)(weight).multiply(inputs), expected, rtol=1e-2)  # negative control


def test_worked_by_hand():
    """Oracle: by hand. Weights 127 and -2 in steps of 1. The second feature is apart for both tokens, since one of them has 8
    there; the other's 5 counts in its scale, of 5 / 127, and its 1 is 25 steps of it.
    """
    held = LLMInt8()(torch.tensor([[127.0, -2.0]]))
    inputs = torch.tensor([[1.27, 8.0], [1.0, 5.0]])
    assert_close(held.read(inputs), torch.tensor([[1.27, 8.0], [25 * 5 / 127, 5.0]]))
    assert_close(held.multiply(inputs), torch.tensor([[1.27 * 127 - 16], [25 * 5 - 10.0]]))


def test_without_outliers_it_is_vector_wise(generator):
    """Oracle: a grid for each row of both, from the shared form. A threshold that nothing reaches changes no bit."""
    weight, inputs = layer(generator, outliers=())
    expected = integer_weight(weight, Activations()).multiply(inputs)
    assert inputs.abs().max() < 6
    assert torch.equal(LLMInt8()(weight).multiply(inputs), expected)
    assert torch.equal(LLMInt8(threshold=None)(weight).multiply(inputs), expected)


def test_the_threshold_itself_is_an_outlier():
    """Oracle: the definition, at least 6.0; the number below it is none."""
    held = LLMInt8()(torch.ones(1, 3))
    below = torch.nextafter(torch.tensor(6.0), torch.tensor(0.0))
    assert held.outliers(torch.stack([below, torch.tensor(6.0), torch.tensor(-6.0)])[None]).tolist() == [1, 2]


def test_everything_an_outlier(generator):
    """Oracle: the product with the dense weight; the integers are all zero."""
    weight, inputs = torch.randn(6, 20, generator=generator), torch.randn(3, 20, generator=generator).sign() * 10
    held = LLMInt8()(weight)
    assert_close(held.multiply(inputs), inputs @ held.dense().T)
    assert torch.equal(held.read(inputs), inputs)


def test_batches_bias_and_single_tokens(generator):
    """Oracle: the same tokens as a matrix; outliers are those of the whole call."""
    weight, inputs = layer(generator, rows=6)
    held, bias = LLMInt8()(weight), torch.randn(6, generator=generator)
    assert_close(held.multiply(inputs.view(2, 3, 20), bias).view(6, 6), held.multiply(inputs, bias))
    assert_close(held.multiply(inputs[0]), held.multiply(inputs[:1])[0])
    assert_close(held.multiply(inputs, bias), held.read(inputs) @ held.dense().T + bias)
    alone = held.multiply(inputs[1:2])[0]
    assert not torch.equal(alone, held.multiply(inputs)[1])  # alone, its entries in features 3 and 11 are no outliers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outliers_keep_16_bits(dtype, generator):
    """Oracle: the inputs, bit by bit in outlier features, and Eq. (8) on the same numbers to a 16-bit number's precision."""
    weight, inputs = (tensor.to(dtype) for tensor in layer(generator))
    held = LLMInt8()(weight)
    read, output = held.read(inputs), held.multiply(inputs)
    assert read.dtype == output.dtype == dtype
    assert torch.equal(read[:, [3, 11]], inputs[:, [3, 11]])
    expected = by_hand(weight, inputs, 6.0)[0]
    assert (output.float() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


def test_a_compressed_model_comes_back_from_its_folder(tokens, logits, tmp_path):
    """Oracle: the model before saving; the threshold is kept, which is low enough here to tell."""
    sizes = {"vocabulary": 61, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
    model = initialize_(Decoder(Config(n_layers=2, **sizes)), torch.Generator().manual_seed(0), std=0.3)
    small = compress(model, LLMInt8(threshold=1.5))
    save_compressed(small, tmp_path / "small")
    assert torch.equal(logits(load_compressed(tmp_path / "small"), tokens), logits(small, tokens))
    assert not torch.equal(logits(compress(model, LLMInt8()), tokens), logits(small, tokens))  # negative control


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_configuration_is_checked(threshold):
    with pytest.raises(ValueError, match=r"threshold=.* must be above 0, or None for no decomposition"):
        LLMInt8(threshold=threshold)


def relative_error(weight, inputs, output):
    exact = inputs @ weight.T
    return float((output - exact).norm() / exact.norm())


def test_claim_inputs_are_cheap(claim, generator):
    """Output error with the decomposition over that of the same int8 weights with exact inputs; eight outlier features."""
    weight, inputs = substrate(generator)
    held = LLMInt8()(weight)
    ours, exact_inputs = held.multiply(inputs), inputs @ held.dense().T
    claim(
        "llm-int8",
        "inputs-cost-nothing",
        relative_error(weight, inputs, ours) / relative_error(weight, inputs, exact_inputs),
    )


def test_claim_decomposition(claim, generator):
    """Output error with the decomposition over that of vector-wise int8 alone; eight features of 512 are 20 times larger."""
    weight, inputs = substrate(generator)
    ours, plain = (LLMInt8(threshold=t)(weight).multiply(inputs) for t in (6.0, None))
    claim("llm-int8", "decomposition", relative_error(weight, inputs, ours) / relative_error(weight, inputs, plain))


def test_claim_vector_wise(claim, generator):
    """Output error of a scale for each row of inputs and weights over that of one scale for all of each; no outliers."""
    weight, inputs = torch.randn(64, 128, generator=generator), torch.randn(256, 128, generator=generator)
    weight, inputs = (
        m * torch.rand(len(m), 1, generator=generator) for m in (weight, inputs)
    )  # rows of different size
    vectors = LLMInt8(threshold=None)(weight).multiply(inputs)
    whole = integer_weight(weight, Activations(scope="tensor"), granularity="tensor").multiply(inputs)
    claim("llm-int8", "vector-wise", relative_error(weight, inputs, vectors) / relative_error(weight, inputs, whole))


def test_claim_memory(claim):
    """Bytes of a layer of 1024 x 1024 over those in 16 bit."""
    weight = torch.ones(1024, 1024, dtype=torch.float16)
    claim("llm-int8", "memory", LLMInt8()(weight).nbytes / weight.nbytes)
