r"""Tensors that lie in three memories at once: the first elements on the device, the next in CPU memory, the last on disk.

What is needed is put together in a buffer on the device, and each byte that passes a link is counted.

Source: `flexgen` (arXiv 2303.06865), the section on placing tensors; official code FMInference/FlexGen@19753bc,
flexgen/pytorch_backend.py (`TorchMixedDevice`, `TorchDisk`), flexgen/flex_opt.py (`init_weight_list`).

Differs from the paper: shares are shares of elements, so that memories hold what was planned; there weights are placed tensor by tensor, and
caches sequence by sequence. Weights on disk are safetensors files; caches and activations there are files mapped into memory.

Not here: pinned memory; copies by the device's own engines.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from refimpl.inference.system_level.design.offload_cost import Shares
from refimpl.model.tensor_files import opened

LINKS = ("cpu_to_device", "device_to_cpu", "disk_to_cpu", "cpu_to_disk")


def split(elements: int, shares: Shares) -> tuple[int, int, int]:
    """How many elements lie on the device, in CPU memory and on disk: whole numbers, rounded up in the last memory that has a share.

    Examples:
        >>> split(10, (0.25, 0.5, 0.25)), split(10, (0.25, 0.75, 0.0)), split(10, (1.0, 0.0, 0.0))
        ((2, 5, 3), (2, 8, 0), (10, 0, 0))
    """
    device, cpu, _ = (int(elements * share + 1e-6) for share in shares)  # a share of 0.3 is not a hair less
    if shares[2] > 0:
        return device, cpu, elements - device - cpu
    return (device, elements - device, 0) if shares[1] > 0 else (elements, 0, 0)


class Spread:
    """A tensor `[length, width]` of which each row is spread; zeros at first.

    Args:
        length: rows.
        width: elements of a row.
        shares: of each row's elements.
        like: a tensor of the dtype and on the device that are wanted.
        file: where the disk's part is; made if there is one, and removed by `close`.
        traffic: counts bytes by link.

    Attributes:
        parts: `[length, elements]` each, on the device, in CPU memory, on disk.

    Raises:
        OSError: the disk is full.

    Examples:
        >>> spread = Spread(3, 4, (0.5, 0.5, 0.0), torch.zeros(1), Path("unused"), traffic := Counter())
        >>> spread.write(1, torch.arange(8.0).view(2, 4))
        >>> spread.read(0, 2, torch.empty(2, 4)).tolist(), traffic["device_to_cpu"], traffic["cpu_to_device"]
        ([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]], 16, 16)
    """

    def __init__(
        self, length: int, width: int, shares: Shares, like: Tensor, file: Path, traffic: "Counter[str]"
    ) -> None:
        device, cpu, disk = split(width, shares)
        self.traffic, self._file = traffic, file if disk else None
        self.parts = [
            torch.zeros(length, device, dtype=like.dtype, device=like.device),
            torch.zeros(length, cpu, dtype=like.dtype),
            _mapped(file, length, disk, like.dtype) if disk else torch.zeros(length, 0, dtype=like.dtype),
        ]

    @property
    def nbytes(self) -> tuple[int, int, int]:
        """Bytes on the device, in CPU memory and on disk."""
        device, cpu, disk = (part.nbytes for part in self.parts)
        return device, cpu, disk

    def read(self, start: int, end: int, out: Tensor) -> Tensor:
        """Rows start:end, put together in a buffer `[end - start, width]` on the device."""
        first = 0
        for part in self.parts:
            out[:, first : first + part.shape[1]] = part[start:end]
            first += part.shape[1]
        cpu, disk = (part[start:end].nbytes for part in self.parts[1:])
        self.traffic["cpu_to_device"] += cpu + disk
        self.traffic["disk_to_cpu"] += disk
        return out

    def write(self, start: int, rows: Tensor) -> None:
        """Put rows `[rows, width]` from the device at start and behind."""
        first, end = 0, start + len(rows)
        for part in self.parts:
            part[start:end] = rows[:, first : first + part.shape[1]]
            first += part.shape[1]
        cpu, disk = (part[start:end].nbytes for part in self.parts[1:])
        self.traffic["device_to_cpu"] += cpu + disk
        self.traffic["cpu_to_disk"] += disk

    def close(self) -> None:
        """Give all of it back."""
        self.parts = [part[:0].clone() for part in self.parts]
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None


class SpreadWeights:
    """Parameters of a layer, side by side as one row, of which the disk's part is a safetensors file.

    Args:
        parameters: by name, of one dtype.
        shares: of their elements.
        device: to compute on.
        file: where the disk's part is; written if there is one.
        traffic: counts bytes by link.

    Attributes:
        home: what is on the device and in CPU memory, `[elements]` each.

    Raises:
        OSError: the disk is full.
        ValueError: parameters of several dtypes.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        shares: Shares,
        device: torch.device,
        file: Path,
        traffic: "Counter[str]",
    ) -> None:
        if len({p.dtype for p in parameters.values()}) != 1:
            found = {name: str(p.dtype) for name, p in parameters.items()}
            raise ValueError(
                f"a layer's parameters must have one dtype to be spread; they have {found}: cast the model"
            )
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.traffic, self.file = traffic, file
        flat = torch.cat([p.detach().flatten() for p in parameters.values()])
        self.counts = split(len(flat), shares)
        on_device, in_cpu, on_disk = torch.split(flat, [*self.counts])
        self.home = [on_device.to(device, copy=True), in_cpu.to("cpu", copy=True)]
        self._disk = on_disk.nbytes
        if self._disk:
            check_room(file.parent, self._disk)
            try:
                save_file({"weights": on_disk.to("cpu", copy=True)}, file)
            except Exception as error:  # safetensors has errors of its own for what the system says
                raise OSError(
                    f"{file}: {self._disk} bytes of weights can't be written: {error}; free space there"
                ) from error

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(self.counts)

    @property
    def nbytes(self) -> tuple[int, int, int]:
        """Bytes on the device, in CPU memory and on disk."""
        return self.home[0].nbytes, self.home[1].nbytes, self._disk

    def load(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parameters, put together in a buffer `[elements or more]` on the device; views of it.

        Raises:
            FileNotFoundError: the file is gone.
            ValueError: it is not what was written.
        """
        device, cpu, disk = self.counts
        buffer[:device], buffer[device : device + cpu] = self.home[0], self.home[1]
        if disk:
            if not self.file.is_file():
                raise FileNotFoundError(f"{self.file}: weights were put there and are gone; place the model again")
            with opened(self.file) as weights:
                found = weights.get_tensor("weights")
            if len(found) != disk:
                raise ValueError(
                    f"{self.file}: holds {len(found)} numbers, and {disk} were put there; place the model again"
                )
            buffer[device + cpu : self.elements] = found
        self.traffic["cpu_to_device"] += self.home[1].nbytes + self._disk
        self.traffic["disk_to_cpu"] += self._disk
        return self.views(buffer)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters by name as views of `[elements or more]`."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(flat[: self.elements], sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def check_room(folder: Path, needed: int) -> None:
    """Check that a disk has room.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: {needed} bytes are to be put on this disk, and {free} are free: name a folder on another"
        )


def _mapped(file: Path, length: int, width: int, dtype: torch.dtype) -> Tensor:
    """A file of zeros as a tensor `[length, width]`; its room is taken at once, since a mapped page that finds none ends the process."""
    size = length * width * dtype.itemsize
    check_room(file.parent, size)
    with file.open("wb") as made:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(made.fileno(), 0, size)
            else:
                made.write(bytes(size))
        except OSError as error:  # what is free need not be ours: a quota
            file.unlink()
            raise OSError(f"{file}: {size} bytes can't be put there: {error}; name a folder on another disk") from error
    return torch.from_file(str(file), shared=True, size=length * width, dtype=dtype).view(length, width)
