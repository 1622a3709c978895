"""Reads the GGUF container: metadata and the table of (still quantised) tensors.

Layout (ggml/docs/gguf.md): magic, version, counts, typed key-value pairs, tensor table, padding,
tensor data. A file is memory-mapped, so reading the metadata of a large model costs nothing, and
every length is checked against the file's size, so a truncated file is named as such.
"""

import dataclasses
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from data.errors import UserError

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_SCALARS = {
  0: '<B', 1: '<b', 2: '<H', 3: '<h', 4: '<I', 5: '<i', 6: '<f', 7: '<?', 10: '<Q', 11: '<q',
  12: '<d',
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
  """One tensor of the table.

  Attributes:
    name: e.g. 'blk.0.attn_q.weight'.
    shape: numpy order (slowest axis first), e.g. (out features, in features).
    kind: ggml quantisation type.
    offset: bytes from the start of the file.
  """

  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int


class GGUFFile:
  """An open GGUF file.

  Attributes:
    path: where it lies.
    metadata: key -> int, float, bool, str or list of those.
    tensors: name -> GGUFTensor.
  """

  def __init__(self, path: str | pathlib.Path):
    """Opens and reads everything but the tensor data.

    Args:
      path: a .gguf file.

    Raises:
      UserError: missing, truncated, or not a little-endian GGUF of version 2 or 3.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise UserError(f'there is no GGUF file {self.path}; give the path of a .gguf file.')
    with self.path.open('rb') as file:
      if file.read(4) != _MAGIC:
        raise UserError(f'{self.path} is not a GGUF file: it does not start with "GGUF".')
      self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    self._cursor = 4
    self.metadata: dict[str, Any] = {}
    self.tensors: dict[str, GGUFTensor] = {}
    try:
      self._read_header()
    except (struct.error, IndexError, MemoryError, OverflowError, UnicodeDecodeError) as error:
      raise self._truncated() from error

  def array(self, name: str) -> np.ndarray:
    """Dequantises one tensor.

    Args:
      name: a key of `tensors`.

    Returns:
      float32 array of the tensor's shape (a fresh copy).

    Raises:
      UserError: the data lies beyond the end of the file, or its type cannot be dequantised.
    """
    import gguf  # only weights need it; the tokenizer reads metadata alone

    tensor = self.tensors[name]
    try:
      kind = gguf.GGMLQuantizationType(tensor.kind)
      block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
      raise UserError(f'{self.path}: tensor {name} has the unknown type {tensor.kind}.') from error
    size = int(np.prod(tensor.shape, dtype=np.int64)) // block * block_bytes
    if tensor.offset + size > len(self._bytes):
      raise self._truncated()
    raw = np.frombuffer(self._bytes, np.uint8, size, tensor.offset)
    native = {gguf.GGMLQuantizationType.F32: '<f4', gguf.GGMLQuantizationType.F16: '<f2'}
    if kind in native:
      return raw.view(native[kind]).astype(np.float32).reshape(tensor.shape)
    rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
    try:
      return gguf.quants.dequantize(rows, kind)
    except NotImplementedError as error:
      raise UserError(
        f'{self.path}: tensor {name} has type {kind.name}, which cannot be dequantised; use a '
        'file of another quantisation.'
      ) from error

  def _truncated(self) -> UserError:
    return UserError(
      f'{self.path} is truncated or damaged ({len(self._bytes)} bytes); download it again.'
    )

  def _read_header(self) -> None:
    version = self._scalar('<I')
    if version not in _VERSIONS:
      raise UserError(
        f'{self.path} is GGUF version {version}; versions {_VERSIONS} (little-endian) can be read.'
      )
    num_tensors, num_pairs = self._scalar('<Q'), self._scalar('<Q')
    for _ in range(num_pairs):
      key = self._string()
      self.metadata[key] = self._value(self._scalar('<I'))
    table = []
    for _ in range(num_tensors):
      name = self._string()
      shape = tuple(self._scalar('<Q') for _ in range(self._scalar('<I')))[::-1]
      table.append((name, shape, self._scalar('<I'), self._scalar('<Q')))
    alignment = self.metadata.get('general.alignment', 32)
    start = -(-self._cursor // alignment) * alignment
    for name, shape, kind, offset in table:
      if start + offset >= len(self._bytes):
        raise self._truncated()
      self.tensors[name] = GGUFTensor(name, shape, kind, start + offset)

  def _scalar(self, form: str) -> Any:
    (value,) = struct.unpack_from(form, self._bytes, self._cursor)
    self._cursor += struct.calcsize(form)
    return value

  def _string(self) -> str:
    end = self._scalar('<Q') + self._cursor
    if end > len(self._bytes):
      raise IndexError
    text = self._bytes[self._cursor : end].decode()
    self._cursor = end
    return text

  def _value(self, kind: int) -> Any:
    if kind == _STRING:
      return self._string()
    if kind == _ARRAY:
      item_kind, count = self._scalar('<I'), self._scalar('<Q')
      if item_kind in _SCALARS:
        form = _SCALARS[item_kind]
        size = struct.calcsize(form)
        if self._cursor + count * size > len(self._bytes):
          raise IndexError
        values = struct.unpack_from(f'<{count}{form[1]}', self._bytes, self._cursor)
        self._cursor += count * size
        return list(values)
      return [self._value(item_kind) for _ in range(count)]
    if kind not in _SCALARS:
      raise IndexError
    return self._scalar(_SCALARS[kind])
