"""LoRA: the closed form, its gradients, PEFT's outputs and files, and what is left after merging."""

import copy
import json
import math

import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from refimpl.arena import finetuning as arena
from refimpl.finetuning.peft.lora.lora import LoRA, LoRALinear, low_rank_change
from refimpl.model.linear import sizes

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it


@pytest.fixture(autouse=True)
def seeded():
    """Layers are drawn from PyTorch's global generator."""
    torch.manual_seed(0)


def trained(model, method, generator, size=0.1):
    """The model, injected, with factors as training could have left them."""
    method.inject(model, generator)
    with torch.no_grad():
        for name, factor in method.trainable(model).items():
            if name.endswith("lora_B"):
                factor.copy_(size * torch.randn(factor.shape, generator=generator))
    return model


OURS = {"llama": ("*q_proj", "*.1.mlp.down_proj"), "gpt2": ("*c_attn", "*.1.mlp.c_proj")}
THEIRS = {"llama": ["q_proj", "1.mlp.down_proj"], "gpt2": ["c_attn", "1.mlp.c_proj"]}


def logits(model, seed=1):
    tokens = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens).logits


def test_worked_by_hand():
    """Oracle: by hand. W = 0, A = [1 2], B = [3], alpha / r = 4 / 1: h = 4 * 3 * (1 * 5 + 2 * 6) = 204."""
    layer = LoRALinear(nn.Linear(2, 1, bias=False), rank=1, scale=LoRA(rank=1, alpha=4.0).scale)
    for tensor, value in [(layer.base.weight, [[0, 0]]), (layer.lora_A, [[1, 2]]), (layer.lora_B, [[3]])]:
        tensor.data = torch.tensor(value, dtype=torch.float32)
    assert layer(torch.tensor([5.0, 6.0])).tolist() == [204.0]
    assert layer.weight.tolist() == [[12.0, 24.0]]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 7, 5), (2, 3, 7, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_dense_form(shape, bias, generator):
    """Oracle: closed form, (W + alpha / r BA) x + b, in float64."""
    base = nn.Linear(5, 6, bias=bias, dtype=torch.float64)
    model = trained(nn.Sequential(base), LoRA(rank=3, alpha=7.0, target=("0",)), generator)
    layer, x = model[0], torch.randn(shape, generator=generator, dtype=torch.float64)
    dense = base.weight + 7 / 3 * layer.lora_B @ layer.lora_A
    assert_close(model(x), linear(x, dense, base.bias))
    assert_close(layer.weight, dense)
    assert (model(x) - base(x)).abs().min() > 1e-5  # negative control: every output moved


@pytest.mark.parametrize(("settings", "scale"), [({}, 1.0), ({"alpha": 32.0, "rank": 4}, 8.0), ({"rank": 16}, 0.5)])
def test_scale(settings, scale):
    """Oracle: by hand, alpha / r; rank-stabilized alpha / sqrt(r) is larger by sqrt(r)."""
    method = LoRA(**settings)
    assert method.scale == scale
    assert LoRA(**settings, rank_stabilized=True).scale == pytest.approx(scale * math.sqrt(method.rank))


def test_gradients_equal_those_of_the_dense_form(generator):
    """Oracle: chain rule on the dense form, dA = s B'G and dB = s GA' for G the gradient of the dense weight."""
    layer = trained(nn.Sequential(nn.Linear(5, 6).double()), LoRA(rank=2, alpha=3.0, target=("*",)), generator)[0]
    x, y = (torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (5, 6))
    (layer(x) - y).pow(2).sum().backward()
    dense = layer.weight.detach().requires_grad_()
    (linear(x, dense, layer.bias) - y).pow(2).sum().backward()
    assert_close(layer.lora_A.grad, 1.5 * layer.lora_B.detach().T @ dense.grad)
    assert_close(layer.lora_B.grad, 1.5 * dense.grad @ layer.lora_A.detach().T)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_weight_carries_the_same_gradients_as_forward(generator):
    """Oracle: autograd through `forward`; code that reads `weight` and never calls the layer trains as well."""
    layer = trained(nn.Sequential(nn.Linear(5, 6).double()), LoRA(rank=2, target=("*",)), generator)[0]
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    by_call = torch.autograd.grad(layer(x).pow(2).sum(), (layer.lora_A, layer.lora_B))
    by_weight = torch.autograd.grad(linear(x, layer.weight, layer.bias).pow(2).sum(), (layer.lora_A, layer.lora_B))
    assert_close(by_call, by_weight)
    assert by_call[0].abs().min() > 0


def test_starts_as_the_model_it_adapts(generator):
    """Oracle: B = 0 adds nothing; A as `nn.Linear` is drawn, within 1 / sqrt(in) and using that range."""
    model = nn.Sequential(nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 5))
    x = torch.randn(3, 64, generator=generator)
    before = model(x)
    LoRA(rank=5, target=("*",)).inject(model, generator)
    assert torch.equal(model(x), before)
    drawn = model[0].lora_A.detach()
    assert 0.95 / 8 < drawn.abs().max() <= 1 / 8
    assert_close(drawn.std(), torch.tensor(1 / 8 / math.sqrt(3)), rtol=0.1, atol=0)  # 320 draws


def test_full_rank_is_any_dense_update(generator):
    """Oracle: singular value decomposition (Section 4.1, a generalization of full fine-tuning): rank min(in, out) is
    every matrix, one less is not."""
    update = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(update, full_matrices=False)
    assert_close(low_rank_change(s[:, None] * Vh, U, scale=1.0), update)
    short = low_rank_change(s[:4, None] * Vh[:4], U[:, :4], scale=1.0)
    assert_close((short - update).norm(), s[4])  # Eckart-Young: the best of rank 4 misses by the last singular value
    assert s[4] > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, generator):
    """Oracle: the float64 closed form, to the dtype's rounding. Half precision trains float32 factors."""
    model = trained(nn.Sequential(nn.Linear(33, 7)).to(dtype), LoRA(rank=3, target=("*",)), generator, size=1.0)
    layer, x = model[0], torch.randn(5, 33, generator=generator).to(dtype)
    exact = linear(x.double(), layer.base.weight.double() + 8 / 3 * (layer.lora_B.double() @ layer.lora_A.double()))
    exact = exact + layer.bias.double()
    assert layer.lora_A.dtype == layer.lora_B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for _ in range(2):
        out = model(x)
        assert out.dtype == dtype and model[0].weight.dtype == dtype
        assert_close(
            out, exact.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps
        )  # sums of 33
        LoRA().merge(model) if isinstance(model[0], LoRALinear) else None


def test_merging_restores_the_very_layers(generator):
    """Oracle: the model before: same objects, names, shapes and dtypes, and the closed form as weight."""
    model = nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5, dtype=torch.bfloat16), nn.Linear(5, 3, bias=False)
    )
    layers, before = list(model), {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    method = LoRA(rank=2, target=("0", "2"))
    expected = trained(model, method, generator)[0].weight.detach()
    assert method.merge(model) is model
    assert all(now is then for now, then in zip(model, layers, strict=True))
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, (p, _) in before.items()
    }
    assert torch.equal(model[0].weight, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, value) for tensor, value in before.values())  # the base's tensors are not written
    with pytest.raises(ValueError, match="no adapted layer"):
        method.merge(model)


def test_tied_weights(llama, generator):
    """Oracle: the unmerged model. The embedding keeps its weight when the tied head's is merged."""
    model = llama()
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before = embedding.detach().clone()
    adapted = logits(trained(model, LoRA(target=("lm_head",)), generator))
    merged = LoRA().merge(model)
    assert_close(logits(merged), adapted)
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not torch.equal(merged.lm_head.weight, before)


def test_a_layer_under_two_names_stays_one_layer(generator):
    """Oracle: the same model written out; a pattern that matches one of the names adapts the layer under both."""
    shared = nn.Linear(5, 5)
    model = nn.ModuleDict({"first": shared, "second": nn.ModuleDict({"again": shared})})
    trained(model, LoRA(rank=2, target=("first",)), generator)
    assert model["first"] is model["second"]["again"] and isinstance(model["first"], LoRALinear)
    weight = model["first"].weight.detach()
    LoRA().merge(model)
    assert model["first"] is model["second"]["again"] is shared
    assert torch.equal(shared.weight, weight)


@pytest.mark.parametrize("training", [False, True])
def test_modules_that_never_call_their_layers(training, generator):
    """Oracle: the merged model. PyTorch's fused encoder layer reads the weights of its linear layers."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(3, 5, 8, generator=generator)
    with torch.no_grad():
        before = model(x)
        adapted = trained(model, LoRA(rank=2, target=("*",)), generator, size=1.0)(x)
        assert_close(LoRA().merge(model)(x), adapted)
    assert (adapted - before).abs().max() > 0.1


def test_dropout_acts_on_the_factors_inputs_in_training_only(generator):
    """Oracle: the same draw by hand; the base's path sees the whole input."""
    model = trained(nn.Sequential(nn.Linear(33, 6)), LoRA(rank=2, dropout=0.5, target=("*",)), generator).train()
    layer, x = model[0], torch.randn(7, 33, generator=generator)
    torch.manual_seed(3)
    out = model(x)
    torch.manual_seed(3)
    kept = nn.functional.dropout(x, 0.5)
    assert_close(out, layer.base(x) + linear(kept, 4 * layer.lora_B @ layer.lora_A))
    assert (kept == 0).any()
    assert_close(model.eval()(x), linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("training", [False, True])
def test_keeps_the_mode_of_the_model(training):
    """Oracle: the model before; a layer put into an evaluated model must not start to drop inputs."""
    model = LoRA(rank=1, target=("*",)).inject(nn.Sequential(nn.Linear(5, 7)).train(training))
    assert all(module.training == training for module in model.modules())


def test_draws_from_the_generator_alone():
    """Oracle: two runs from one seed, and PyTorch's global generator where it was."""
    models = [nn.Sequential(nn.Linear(5, 7)) for _ in range(3)]
    state = torch.random.get_rng_state()
    method, generators = LoRA(rank=2, target=("*",)), [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, second, other = (method.inject(m, g)[0].lora_A for m, g in zip(models, generators, strict=True))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_follows_the_layers_device(device, generator):
    """Oracle: the same on the processor, where the generator is."""
    model, x = nn.Sequential(nn.Linear(33, 7)), torch.randn(5, 33, generator=generator)
    method, state = LoRA(rank=3, target=("*",)), generator.get_state()
    expected = trained(copy.deepcopy(model), method, generator)(x)
    generator.set_state(state)
    model = trained(model.to(device), method, generator)
    assert_close(model(x.to(device)).cpu(), expected)
    assert_close(method.merge(model)(x.to(device)).cpu(), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("stabilized", [False, True])
def test_equals_peft_and_reads_its_files(architecture, stabilized, request, generator, tmp_path):
    """Oracle: peft 0.21: same factors, same logits, before and after merging; its folder loads here."""
    from peft import LoraConfig, get_peft_model

    build, settings = request.getfixturevalue(architecture), {"r": 4, "lora_alpha": 6, "use_rslora": stabilized}
    layout = {"target_modules": THEIRS[architecture], "fan_in_fan_out": architecture == "gpt2"}
    theirs = get_peft_model(build(), LoraConfig(**settings, **layout))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    ours = build()
    method = LoRA.load(ours, tmp_path)
    assert (method.rank, method.alpha, method.rank_stabilized) == (4, 6, stabilized)
    assert len(method.target) == 3
    assert_close(logits(ours), logits(theirs.eval()))
    assert (logits(ours) - logits(build())).abs().max() > 0.1
    assert_close(logits(method.merge(ours)), logits(theirs.merge_and_unload()))


@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_beside_peft(what, peer, generator):
    """Oracle: peft 0.21 on a layer of 1024 by 1024, 512 tokens, rank 8, with the same factors; float32 rounding."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(1024, 1024))
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    ours = trained(base, LoRA(rank=8, alpha=16.0, target=("*",)), generator)
    with torch.no_grad():
        adapted = theirs.base_model.model[0]
        adapted.lora_A["default"].weight.copy_(ours[0].lora_A)
        adapted.lora_B["default"].weight.copy_(ours[0].lora_B)
    x = torch.randn(512, 1024, generator=generator)

    def call(model, factor):
        if what == "forward":
            with torch.no_grad():
                return model(x)
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        return y.detach(), factor.grad

    peer(
        "lora",
        "peft",
        f"{what} of one layer, 1024 by 1024, 512 tokens, rank 8",
        lambda: call(ours, ours[0].lora_B),
        lambda: call(theirs, adapted.lora_B["default"].weight),
        within=1e-4,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_reads_our_files(architecture, request, generator, tmp_path):
    """Oracle: peft 0.21 loads the folder into a fresh base model and computes the same."""
    from peft import PeftModel

    build, folder = request.getfixturevalue(architecture), tmp_path / "new" / "folder"
    method = LoRA(rank=4, alpha=6.0, target=OURS[architecture], dropout=0.1)
    ours = trained(build(), method, generator)
    method.save(ours, folder)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    theirs = PeftModel.from_pretrained(build(), folder).eval()  # a warning would be an error
    assert_close(logits(theirs), logits(ours))
    again, state = build(), torch.random.get_rng_state()
    assert LoRA.load(again, folder).dropout == 0.1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(again), logits(ours))


def small(**settings):
    """A model of two layers, its method, and the model injected."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    method = LoRA(**{"rank": 2, "target": ("*",)} | settings)
    return method, trained(model, method, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "must say peft_type='LORA'; it says"),
        ({"use_dora": True}, "asks for more than plain LORA: {'use_dora': True}"),
        ({"rank_pattern": {"0": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"0": 4}}, "alpha_pattern"),
        ({"bias": "all"}, "bias"),
        ({"something_of_next_year": 3}, "something_of_next_year"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base model's weights"),
        ({"r": 3}, r"0.lora_A.weight is \(2, 5\), the model asks for \(3, 5\)"),
        ({"lora_dropout": 1.5}, "dropout=1.5"),
    ],
)
def test_files_that_ask_for_more_are_refused(change, message, tmp_path):
    method, model = small()
    method.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fresh = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    with pytest.raises(ValueError, match=message):
        LoRA.load(fresh, tmp_path)
    assert [type(layer) for layer in fresh] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Sequential(nn.Linear(5, 7)), r"1.lora_A.weight is \(2, 7\), the model asks for no such tensor"),
        (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4)), r"1.lora_B.weight is \(3, 2\), the model asks for \(4, 2\)"),
        (nn.Sequential(nn.Tanh()), "trained on another model"),
    ],
)
def test_another_base_model_is_refused(base, message, tmp_path):
    method, model = small()
    method.save(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        LoRA.load(base, tmp_path)
    assert not any(isinstance(layer, LoRALinear) for layer in base)


def test_a_missing_factor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    method, model = small()
    method.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.1.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1.lora_B.weight is missing, the model asks for \(3, 2\)"):
        LoRA.load(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), tmp_path)


def test_saving_needs_the_model_and_the_configuration_that_injected_it(tmp_path):
    method, model = small()
    with pytest.raises(ValueError, match=r"rank and scale \(2, 4.0\), this configuration \(2, 8.0\)"):
        LoRA(rank=2, alpha=16.0).save(model, tmp_path)
    with pytest.raises(ValueError, match="no LoRA layer to save"):
        method.save(method.merge(model), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"target": "*q_proj"}, r"target='\*q_proj' must be a list"),
    ],
)
def test_configuration_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": ("*q_porj",)},
            r"\('\*q_porj',\) matches no linear layer below the model; near: \['model.layers.*q_proj'",
        ),
        (
            {"rank": 17, "target": ("*k_proj",)},
            r"rank=17 exceeds the smaller side of layer 'model.*k_proj', \(16, 32\)",
        ),
        ({"target": ("model", "*norm")}, "matches no linear layer"),
    ],
)
def test_injection_that_cannot_be_changes_nothing(settings, message, llama):
    model = llama()
    before = {name: (type(m), [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        LoRA(**settings).inject(model)
    assert before == {name: (type(m), [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}


def test_injecting_twice_is_refused():
    _, model = small(target=("0",))
    for again in (("0",), ("*",)):
        with pytest.raises(ValueError, match="layer '0' is adapted already: merge"):
            LoRA(rank=2, target=again).inject(model)
    with pytest.raises(ValueError, match="matches no linear layer"):
        LoRA(rank=2, target=("*base",)).inject(model)  # what is wrapped stands under its own name only
    LoRA(rank=2, target=("1",)).inject(model)  # another layer can be
    assert isinstance(model[1], LoRALinear)


def test_packed_weights_are_refused():
    layer = nn.Linear(5, 7)
    layer.weight = nn.Parameter(torch.zeros(7, 5, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer '0' holds torch\.uint8; only floating-point weights"):
        LoRA(rank=2, target=("*",)).inject(nn.Sequential(layer))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="it has none"):
        LoRA(target=("*",)).inject(nn.Linear(9, 9))  # the model itself cannot be replaced in place


def test_layers_of_either_layout(gpt2):
    """Oracle: transformers' own shapes: GPT-2's c_attn makes 3 * 32 of 32."""
    model = gpt2()
    assert sizes(model.transformer.h[0].attn.c_attn) == (96, 32)
    adapted = LoRA(rank=2, target=("*c_attn",)).inject(model).transformer.h[0].attn.c_attn
    assert (adapted.lora_A.shape, adapted.lora_B.shape, adapted.weight.shape) == ((2, 32), (96, 2), (32, 96))


def test_configuration_survives_yaml():
    method = LoRA(rank=3, target=("*q_proj",), rank_stabilized=True)
    assert LoRA(**yaml.safe_load(yaml.safe_dump(vars(method)))) == method


def gpt3():
    """GPT-3 175B as far as its shapes go (96 layers of width 12,288), without memory."""
    width = 12288
    with torch.device("meta"):
        blocks = [
            nn.ModuleDict(
                {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
                | {"up_proj": nn.Linear(width, 4 * width), "down_proj": nn.Linear(4 * width, width)}
            )
            for _ in range(96)
        ]
        return nn.ModuleList([nn.Embedding(50257 + 2048, width), *blocks])


def test_claim_gpt3_parameters(claim):
    """Parameters that train in a model of GPT-3's shapes, adapted at queries and values."""
    total = sum(parameter.numel() for parameter in gpt3().parameters())
    assert 174e9 < total < 176e9
    count = {}
    for rank in (4, 8):
        method, model = LoRA(rank=rank), gpt3()
        count[rank] = sum(factor.numel() for factor in method.trainable(method.inject(model)).values())
        assert count[rank] == 2 * (2 * 96) * 12288 * rank  # Section 5.1: 2 L d r
    claim("lora", "gpt3-parameters", count[8] / 1e6)
    claim("lora", "gpt3-share", total / count[4])


def test_claim_merged_model_adds_nothing(claim, llama, generator):
    """Operations of the merged model over the original's; its modules and parameters are the original's."""
    model, method = llama(), LoRA(rank=4, target=("*_proj",))
    before, original = operations(model), {name: type(module) for name, module in model.named_modules()}
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert operations(trained(model, method, generator)) > before  # negative control: the factors do cost
    method.merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == original
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == parameters
    claim("lora", "merged-adds-nothing", operations(model) / before)


def operations(model):
    with FlopCounterMode(display=False) as counter:
        logits(model)
    return counter.get_total_flops()


def test_claim_training_memory(claim):
    """Share of the bytes of weights and AdamW's state saved, against full fine-tuning: width 512, rank 4."""
    held = []
    for method in (arena.FullFineTuning(), LoRA(rank=4)):
        model = method.inject(
            nn.ModuleDict({name: nn.Linear(512, 512) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        )
        optimizer = torch.optim.AdamW(method.trainable(model).values())
        for parameter in method.trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        held.append(sum(tensor.nbytes for tensor in [*model.parameters(), *state]))
    claim("lora", "training-memory", 1 - held[1] / held[0])


def test_claims_on_the_arenas_task(claim, generator):
    """Accuracy on the arena's shifted task over full fine-tuning's: rank 2 on all layers, rank 1 on queries and values."""
    given = arena.substrate(generator, torch.device("cpu"))
    methods = (arena.FullFineTuning(), LoRA(rank=2, target=("*_proj",)), LoRA(rank=1))
    full, every, one = (arena.figures(given, method) for method in methods)
    assert every["trained_parameters"] < 0.05 * full["trained_parameters"]
    claim("lora", "matches-full", every["accuracy"] / full["accuracy"])
    claim("lora", "rank-one-suffices", one["accuracy"] / full["accuracy"])
