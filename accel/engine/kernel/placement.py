"""Where the kernel finds the values and weights of a plan: tensors of constant addresses, and words between blocks."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from accel.engine.kernel import records
from accel.engine.low_bits import LowBits, integers


class NotRunnableError(Exception):
    """The kernel can't run a plan; the message says why."""


class Placement:
    """Addresses and formats of values for one set of decode buffers.

    Args:
        tensors: Values of constant addresses: inputs and outputs of the graph, and what is computed before the kernel.
        constants: Constants of the graph.
        dtypes: Value -> its dtype in the graph.
        read: Values that operations read.
        dtype: Dtype of the weights and of the words that hold two numbers.
        rows: Rows of the batch.
        device: The device.
        weights: Weights in the kernel's layout made so far, by name; shared by all sets of buffers.

    Attributes:
        keep: Tensors whose addresses were handed out.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        read: Collection[str],
        dtype: torch.dtype,
        rows: int,
        device: torch.device,
        weights: dict[str, Tensor],
    ) -> None:
        self._tensors, self._constants, self._dtypes, self._read = tensors, constants, dict(dtypes), read
        self._dtype, self._rows, self._device, self._weights = dtype, rows, device, weights
        self._words: dict[str, Tensor] = {}
        self.keep: list[Tensor] = []

    def value(self, name: str) -> tuple[int, int]:
        """Return address and format of a value that an operation reads.

        Raises:
            NotRunnableError: The kernel can't read it.
        """
        if name in self._words:
            return self._words[name].data_ptr(), self.format(name, words=True)
        return self.plain(name).data_ptr(), self.format(name, words=False)

    def plain(self, name: str) -> Tensor:
        """Return the tensor of a value that is not in words; raise `NotRunnableError` if there is none."""
        tensor = self._tensors.get(name, self._constants.get(name))
        if tensor is None or not tensor.is_contiguous():
            raise NotRunnableError(f"{name} is no contiguous tensor that is known before the kernel runs")
        self.keep.append(tensor)
        return tensor

    def format(self, name: str, words: bool) -> int:
        """Return the format of a value; raise `NotRunnableError` if its dtype is not supported beside the weights'."""
        dtype = self._tensors[name].dtype if name in self._tensors else self._dtypes[name]
        if dtype == torch.float32:
            return records.WORDS_F32 if words else records.PLAIN_F32
        if dtype == self._dtype:
            return records.WORDS if words else records.PLAIN
        raise NotRunnableError(f"{name} is of {dtype}, beside weights of {self._dtype}")

    def output(self, name: str, dtype: torch.dtype, width: int) -> tuple[int, int]:
        """Return address and format of what an operation writes, [rows, width]: the caller's tensor, or words.

        Raises:
            NotRunnableError: The kernel can't write it.
        """
        if name in self._tensors:
            if name in self._read:
                raise NotRunnableError(f"{name} is an output of the graph that operations read")
            return self.plain(name).data_ptr(), self.format(name, words=False)
        if width % 4:
            raise NotRunnableError(f"{name} has {width} features, no multiple of 4")
        self._dtypes[name] = dtype
        numbers = 1 if dtype == torch.float32 else 2
        self._words[name] = self.words(self._rows * width // numbers)
        return self._words[name].data_ptr(), self.format(name, words=True)

    def words(self, count: int) -> Tensor:
        """Return new words for what blocks exchange."""
        self.keep.append(torch.zeros(count, dtype=torch.int64, device=self._device))
        return self.keep[-1]

    def width(self, name: str) -> int:
        """Return the number of features in a row of a value."""
        if name in self._words:
            numbers = 1 if self._dtypes[name] == torch.float32 else 2
            return self._words[name].numel() * numbers // self._rows
        return self.plain(name).numel() // self._rows

    def vector(self, name: str) -> int:
        """Return the address of a constant vector in the dtype of the weights.

        Raises:
            NotRunnableError: Its numbers are not of that dtype.
        """
        if name not in self._weights:
            tensor = self._constants[name].to(self._device).flatten()
            rounded = tensor.to(self._dtype).contiguous()
            if not torch.equal(rounded.to(tensor.dtype), tensor):
                raise NotRunnableError(f"{name} loses precision in {self._dtype}")
            self._weights[name] = rounded
        self.keep.append(self._weights[name])
        return self.keep[-1].data_ptr()

    def scales(self, names: Sequence[Sequence[str]], low: LowBits, group: int) -> int:
        """Return the address of the scales of weights of few bits, in the order in which the kernel multiplies rows.

        Args:
            names: For a weight, and for its gate where it has one, its scales [N, blocks], and its zero points or none.
            low: How the weights are stored.
            group: Rows of each that the kernel multiplies together, of which there are eight with the gate's.

        Returns:
            Address of [groups, blocks, 8], or with zero points, as integers of 16 bits, [groups, blocks, 8, 2].
        """
        key = f"{' '.join(name for each in names for name in each)} in groups"
        if key not in self._weights:
            parts = []
            for each in names:
                scales, *zeros = (self._constants[name].to(self._device) for name in each)
                rows, blocks = scales.shape
                columns = [scales.view(torch.int16)]
                columns += [integers(zero.reshape(rows, -1), low.bits)[:, :blocks].to(torch.int16) for zero in zeros]
                padded = functional.pad(torch.stack(columns, -1), (0, 0, 0, 0, 0, -rows % group))
                parts.append(padded.reshape(-1, group, blocks, len(columns)))
            self._weights[key] = torch.cat(parts, 1).transpose(1, 2).contiguous()
        self.keep.append(self._weights[key])
        return self.keep[-1].data_ptr()

    def weight(self, name: str, transposed: bool) -> Tensor:
        """Return a weight [N, K], or integers of one; `transposed`: the graph stores it so, and it is not copied."""
        key = f"{name} {transposed}"
        if key not in self._weights:
            weight = self._constants[name].to(self._device)
            self._weights[key] = (weight if transposed else weight.mT).contiguous()
        self.keep.append(self._weights[key])
        return self.keep[-1]
