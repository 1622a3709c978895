"""Parameters that lie in files: their shapes are known at once, their numbers are read when asked.

A decoder's parameter is made of one tensor of a checkpoint, or of one for each layer. What is asked
for is what a device holds of it, so that weights larger than the host's memory reach their shards.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Protocol

import ml_dtypes
import numpy as np
import safetensors

from data.errors import UserError

# Read and converted at once; what a file maps into memory is given back after as much.
BLOCK_BYTES = 16 * 2**20

Index = tuple[slice, ...]


class Tensor(Protocol):
  """One tensor of a checkpoint."""

  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self, index: Index) -> np.ndarray:
    """A part of it."""


_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class SafeTensor:
  """A tensor of a safetensors file."""

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @classmethod
  def describe(cls, file, path: pathlib.Path, name: str) -> 'SafeTensor':
    """From an open file, whose header has shape and dtype; an integer's dtype is `object`."""
    found = file.get_slice(name)
    dtype = np.dtype(_DTYPES.get(found.get_dtype(), object))
    return cls(path, name, tuple(found.get_shape()), dtype)

  def read(self, index: Index) -> np.ndarray:
    """Opens the file anew: closing it unmaps the pages that were read."""
    try:
      with safetensors.safe_open(self.path, framework='np') as file:
        return file.get_slice(self.name)[index]
    except (OSError, safetensors.SafetensorError) as error:
      raise UserError(f'{self.path}: {self.name} cannot be read ({error}).') from error


@dataclasses.dataclass(frozen=True)
class WholeTensor:
  """A tensor that can only be read as a whole (of a GGUF file, which keeps it quantised)."""

  shape: tuple[int, ...]
  load: Callable[[], np.ndarray]

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float32)

  def read(self, index: Index) -> np.ndarray:
    return _last(self.load)[index]


@functools.lru_cache(maxsize=1)
def _last(load: Callable[[], np.ndarray]) -> np.ndarray:
  """The parts of a tensor are asked for one after the other."""
  return load()


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter(np.lib.mixins.NDArrayOperatorsMixin):
  """A parameter in the decoder's layout; in NumPy's functions and operators it is read as a whole.

  Attributes:
    tensors: one, or one for each layer where it is stacked.
    shape: with the layers in front where it is stacked.
    dtype: to which it is converted.
    transposed: whether the file has its last two axes the other way round.
  """

  tensors: tuple[Tensor, ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  transposed: bool = False

  @property
  def stacked(self) -> bool:
    return len(self.shape) > len(self.tensors[0].shape)

  def layer(self, number: int) -> 'Parameter':
    """One layer of a stacked parameter."""
    return dataclasses.replace(self, tensors=(self.tensors[number],), shape=self.shape[1:])

  def __getitem__(self, index: Index) -> np.ndarray:
    """Reads a part; `index` has a slice of step 1 for every axis, as shardings give them."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], self.dtype)
    if self.stacked:
      for place, number in enumerate(range(*bounds[0])):
        self._fill(out[place], self.tensors[number], bounds[1:])
    else:
      self._fill(out, self.tensors[0], bounds)
    return out

  def _fill(self, out: np.ndarray, tensor: Tensor, bounds: list[tuple[int, int]]) -> None:
    """Reads blocks of the file's rows, so that no second copy of a large tensor arises."""
    if self.transposed:
      out, bounds = out.T, bounds[::-1]
    (first, stop), rest = bounds[0], tuple(slice(*bound) for bound in bounds[1:])
    row_bytes = max(1, out[:1].size * tensor.dtype.itemsize)
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(first, stop, rows):
      end = min(start + rows, stop)
      out[start - first : end - first] = tensor.read((slice(start, end), *rest))

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """The whole parameter, read now."""
    del copy
    whole = self[(slice(None),) * len(self.shape)]
    return whole if dtype is None else whole.astype(dtype)

  def __array_ufunc__(self, ufunc, method, *inputs, **options):
    inputs = [np.asarray(x) if isinstance(x, Parameter) else x for x in inputs]
    return getattr(ufunc, method)(*inputs, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
  """A stacked parameter whose layers are made when they are asked for.

  Attributes:
    shape: with the layers in front.
    dtype: of the layers.
    make: layer number -> array.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[int], np.ndarray]
  stacked = True

  def layer(self, number: int) -> np.ndarray:
    return self.make(number)
