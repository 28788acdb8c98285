"""Train a mixer's language model on the testbed's rows; it resumes where it was stopped.

Those that are here were made by

    python -m tools.mixers mamba
    python -m tools.mixers rwkv --d-model 160 --no-tied
    python -m tools.mixers griffin --d-model 192 --settings '{"window": 256}'

each about as large as the testbed's own model; the window is as much of a text as RecurrentGemma's is of LongBench's.

The same rows in the same order, the same optimizers and rates as the testbed's own model had (`refimpl.testbed.train`), from
random weights. The weights are put beside the mixer's module, where `refimpl.architecture.alternatives.trained` finds them.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import taxonomy
from refimpl.architecture.alternatives import trained
from refimpl.architecture.alternatives.language_model import LanguageModelConfig
from refimpl.architecture.alternatives.state_space import mamba, selective_scan
from refimpl.cli import run_app
from refimpl.testbed import train
from refimpl.testbed.tokenizer import VOCABULARY

COMPILED_CHUNK = 16  # positions of a kernel; more take longer to compile, and are no faster

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def scan_in_order(A: Tensor, state: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The selective scan's chunk, position by position: what a compiler turns into one kernel that keeps no states.

    A third of the time of the parallel scan in plain PyTorch, whose every step writes all states to memory.
    """
    outputs = []
    for t in range(u.shape[1]):
        decay = (delta[:, t].unsqueeze(-1) * A).exp()
        state = decay * state + (delta[:, t] * u[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        outputs.append((state * C[:, t].unsqueeze(-2)).sum(dim=-1))
    return torch.stack(outputs, dim=1), state


def compile_scan() -> None:
    """Have the selective scan use the compiled form, from here on in this process.

    Its own backward forms the states again, so that nothing is left for a checkpoint to save; and as it stands unrolled, chunk
    after chunk, no compiler ends that meets it inside of a model.
    """
    selective_scan._scan_chunk = torch.compile(scan_in_order, dynamic=False)
    selective_scan.checkpoint = lambda scan, *given, **_: scan(*given)  # type: ignore[attr-defined]
    in_chunks = partial(selective_scan.selective_scan, chunk=COMPILED_CHUNK)
    mamba.selective_scan = torch.compiler.disable(in_chunks)  # type: ignore[attr-defined,no-untyped-call]


@app.command()
def main(
    method: Annotated[str, typer.Argument(help="Id of a mixer.")],
    d_model: Annotated[int, typer.Option(help="Width.")] = 256,
    n_layers: Annotated[int, typer.Option(help="Layers.")] = 6,
    tied: Annotated[bool, typer.Option(help="The output layer is the embedding.")] = True,
    settings: Annotated[str, typer.Option(help="The mixer's settings, as JSON.")] = "{}",
    folder: Annotated[
        Path | None, typer.Option(help="State and log of the run; build/mixers/METHOD if left out.")
    ] = None,
    every: Annotated[int, typer.Option(help="Steps between scores, which are also those between saved states.")] = 200,
    compiled: Annotated[
        bool, typer.Option(help="Compile the loss and the selective scan: half the time, but it needs a C++ compiler.")
    ] = True,
) -> None:
    """Train, or go on with a run that was stopped."""
    implementation: Any = taxonomy.load().methods[method].load()
    if compiled:
        compile_scan()
    generator = torch.Generator().manual_seed(train.SEED)
    shape = LanguageModelConfig(vocabulary=VOCABULARY, d_model=d_model, n_layers=n_layers, tied_embeddings=tied)
    mixer = implementation(**json.loads(settings))
    model = mixer.language_model(shape, generator)
    loss = torch.compile(train.loss_of, dynamic=False) if compiled else train.loss_of
    run = train.Run(folder or Path("build/mixers") / method, model, loss)
    typer.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {run.step}")
    train.finish(run, every)
    trained.save(run.model, mixer, trained.weights_file(implementation), log=json.dumps(run.log))


if __name__ == "__main__":
    run_app(app)
