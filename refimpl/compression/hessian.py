r"""Second-order steps that GPTQ and the methods around it share: the Hessian of a layer's error, and a sweep over its columns.

The error $\|X W^\top - X \hat W^\top\|^2$ of a layer's output is a quadratic in each row of the weight, with the Hessian
$2 X^\top X$ for all of them. Rounding a column leaves a best correction of the columns that are still free; `Sweep` makes it,
for all rows at once, from one triangular factor of the inverse Hessian.

    H          `layer_hessian`, $X^\top X$, half the Hessian, `[in, in]`
    U          `inverse_factor`, upper triangular, $(H + \lambda I)^{-1} = U^\top U$
    columns    $W^\top$, `[in, out]`: a column of the weight is a row, so that what is read together lies together

Source: `gptq` (arXiv 2210.17323), Section 4: Eq. (2) and (3), Step 2 (lazy blocks) and Step 3 (Cholesky).

Differs from the paper: the factor comes from one factorization of the reversed Hessian instead of an inversion between two. Dead
columns do not count in the mean that the damping is a share of.

Not here: what a column is rounded to, which each method decides for itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from refimpl.compression.protocol import check_layer

BLOCK = 128  # columns after which the updates of the remaining ones are applied


def layer_hessian(
    name: str, weight: Tensor, inputs: Tensor | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """H of a layer, and which of its columns are dead: their input is always zero.

    Args:
        name: the method's, for messages.
        weight: `[out, in]`.
        inputs: `[n, in]`, the layer's calibration inputs.
        dtype: of the sums.

    Returns:
        H, `[in, in]`, and a mask `[in]`.

    Raises:
        ValueError: there are no inputs, or all are zero; weight or inputs are misshapen, or hold NaN or infinity.
    """
    if inputs is None:
        raise ValueError(f"{name} needs the layer's inputs: pass `inputs`, or `calibration` to `compress`")
    check_layer(weight, inputs)
    hessian = gram(inputs, dtype)
    dead = hessian.diagonal() == 0
    if dead.all():
        raise ValueError("inputs are all zero: nothing can be calibrated on them")
    return hessian, dead


def gram(inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """$X^T X$, `[in, in]`, of inputs `[n, in]`: half the Hessian of the layer's squared error.

    Args:
        inputs: `[n, in]`.
        dtype: of the sum and the result.
    """
    inputs = inputs.to(dtype)
    return inputs.T @ inputs


def damp(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    r"""$H + \lambda I$, `[in, in]`, with $\lambda$ a share of the mean of the diagonal; dead columns get that mean besides.

    Examples:
        >>> damp(torch.diag(torch.tensor([4.0, 0.0, 16.0])), torch.tensor([False, True, False]), 0.5).diagonal().tolist()
        [9.0, 15.0, 21.0]
    """
    mean = hessian.diagonal()[~dead].mean()
    return hessian + torch.diag(damping * mean + dead * mean)


def inverse_factor(hessian: Tensor, dead: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    r"""$U$, upper triangular, with $(H + \lambda I)^{-1} = U^\top U$.

    With the order of columns reversed, $H = LL^\top$ reads $H = RR^\top$ in the right order, R upper triangular, and
    $U = R^{-1}$.

    Args:
        hessian: `[in, in]`.
        dead: `[in]`, columns without input, which stand alone.
        damping: $\lambda$ as a share of the mean of the other columns' diagonal.
        order: rows and columns are taken in this order.

    Raises:
        ValueError: H is not positive definite.

    Examples:
        >>> inverse_factor(torch.diag(torch.tensor([4.0, 16.0])), torch.tensor([False, False]), damping=0.0).tolist()
        [[0.5, 0.0], [0.0, 0.25]]
    """
    damped = damp(hessian, dead, damping)
    if order is not None:
        damped = damped[order][:, order]
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ValueError(
            f"damping={damping} leaves the Hessian of these inputs singular: raise it (0.01 is the paper's), or give more rows"
        )
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor


class Sweep:
    """Columns in turn: the caller rounds one, and what remains of its error moves those after it.

    Iterating makes `column` the next one, with all corrections so far; `settle` says what it is rounded to. Corrections within
    a block of columns are made when a column's turn comes, and those beyond it at the block's end, in one product.

    Args:
        columns: `[in, out]`, in the order of visits; overwritten. At the end it holds what each column was settled to, and,
            from `stop` on, columns corrected for all errors.
        factor: $U$, `[in, in]`, as `inverse_factor` gives it, of the same order.
        block: columns in a block; no result depends on it but for rounding.
        stop: columns from here on are not visited; None visits all.

    Examples:
        Two inputs that are always equal: what is rounded off the first column is made up by the second.

        >>> columns, one = torch.tensor([[0.25], [0.5]]), torch.tensor([False, False])
        >>> factor = inverse_factor(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), one, damping=1e-5)
        >>> for sweep in Sweep(columns, factor):
        ...     sweep.settle(sweep.column.round())
        >>> columns.tolist()
        [[0.0], [1.0]]
    """

    def __init__(self, columns: Tensor, factor: Tensor, block: int = BLOCK, stop: int | None = None) -> None:
        self._columns, self._factor, self._block = columns, factor, block
        self._stop = len(columns) if stop is None else stop
        self._errors = torch.zeros_like(columns)
        self._before, self._i = slice(0, 0), 0
        self.column = columns.new_empty(0)

    def __iter__(self) -> Iterator["Sweep"]:
        """Itself, once for each column."""
        for start in range(0, self._stop, self._block):
            end = min(start + self._block, self._stop)
            for self._i in range(start, end):
                self._before = slice(start, self._i)
                self.column = self._columns[self._i].addmv(
                    self._errors[self._before].T, self._factor[self._before, self._i], alpha=-1
                )
                yield self
            self._columns[end:].addmm_(self._factor[start:end, end:].T, self._errors[start:end], alpha=-1)

    def current(self, group: slice) -> Tensor:
        """Columns `[size, out]` from the present one on, with all corrections so far."""
        return self._columns[group] - self._factor[self._before, group].T @ self._errors[self._before]

    def settle(self, rounded: Tensor) -> None:
        """The present column, `[out]`, is rounded to this, and stays."""
        torch.sub(self.column, rounded, out=self._errors[self._i]).div_(self._factor[self._i, self._i])
        self._columns[self._i] = rounded
