"""ZeRO: one process, two peers of PyTorch, the paper's bytes, and what may not go wrong."""

import os
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from refimpl.pretraining.system_level.data_parallel import DataParallel
from refimpl.pretraining.system_level.zero import ZeRO
from refimpl.processes import RankFailed, launch
from tests.pretraining.system_level import programs
from tests.pretraining.system_level.programs import measure_many, one_process, train_many

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
JOBS = [
    (ZeRO(stage=stage, bucket_bytes=bucket, micro_batches=parts), name, optimizer)
    for stage in (1, 2, 3)
    for bucket, parts, name, optimizer in [
        (1, 1, "awkward", programs.OPTIMIZER),  # each parameter alone
        (300, 2, "awkward", programs.OPTIMIZER),
        (300, 2, "decoder", SGD),
        (25 * 2**20, 1, "untied", programs.OPTIMIZER),
    ]
] + [(ZeRO(stage=stage), "sometimes", programs.OPTIMIZER) for stage in (1, 2)]


def test_equals_one_process_however_it_is_cut():
    """Oracle: plain PyTorch on the whole batches, float64 to 1e-10: buckets, micro-batches, SGD with momentum, and a model of
    which only the last rank uses a part, in the second step alone (stages 1 and 2)."""
    for (method, name, optimizer), *ranks in zip(JOBS, *launch(train_many, 2, JOBS), strict=True):
        expected, losses = one_process(name, optimizer)
        for rank in ranks:
            assert rank["losses"] == pytest.approx(losses, abs=1e-10), (method, name)
            for parameter, value in rank["whole"].items():
                assert_close(
                    value, expected[parameter].detach(), rtol=0, atol=1e-10, msg=f"{method} {name} {parameter}"
                )


def peers(group):
    """DDP with AdamW whole, and with PyTorch's own stage 1: parameters after three steps, and stage 3's."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns when it is imported, which fails a test

    found = {}
    for name, sharded in (("ddp", False), ("zero redundancy", True)):
        model = DistributedDataParallel(programs.decoder())
        settings = {"lr": 0.02, "weight_decay": 0.3}
        optimizer = (
            ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **settings)
            if sharded
            else torch.optim.AdamW(model.parameters(), **settings)
        )
        for inputs, targets in programs.batches("decoder", rows=6):
            x, y = inputs.chunk(group.size)[group.rank], targets.chunk(group.size)[group.rank]
            optimizer.zero_grad()
            programs.token_loss(model(x), y).backward()
            optimizer.step()
        found[name] = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    run = ZeRO(stage=3)(programs.decoder(), programs.OPTIMIZER, programs.token_loss, group)
    for batch in programs.batches("decoder", rows=6):
        run.step(*batch)
    return found, run.whole()


def test_equals_pytorchs_own():
    """Oracle: DistributedDataParallel, and ZeroRedundancyOptimizer of torch (2.13), on the same rows."""
    for found, ours in launch(peers, 2):
        for theirs in found.values():
            for name, value in theirs.items():
                assert_close(ours[name], value, rtol=0, atol=1e-10)


BYTES = [ZeRO(stage=1, bucket_bytes=9000), ZeRO(stage=2, bucket_bytes=9000), ZeRO(stage=3)]


@pytest.fixture(scope="module")
def measured():
    """Four ranks; mixed precision, then float32, of the baseline and the three stages."""
    jobs = [(method, dtype) for dtype in (torch.bfloat16, torch.float32) for method in (DataParallel(), *BYTES)]
    return dict(zip(jobs, launch(measure_many, 4, jobs)[1], strict=True))


PSI = 8 * 64 * 64 + 64


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_by_the_papers_formula(measured, stage, claim):
    """Bytes a parameter on one of four ranks, bfloat16 parameters and gradients, Adam in float32."""
    claim("zero", f"stage-{stage}-bytes", sum(measured[BYTES[stage - 1], torch.bfloat16]["held"]) / PSI)


@pytest.mark.parametrize(("stage", "expected"), [(0, 16), (1, 10), (2, 7), (3, 4)])
def test_float32_by_formula(measured, stage, expected):
    """Oracle: 4 + 4 + 8 bytes a parameter, the last, the middle and the first divided by N = 4 from stages 1, 2 and 3 on."""
    method = DataParallel() if stage == 0 else BYTES[stage - 1]
    assert sum(measured[method, torch.float32]["held"]) / PSI == pytest.approx(expected, abs=0.02)


def test_bytes_claimed_are_bytes_alive(measured):
    """Oracle: all tensors that the garbage collector finds between two steps, when no gradients are held; a counter of steps and
    a placeholder of a few bytes a parameter aside."""
    for (method, _), found in measured.items():
        at_rest = found["held"].parameters + found["held"].states
        assert found["resting"] == pytest.approx(at_rest, rel=0.02), method


@pytest.mark.parametrize("stage", [2, 3])
def test_claim_volume(measured, stage, claim):
    """Bytes that a rank sends in a step, over data parallelism's."""
    sent = {m: sum(measured[m, torch.float32]["sent"].values()) for m in (DataParallel(), BYTES[stage - 1])}
    claim("zero", f"stage-{stage}-volume", sent[BYTES[stage - 1]] / sent[DataParallel()])


def test_what_passes_is_small(measured):
    """Oracle: by hand, float32, layers of 16 KiB. Stage 2: a bucket whole, sent and received (3), beside the next one's gradient.
    Stage 3: two gathered layers, their gradients whole, one sent and received."""
    layer = 4 * 64 * 64
    assert measured[BYTES[1], torch.float32]["peak"] <= 4 * layer + 1024
    assert layer < measured[BYTES[2], torch.float32]["peak"] <= 6 * layer + 1024


def fails(group):
    """The second rank is killed between two steps."""
    run = ZeRO(stage=3)(programs.decoder(), programs.OPTIMIZER, programs.token_loss, group)
    for number, batch in enumerate(programs.batches("decoder")):
        if number == 1 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        run.step(*batch)


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankFailed, match="rank 1 of 2: killed by SIGKILL"):
        launch(fails, 2)


class Recomputed(torch.nn.Module):
    """Layers whose activations are computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(3))
        self.attention = torch.nn.MultiheadAttention(
            5, 1, batch_first=True
        )  # reads the weights of its submodule itself

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=False)
        return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]


def recompute(group):
    """Stage 3 with checkpointing, one rank; and plain PyTorch."""
    torch.manual_seed(0)
    model, g = Recomputed().double(), torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 5, generator=g).double() for _ in range(2))
    gradients = torch.autograd.grad(F.mse_loss(model(x), y), tuple(model.parameters()))
    expected = [p.detach() - 0.1 * gradient for p, gradient in zip(model.parameters(), gradients, strict=True)]
    run = ZeRO(stage=3)(model, partial(torch.optim.SGD, lr=0.1), F.mse_loss, group)
    run.step(x, y)
    return expected, list(run.whole().values())


def refuse(group):
    """Errors that name what is wrong."""
    said = []
    run = ZeRO(stage=2)(torch.nn.Linear(2, 1), programs.OPTIMIZER, F.mse_loss, group)
    frozen = torch.nn.Linear(2, 1).requires_grad_(False)
    for attempt in (
        lambda: run.step(torch.ones(1, 2), torch.ones(2, 1)),
        lambda: run.step(torch.ones(0, 2), torch.ones(0, 1)),
        lambda: ZeRO()(frozen, programs.OPTIMIZER, F.mse_loss, group),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def test_recomputed_activations_and_weights_read_by_others():
    """Oracle: plain PyTorch's gradients, one SGD step, float64."""
    ((expected, ours),) = launch(recompute, 1)
    for one, other in zip(expected, ours, strict=True):
        assert_close(other, one, rtol=0, atol=1e-12)


def test_bad_arguments_are_named():
    ((rows, empty, frozen),) = launch(refuse, 1)
    assert "inputs of 1 and targets of 2 rows" in rows and "inputs of 0" in empty
    assert "nothing to train" in frozen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 0}, "stage=0 must be 1, 2 or 3"),
        ({"bucket_bytes": 0}, "bucket_bytes=0 must be at least 1"),
        ({"micro_batches": 0}, "micro_batches=0 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        ZeRO(**change)
