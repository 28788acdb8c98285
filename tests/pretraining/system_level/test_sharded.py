"""What ZeRO's stages share: the order of reductions, and when they happen."""

import torch
import torch.nn.functional as F
from torch import nn

from refimpl.pretraining.system_level.zero import ZeRO
from refimpl.processes import launch
from tests.pretraining.system_level.programs import OPTIMIZER


class Chain(nn.Module):
    """Three layers, and between them a look at what has been sent when the gradient passes."""

    def __init__(self, seen):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.seen = seen

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x.register_hook(lambda _: self.seen())
        return x


def order(group, stage):
    """Reductions that have started when the gradient reaches the outputs of layers 3, 2, 1; in which order they did."""
    counts, bucket = [], 64
    model = Chain(lambda: counts.append(group.sent["reduce_scatter"] // (bucket // 2)))
    run = ZeRO(stage=stage, bucket_bytes=bucket)(model, OPTIMIZER, F.mse_loss, group)
    run.step(torch.ones(2, 4), torch.zeros(2, 4))
    grads = [p.grad for p in model.parameters()]
    return counts, group.sent["reduce_scatter"] // (bucket // 2), grads


def test_stage_2_reduces_while_the_backward_pass_runs():
    """Oracle: by hand. At the last layer's output nothing is ready, one layer further one, then two; stage 1 waits for the end."""
    for stage, expected in ((1, [0, 0, 0]), (2, [0, 1, 2])):
        for counts, total, grads in launch(order, 2, stage):
            assert counts == expected and total == 3
            assert grads == [None] * 3
