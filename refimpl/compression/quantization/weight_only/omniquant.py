r"""OmniQuant: learn the ranges of a weight's grids, and shifts and scales of its inputs, block by block towards the block's original.

Source: `omniquant` (arXiv 2308.13137), Eq. (1) for the loss, Eq. (2) for learnable weight clipping (LWC, in `learned_clipping`),
Eq. (3) to (5) for the learnable equivalent transformation (LET, in `learned_transform`); official code
OpenGVLab/OmniQuant@95fae1bd00eaa60d03a20eb39c76c4cb173f51f7, quantize/omniquant.py and main.py, whose number of texts and learning
rates are the defaults. Epochs are 20, as in the paper; that code makes 10 unless told otherwise.

A block's target is what the original blocks before it and itself make of the texts; its input comes from the blocks that are
quantized already. Quantized activations are those of all linear layers, and the queries, keys and values.

Differs from the paper: a step takes a calibration batch, in order, where the official code takes one text of 2048 tokens. Queries and
keys are rounded before rotary positions turn them, there after. Where activations are left as they are, so are queries and keys, whose
scales would change no weight's rounding error; the official code learns them all the same. See the two modules for ranges, factors and
shifts.

Not here: a loss against the original block on the quantized block's input (`aug_loss`); mixtures of experts; kernels.
"""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts, anatomy
from refimpl.compression.block_inputs import Given, block_inputs, hidden_states
from refimpl.compression.blocks import find_blocks
from refimpl.compression.calibration import batches_of
from refimpl.compression.protocol import M
from refimpl.compression.quantization.learned_block import LearnedBlock
from refimpl.compression.quantization.learned_transform import LearnedTransform
from refimpl.compression.quantization.weight_activation.smoothquant import smoothing_scales
from refimpl.compression.ranges import Range, channel_ranges

ALPHA = 0.5  # of SmoothQuant's rule, where scales begin


@dataclass(frozen=True, kw_only=True)
class OmniQuant:
    """Weights of few bits whose clipping is learned, and activations that are shifted and scaled by learned factors.

    Args:
        bits: of weights, 1 to 8; the paper's are 2, 3, 4 and 6.
        activation_bits: of activations, 2 to 8, on a grid for each token; None leaves them, and nothing is shifted.
        group_size: neighbours in a channel that share a grid; None is the whole channel.
        steps: of training for each block; the paper's are 20 epochs of 128 texts. 0 leaves clipping and factors as they begin.
        clipping_rate: learning rate of the clipping, for AdamW without weight decay.
        transform_rate: learning rate of shifts and scales; None leaves both out, as the official code does for weights alone of
            Llama.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = OmniQuant(bits=3, steps=2)(model, [torch.arange(20).view(2, 10)])
        >>> small.layers[0].attention.q_proj.compressed.nbytes  # 32 x 32 x 3 bits, a scale and a zero point for each row
        460
    """

    bits: int = 4
    activation_bits: int | None = None
    group_size: int | None = None
    steps: int = 2560
    clipping_rate: float = 1e-2
    transform_rate: float | None = 5e-3

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ValueError(
                f"activation_bits={self.activation_bits} must be 2 to 8, or None to leave activations as they are"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1, or None for whole channels")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 (no training) or more; the paper takes 2560")
        for name in ("clipping_rate", "transform_rate"):
            rate = getattr(self, name)
            if not (rate is None and name == "transform_rate") and not 0 < rate < float("inf"):
                raise ValueError(f"{name}={rate} must be above 0")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A quantized copy, in evaluation mode.

        Args:
            model: a decoder whose layout `anatomy` knows; left unchanged.
            calibration: batches of text, each a tensor of tokens or a dict of keyword arguments that the model is called with;
                a step takes one. Not used where there is neither a step nor a transformation.

        Raises:
            ValueError: the layout is unknown; there is no calibration data, the model can't take it, or it makes NaN; a layer is
                compressed already, or holds NaN.
        """
        wanted = self.steps > 0 or self.transform_rate is not None
        batches = batches_of(calibration) if wanted else []
        if wanted and not batches:
            raise ValueError(
                "OmniQuant needs texts to learn from: pass `calibration`, or steps=0 and transform_rate=None"
            )
        small = copy.deepcopy(model).eval()
        name, blocks = find_blocks(small)
        parts = anatomy(small).blocks
        read = [layer for part in parts for layer in (part.q, part.o, part.gate or part.up)]
        ranges = channel_ranges(small, read, batches) if self.transform_rate is not None else {}
        streams: list[Tensor] = []
        for i, given in enumerate(block_inputs(small, name, batches) if batches else [[]] * len(blocks)):
            streams = streams or [x for x, *_ in given]
            learned = self._learned(small, f"{name}.{i}", parts[i], ranges)
            self._train(learned, given, streams)
            learned.install_()
            streams = [hidden_states(blocks[i](x, *o[2], **o[3])) for x, o in zip(streams, given, strict=True)]
        return small

    def _learned(self, model: nn.Module, name: str, part: BlockParts, ranges: dict[str, Range]) -> LearnedBlock:
        """A block, with clipping and factors as they begin."""
        transform, quantized = None, self.activation_bits is not None
        if self.transform_rate is not None:
            weighs = partial(smoothing_scales, alpha=ALPHA)
            transform = LearnedTransform(model, part, ranges, weighs, shifts=quantized, heads=quantized)
        sizes: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "activation_bits": self.activation_bits,
        }
        return LearnedBlock(model, name, part, transform=transform, **sizes)

    def _train(self, learned: LearnedBlock, given: list[Given], streams: list[Tensor]) -> None:
        r"""Learn towards $\|F(W, X) - F(Q_w(W), Q_a(X))\|^2$ (Eq. 1), in float32."""
        groups: list[dict[str, Any]] = [{"params": learned.clipping_parameters(), "lr": self.clipping_rate}]
        if learned.transform is not None:
            groups.append({"params": learned.transform_parameters(), "lr": self.transform_rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        with torch.enable_grad(), ExitStack() as hooks:
            student = learned.student(hooks)
            for x, (_, y, args, kwargs) in islice(cycle(zip(streams, given, strict=True)), self.steps):
                if not torch.isfinite(y).all():
                    raise ValueError(
                        f"the calibration data makes NaN or infinity in the output of block {learned.name!r}"
                    )
                loss = F.mse_loss(student(x, *args, **kwargs), y.float())
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                if learned.transform is not None:
                    learned.transform.keep_positive_()
