"""The CPU's own kernels for decoding, `native.cc`, which is compiled when it is first needed.

They replace XLA's products in bfloat16, of few rows or, where the CPU has no instructions for
bfloat16, of any number; and its attention over a cache (`layers`, `attention`). Where there is no
C++ compiler, or with HINTSIGHT_NATIVE=0, XLA's stay.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform as machine
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from models import platform

# Of all widths: of a kernel's tiles, and of a vector.
MULTIPLE, HEAD_MULTIPLE = 32, 64
# In the order of `native.cc`.
ACTIVATIONS = ('', 'silu', 'gelu_tanh')

_SOURCE = pathlib.Path(__file__).with_name('native.cc')
_FLAGS = (
  '-std=c++17', '-O3', '-march=native', '-fno-math-errno', '-ffp-contract=fast', '-shared', '-fPIC')
_TARGETS = {
  'hintsight_products': 'HintsightProducts',
  'hintsight_cache_attention': 'HintsightCacheAttention',
  'hintsight_absorb': 'HintsightAbsorb',
  'hintsight_peaks': 'HintsightPeaks',
}


def available() -> bool:
  """Whether programs that are traced now can use the kernels."""
  return platform.name() == 'cpu' and _library() is not None


def max_rows() -> int:
  """For how many rows `products` is faster than XLA on this CPU."""
  return _library().HintsightMostRows()


def reads(cache) -> bool:
  """Whether `cache_attention` can read a `kv_cache.KVCache` where it lies."""
  keys = cache.k[0]
  return keys.dtype == jnp.uint16 and keys.shape[2] % HEAD_MULTIPLE == 0 and available()


def products(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  *,
  norm: tuple[jax.Array, float] | None = None,
  residual: jax.Array | None = None,
  activation: str = '',
  counts: jax.Array | None = None,
) -> list[jax.Array]:
  """x times the transpose of each kernel, all in one call, with what is done before and after it.

  Args:
    x: float32 [rows, in], rounded to bfloat16 here.
    kernels: bfloat16 [out, in], of which both are multiples of MULTIPLE.
    norm: the RMS norm that x is put through first: a scale, float32 [in], and what is added to the
      mean of the squares.
    residual: float32 [rows, out], which is added to each result.
    activation: one of ACTIVATIONS, of the first of two kernels' products, which multiplies the
      other: one result. '' is none.
    counts: bool [rows], those to compute; None is all. Of the others the product is zero, and takes
      no time: which rows count is not compiled.

  Returns:
    float32 [rows, out] of each.

  Raises:
    ValueError: a shape or dtype is another.
  """
  for kernel in kernels:
    _check(kernel.dtype.itemsize == 2 and not any(n % MULTIPLE for n in kernel.shape)
           and kernel.shape[1] == x.shape[1], 'kernel', kernel)
  _check(counts is None or counts.shape == x.shape[:1], 'counts', counts)
  empty = jnp.zeros((0,), jnp.float32)
  scale, eps = (empty, 0.0) if norm is None else norm
  results = [
    jax.ShapeDtypeStruct((x.shape[0], kernel.shape[0]), jnp.float32)
    for kernel in kernels[:1 if activation else None]]
  call = _call('hintsight_products', results)
  return call(
    x, scale, empty if residual is None else residual, _counted(counts), *kernels,
    eps=np.float32(eps), activation=np.int32(ACTIVATIONS.index(activation)))


def _check(holds: bool, name: str, value: jax.Array | None) -> None:
  # What the kernels are given they read: they know no bounds.
  if not holds:
    raise ValueError(f'{name} {value.dtype}{list(value.shape)} does not fit the other arguments.')


def _counted(counts: jax.Array | None) -> jax.Array:
  return jnp.zeros((0,), bool) if counts is None else counts


def cache_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  tail: tuple[jax.Array, jax.Array],
  lengths: jax.Array,
  step: jax.Array,
  places: jax.Array,
  slots: jax.Array | None = None,
  *,
  tables: tuple[jax.Array, jax.Array] | None = None,
  counts: jax.Array | None = None,
  window: int = 0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """`kv_cache.put` and `attention.decode_attention` over a cache where it lies.

  Of the cache a row's own tokens are read, and no others. Few queries and their weights are not
  rounded to its bfloat16.

  Args:
    q: float32 [B, T, N, H], of which H is a multiple of HEAD_MULTIPLE.
    k: float32 [B, T, K, H], of the same tokens.
    v: likewise.
    cache: keys uint16 [., K, H, S] and values [., K, S, H], the bits of bfloat16.
    tail: keys bfloat16 [B, K, H, W] and values [B, K, W, H].
    lengths, step, places, window: as there.
    slots: int32 [B], of the cache, for each row; None: row b is slot b.
    tables: cosines and sines, float32 [B, T, 1, H / 2], by which queries and keys are rotated here;
      None: they are rotated.
    counts: bool [B], rows to compute; None is all. Of the others the result is zero, and the tail
      stays as it is.

  Returns:
    float32 [B, T, N, H], and the tail with the tokens' keys and values.

  Raises:
    ValueError: a shape is another.
  """
  batch = q.shape[0]
  if slots is None:
    _check(cache[0].shape[0] >= batch, 'cache', cache[0])
    slots = jnp.arange(batch, dtype=jnp.int32)
  columns = tail[0].shape[3]
  for name, value, shape in (
      ('lengths', lengths, (batch,)), ('slots', slots, (batch,)),
      ('places', places, (batch, columns)), ('tail', tail[0], (*k.shape[::2], q.shape[3], columns)),
      ('cache', cache[0], (*cache[0].shape[:1], *k.shape[2:], cache[0].shape[3]))):
    _check(value.shape == shape, name, value)
  _check(counts is None or counts.shape == (batch,), 'counts', counts)
  if tables is None:
    tables = (jnp.zeros((0,), jnp.float32),) * 2
  results = [jax.ShapeDtypeStruct(q.shape, jnp.float32)]
  results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tail]
  call = _call('hintsight_cache_attention', results, input_output_aliases={7: 1, 8: 2})
  out, *tail = call(
    q, k, v, *tables, *cache, *tail, lengths, step, places, slots, _counted(counts),
    window=np.int64(window))
  return out, tuple(tail)


def absorb(
  cache: tuple[jax.Array, jax.Array], tail: tuple[jax.Array, jax.Array], places: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A layer of a cache with a tail's columns at `places`, as `KVCache.absorb` has it.

  Args:
    cache: as for `cache_attention`, of as many slots as the tail.
    tail: likewise.
    places: int32 [B, W].
  """
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache]
  call = _call('hintsight_absorb', results, input_output_aliases={0: 0, 1: 1})
  return tuple(call(*cache, *tail, places))


def peaks(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of rows of logits, float32 [R, V], in one call.

  Returns:
    float32 [R], the largest; int32 [R], the first place that has it; float32 [R], the sum of
    exp(logits - the largest).
  """
  rows = logits.shape[:1]
  shapes = [jax.ShapeDtypeStruct(rows, t) for t in (jnp.float32, jnp.int32, jnp.float32)]
  return tuple(_call('hintsight_peaks', shapes)(logits))


def _call(target: str, results, **options) -> Callable[..., Any]:
  _library()  # Registers the targets.
  return jax.ffi.ffi_call(target, results, **options)


@functools.cache
def _library() -> ctypes.CDLL | None:
  """The kernels, registered with JAX; None, which is logged, where they cannot be had."""
  if os.environ.get('HINTSIGHT_NATIVE') == '0':
    return None
  try:
    library = ctypes.CDLL(str(_built()))
  except (OSError, RuntimeError, subprocess.SubprocessError) as error:
    detail = getattr(error, 'stderr', '') or error
    logging.warning('Decoding on this CPU is slower than it could be: models/native.cc: %s', detail)
    return None
  for name, symbol in _TARGETS.items():
    jax.ffi.register_ffi_target(
      name, jax.ffi.pycapsule(getattr(library, symbol)), platform='cpu')
  return library


def _built() -> pathlib.Path:
  """The compiled kernels, made if they are not there.

  Raises:
    OSError: there is no compiler, or no place for what it makes.
    RuntimeError: the user has no home folder.
    subprocess.SubprocessError: it failed.
  """
  compiler = os.environ.get('CXX') or shutil.which('g++') or shutil.which('clang++')
  if compiler is None:
    raise OSError('no C++ compiler was found (g++ or clang++; Debian: apt install g++)')
  include = jax.ffi.include_dir()
  key = '\n'.join([
    _SOURCE.read_text(encoding='utf-8'), jax.__version__, compiler, *_FLAGS, _cpu()])
  name = f'native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  path = cache / 'hintsight' / name
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be at it, too: each makes its own, and the last one's stays.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      made = pathlib.Path(folder) / name
      command = [compiler, *_FLAGS, f'-isystem{include}', str(_SOURCE), '-o', str(made)]
      subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
      made.replace(path)
  return path


def _cpu() -> str:
  """What `-march=native` depends on."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    return machine.processor()
  return next((line for line in lines if line.startswith('flags')), machine.machine())
