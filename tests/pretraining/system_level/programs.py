"""Programs that the tests of distributed training run on several ranks, and the models they train."""

import gc
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_


class Awkward(nn.Module):
    """Odd sizes, a weight used by two modules and read by a third, a frozen part, a part that is never used, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.second.weight = self.first.weight  # tied
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(5))
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        x = self.frozen(self.norm(x)) * self.scale
        return self.last(x) + F.linear(x, self.first.weight[:1, :5])  # another module's weight, a part of it


class Sometimes(nn.Module):
    """The second layer sees rows whose first number is positive only: ranks may differ in what they use."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        out, rows = self.always(x), x[:, 0] > 0
        return out.index_add(0, rows.nonzero()[:, 0], self.sometimes(x[rows])) if rows.any() else out


def decoder(tied=True, dtype=torch.float64):
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "d_ff": 23}
    config = Config(vocabulary=29, tied_embeddings=tied, **shape)
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).to(dtype)


def awkward(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Awkward().to(dtype)


def sometimes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Sometimes().double()


def token_loss(logits, targets):
    return F.cross_entropy(
        logits.flatten(0, 1).float() if logits.dtype == torch.bfloat16 else logits.flatten(0, 1), targets.flatten()
    )


MODELS = {"decoder": decoder, "untied": partial(decoder, tied=False), "awkward": awkward, "sometimes": sometimes}


def batches(name, steps=3, rows=7):
    """The group's batches; seven rows, which neither 2 nor 3 ranks can share equally."""
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        if name in ("decoder", "untied"):
            tokens = torch.randint(0, 29, (rows, 6), generator=g)
            yield tokens[:, :-1], tokens[:, 1:]
        elif name == "awkward":
            yield torch.randn(rows, 7, generator=g).double(), torch.randn(rows, 1, generator=g).double()
        else:
            x = torch.randn(rows, 4, generator=g).double()
            x[:, 0] = -x[:, 0].abs()
            x[-1, 0] *= -1 if step == 1 else 1  # in the second step alone, and on the last rank alone
            yield x, torch.randn(rows, 2, generator=g).double()


def loss_of(name):
    return token_loss if name in ("decoder", "untied") else F.mse_loss


OPTIMIZER = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.3)


def one_process(name, optimizer=OPTIMIZER, steps=3):
    """The oracle: plain PyTorch on the whole batches."""
    model = MODELS[name]()
    trained = [p for p in model.parameters() if p.requires_grad]
    updates, losses = optimizer(trained), []
    for inputs, targets in batches(name, steps):
        loss = loss_of(name)(model(inputs), targets)
        updates.zero_grad()
        loss.backward()
        updates.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), losses


def train(group, method, name, optimizer=OPTIMIZER, steps=3):
    """Train, and tell all that can be seen of it; rank 1 starts from other weights than rank 0."""
    model = MODELS[name]()
    if group.rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    keys = {id(module): list(vars(module)) for module in model.modules()}
    run = method(model, optimizer, loss_of(name), group)
    losses = [run.step(*batch) for batch in batches(name, steps)]
    first = next(iter(batches(name)))[0]
    before = dict(group.sent)
    with torch.no_grad():
        outputs = run.model(first)  # also between steps
    evaluated = sum((group.sent - type(group.sent)(before)).values())
    whole, held, peak = run.whole(), run.held, run.peak
    plain = run.close()
    with torch.no_grad():
        again = plain(first)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules())
    hooks += sum(len(p._post_accumulate_grad_hooks or ()) for p in plain.parameters())
    return {
        "losses": losses,
        "whole": whole,
        "closed": {n: p.detach().clone() for n, p in plain.named_parameters()},
        "own memory": len({p.untyped_storage().data_ptr() for p in plain.parameters()})
        == len(list(plain.parameters())),
        "held": held,
        "peak": peak,
        "outputs": outputs,
        "again": again,
        "hooks": hooks + sum(keys[id(m)] != list(vars(m)) or type(m._parameters) is not dict for m in plain.modules()),
        "evaluated": evaluated,
    }


def train_many(group, jobs):
    """Several trainings in one group: processes cost seconds, trainings do not."""
    return [train(group, *job) for job in jobs]


class Wide(nn.Module):
    """Layers of one size, so that states outweigh everything else: 8 x (64 x 64) parameters."""

    def __init__(self, dtype):
        super().__init__()
        self.start = nn.Parameter(
            torch.zeros(64)
        )  # so that gradients flow through the first layer, as through an embedding
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(8))
        self.to(dtype)

    def forward(self, x):
        x = x + self.start
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def living():
    """Bytes of all tensors that Python can reach in this process, each memory once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]  # isinstance is slow here
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def measure(group, method, dtype, steps=2):
    """Bytes held as the run says and as the collector finds; bytes sent in the last step."""
    empty = living()
    run = method(Wide(dtype), partial(torch.optim.AdamW, lr=1e-3, foreach=False), F.mse_loss, group)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 64, generator=g).to(dtype) for _ in range(2))
    for _ in range(steps):
        before = dict(group.sent)
        run.step(x, y)
    sent = {kind: n - before.get(kind, 0) for kind, n in group.sent.items() if n != before.get(kind, 0)}
    looks = []  # the thread that sent a buffer holds it for a moment longer than others; its next task ends that
    for _ in range(3):
        group.all_reduce(torch.zeros(1))
        looks.append(living())
    return {"held": run.held, "resting": min(looks) - empty - x.nbytes - y.nbytes, "sent": sent, "peak": run.peak}


def measure_many(group, jobs):
    gc.freeze()  # what has been imported stays out of the collector's sight, which looks through all the rest each time
    return [measure(group, *job) for job in jobs]
