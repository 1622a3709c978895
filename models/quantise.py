"""Kernels of a frozen base in 8 or 4 bits, as in QLoRA (Dettmers et al., arXiv 2305.14314).

int8  whole numbers, one scale for each output channel;
int4  whole numbers from -7 to 7, one scale for each BLOCK inputs of an output channel;
nf4   the 16 quantiles of a normal distribution that QLoRA names NormalFloat, in the same blocks.

Two codes of 4 bits share a byte: those of inputs 2i (low) and 2i + 1 (high), so that a shard of a
kernel is a shard of its codes. Scales of blocks are bfloat16: 4.25 bits a weight in all.

Axes: I inputs, O outputs, S scales along the inputs.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.errors import UserError
from models import stored

BLOCK = 64


def _normal_float() -> tuple[float, ...]:
  """NormalFloat's 16 values, ascending: quantiles of a normal distribution, scaled to [-1, 1].

  Eight are positive, seven negative, and zero is one of them.
  """
  quantile = statistics.NormalDist().inv_cdf
  # The outermost quantiles lie where bitsandbytes, whose table is in use everywhere, has them.
  outermost = 0.9677083

  def half(count):
    step = (outermost - 0.5) / count
    return [quantile(outermost - i * step) for i in range(count)]

  values = sorted([*half(8), 0.0, *(-q for q in half(7))])
  return tuple(value / values[-1] for value in values)


NF4 = _normal_float()


def block_size(inputs: int) -> int:
  """Inputs that share a scale: BLOCK, or the largest power of two below it that divides them.

  Raises:
    UserError: an odd number of inputs, which cannot share bytes.
  """
  if inputs % 2:
    raise UserError(f'A kernel of {inputs} inputs cannot be kept in 4 bits; choose int8.')
  return math.gcd(inputs, BLOCK)


def quantise(kernel: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
  """Codes and scales of one kernel.

  Args:
    kernel: float [I, O].
    kind: 'int8', 'int4' or 'nf4'.

  Returns:
    int8 [I, O] and float32 [1, O], or uint8 [I/2, O] and bfloat16 [S, O].
  """
  kernel = jnp.asarray(kernel).astype(jnp.float32)
  inputs, outputs = kernel.shape
  if kind == 'int8':
    scale = jnp.abs(kernel).max(axis=0, keepdims=True) / 127
    codes = jnp.round(kernel / jnp.where(scale == 0, 1, scale))
    return codes.astype(jnp.int8), scale
  blocks = kernel.reshape(-1, block_size(inputs), outputs)
  scale = (jnp.abs(blocks).max(axis=1) / (7 if kind == 'int4' else 1)).astype(jnp.bfloat16)
  # Divided by the scale as it is kept, so that its rounding costs nothing but the clipped largest.
  wide = scale.astype(jnp.float32)[:, None]
  units = blocks / jnp.where(wide == 0, 1, wide)
  if kind == 'int4':
    codes = jnp.clip(jnp.round(units), -7, 7) + 8
  else:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(NF4)]
    codes = sum((units > middle).astype(jnp.uint8) for middle in middles)
  codes = codes.astype(jnp.uint8).reshape(inputs // 2, 2, outputs)
  return codes[:, 0] | codes[:, 1] << 4, scale


def dequantise(codes: jax.Array, scale: jax.Array, kind: str) -> jax.Array:
  """The kernel float32 [I, O] that codes and scales stand for."""
  scale = scale.astype(jnp.float32)
  if kind == 'int8':
    return codes.astype(jnp.float32) * scale
  codes = jnp.stack([codes & 15, codes >> 4], axis=1).reshape(2 * codes.shape[0], codes.shape[1])
  if kind == 'int4':
    units = codes.astype(jnp.float32) - 8
  else:
    # A tree of selections by the code's bits: a lookup of single numbers is slow on accelerators.
    units = [jnp.float32(value) for value in NF4]
    for bit in (1, 2, 4, 8):
      high = (codes & bit) > 0
      units = [jnp.where(high, b, a) for a, b in zip(units[::2], units[1::2], strict=True)]
    units = units[0]
  blocks = units.reshape(scale.shape[0], -1, codes.shape[1]) * scale[:, None]
  return blocks.reshape(codes.shape)


@functools.partial(jax.jit, static_argnums=1)
def quantise_layer(kernel: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
  """`quantise`, compiled."""
  return quantise(kernel, kind)


@functools.partial(jax.jit, static_argnums=2)
def dequantise_layer(codes: jax.Array, scale: jax.Array, kind: str) -> jax.Array:
  """`dequantise`, compiled."""
  return dequantise(codes, scale, kind)


def names(params: Iterable[str]) -> list[str]:
  """The flat names, among these, of the kernels that are quantised: those of the blocks."""
  return [name for name in params if name.startswith('blocks.') and name.endswith('.kernel')]


class _Kernel:
  """A stacked kernel that is quantised layer by layer, when a layer is asked for."""

  def __init__(self, kernel: Any, kind: str):
    self._kernel, self._kind = kernel, kind
    self._scales: dict[int, np.ndarray] = {}  # a 64th of the codes, so that none is made twice

  def codes(self, layer: int) -> np.ndarray:
    # Sliced on every axis: weights that are still in files are read in parts.
    kernel = np.asarray(self._kernel[layer : layer + 1, :, :])[0]
    codes, self._scales[layer] = jax.device_get(quantise_layer(kernel, self._kind))
    return codes

  def scale(self, layer: int) -> np.ndarray:
    if layer not in self._scales:
      self.codes(layer)
    return self._scales.pop(layer)


def params_quantised(params: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """Flat parameters with the blocks' kernels as codes and, beside them, scales.

  Args:
    params: flat name -> what `sharding.put` takes, kernels [L, I, O]; what is quantised already
      stays as it is.
    kind: 'int8', 'int4' or 'nf4'.

  Returns:
    Flat name -> what `sharding.put` takes; codes and scales are made as they are put.
  """
  result = dict(params)
  for name in names(params):
    if f'{name}_scale' in params:
      continue
    kernel = params[name]
    one = jax.ShapeDtypeStruct(tuple(kernel.shape[1:]), jnp.float32)
    shapes = jax.eval_shape(functools.partial(quantise, kind=kind), one)
    lazy = _Kernel(kernel, kind)
    for key, shape, make in zip(
      (name, f'{name}_scale'), shapes, (lazy.codes, lazy.scale), strict=True):
      result[key] = stored.Layers((kernel.shape[0], *shape.shape), shape.dtype, make)
  return result


def params_dequantised(params: Mapping[str, Any], kind: str, dtype: str) -> dict[str, jax.Array]:
  """Undoes `params_quantised`, but for what the codes cannot say; kernels come in `dtype`."""
  result = {name: value for name, value in params.items() if not name.endswith('.kernel_scale')}
  for name in names(params):
    layers = zip(params[name], params[f'{name}_scale'], strict=True)
    result[name] = jnp.stack([dequantise_layer(*layer, kind).astype(dtype) for layer in layers])
  return result
