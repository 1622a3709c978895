"""Keys and values of every slot: argument and result of the passes of `models.incremental`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models import native
from models.layers import from_bits, to_bits

# A position that no slot has: what is written there is dropped, and no query sees it.
OUTSIDE = 2**31 - 1


class Layer(NamedTuple):
  """One layer's keys and values.

  Attributes:
    k: [slots, K, H, max_len], rotated keys; int8 codes where there are scales.
    v: [slots, K, max_len, H], likewise.
    k_scale: [slots, K, max_len], what a key's codes are multiplied by; None but for int8.
    v_scale: [slots, K, max_len], likewise of the values.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Arrays of one layer each, so that a donated cache is updated in place.

  Keys lie transposed: the products of both attention steps then read the cache along its last axis.

  Attributes:
    k: L arrays [slots, K, H, max_len], rotated keys.
    v: L arrays [slots, K, max_len, H].
    k_scale: L arrays [slots, K, max_len] of an int8 cache, a scale for each head and position; ()
      for the other dtypes. A scale has the model's compute dtype, which attention then has, too.
    v_scale: likewise of the values.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  k_scale: tuple[jax.Array, ...] = ()
  v_scale: tuple[jax.Array, ...] = ()

  @classmethod
  def init(cls, config, num_slots: int, max_len: int, dtype: str = 'float32') -> KVCache:
    """An empty cache.

    Args:
      config: DecoderConfig.
      num_slots: rows.
      max_len: tokens a slot can hold.
      dtype: 'float32', 'bfloat16' or 'int8'. bfloat16 is kept as `layers.to_bits` on CPU, where its
        scatter is 7 times slower.
    """
    heads, width = config.num_kv_heads, config.head_dim

    def empty(dtype, *shape):
      dtype = to_bits(jnp.zeros((), dtype)).dtype
      return tuple(jnp.zeros((num_slots, *shape), dtype) for _ in range(config.num_layers))

    arrays = empty(dtype, heads, width, max_len), empty(dtype, heads, max_len, width)
    if dtype != 'int8':
      return cls(*arrays)
    return cls(*arrays, *(empty(config.dtype, heads, max_len) for _ in range(2)))

  @classmethod
  def of(cls, layers: Iterable[Layer]) -> KVCache:
    """The cache of these layers."""
    k, v, k_scale, v_scale = zip(*layers, strict=True)
    return cls(k, v) if k_scale[0] is None else cls(k, v, k_scale, v_scale)

  @property
  def layers(self) -> list[Layer]:
    """The layers in their order."""
    parts = (self.k, self.v, self.k_scale, self.v_scale)
    return [Layer(*layer) for layer in zip(*filter(None, parts), strict=True)]

  @property
  def num_slots(self) -> int:
    return self.v[0].shape[0]

  @property
  def max_len(self) -> int:
    return self.v[0].shape[2]

  @property
  def nbytes(self) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(self))

  @property
  def readable(self) -> bool:
    """Whether all of it can stand for its own prefix: not where bfloat16 is kept as bits."""
    return self.v[0].dtype != jnp.uint16

  def _map(self, function: Callable[[jax.Array, int], jax.Array]) -> KVCache:
    """`function(array, the axis of its positions)` of all arrays."""
    fields = ((self.k, 3), (self.v, 2), (self.k_scale, 2), (self.v_scale, 2))
    return KVCache(*(tuple(function(array, axis) for array in part) for part, axis in fields))

  def prefix(self, attend_len: int) -> KVCache:
    """The first `attend_len` positions, as values to read, for a loop of decode steps.

    Attention over a part of a cache makes XLA copy that part (and decode its bits) at every step;
    a loop that reads a prefix and writes a tail copies once. A whole cache needs no copy if it is
    `readable`, and the program does not write to it, too.
    """
    cut = lambda x, axis: from_bits(jax.lax.slice_in_dim(x, 0, attend_len, axis=axis))
    return self._map(cut)

  def section(self, rows: jax.Array, start: int, end: int) -> KVCache:
    """The positions from `start` to `end` of slots int32 [n], as values to read."""
    cut = lambda x, axis: from_bits(jax.lax.slice_in_dim(x, start, end, axis=axis)[rows])
    return self._map(cut)

  def row(self, slot: jax.Array, attend_len: int) -> KVCache:
    """The first `attend_len` positions of one slot, as they are kept: a cache of one slot."""

    def cut(x, axis):
      x = jax.lax.slice_in_dim(x, 0, attend_len, axis=axis)
      return jax.lax.dynamic_slice_in_dim(x, slot, 1)

    return self._map(cut)

  def with_row(self, row: KVCache, slots: jax.Array, count: jax.Array) -> KVCache:
    """This cache with a `row` at the beginning of the first `count` of slots, int32 [n]."""

    def write(i, cache):
      put = lambda x, new: jax.lax.dynamic_update_slice(x, new, (slots[i], *(0,) * (x.ndim - 1)))
      return jax.tree.map(put, cache, row)

    return jax.lax.fori_loop(0, count, write, self)

  def tail(self, steps: int) -> KVCache:
    """Room for the tokens of a decode loop: as many columns for every slot."""

    def empty(x, axis):
      shape = (*x.shape[:axis], steps, *x.shape[axis + 1 :])
      return jnp.zeros(shape, jnp.bfloat16 if x.dtype == jnp.uint16 else x.dtype)

    return self._map(empty)

  def absorb(self, tail: KVCache, places: jax.Array, *, in_place: bool = False) -> KVCache:
    """This cache with a tail's columns at `places`, int32 [slots, columns]; those OUTSIDE not.

    `in_place`: by `models.native`, as `incremental.reads_in_place` says.
    """
    if in_place:
      layers = zip(self.layers, tail.layers, strict=True)
      return KVCache.of(Layer(*native.absorb(old[:2], new[:2], places)) for old, new in layers)
    token_major = lambda x, axis: jnp.moveaxis(x, axis, 1)
    news = tail._map(token_major).layers
    return KVCache.of(
      _write(layer, new, places, None) for layer, new in zip(self.layers, news, strict=True))


def places(lengths: jax.Array, counts: jax.Array, width: int) -> jax.Array:
  """int32 [B, width]: where a row's first `counts` tokens go, from `lengths` on; then OUTSIDE."""
  offset = jnp.arange(width)
  return jnp.where(offset < counts[:, None], lengths[:, None] + offset, OUTSIDE)


def extend(
  layer: Layer,
  new_k: jax.Array,
  new_v: jax.Array,
  lengths: jax.Array,
  counts: jax.Array,
  slots: jax.Array | None,
) -> Layer:
  """Writes the valid new tokens of each row into one layer's cache.

  Tokens beyond a row's count, and positions beyond max_len, get an index outside the array and are
  dropped by the scatter: they can neither wrap nor be clamped onto valid entries.

  Args:
    layer: of the cache.
    new_k: float32 [B, T, K, H].
    new_v: float32 [B, T, K, H].
    lengths: int32 [B], where each row begins to write.
    counts: int32 [B], how many of its T tokens are valid.
    slots: int32 [B], the slot of each row; None: row b is slot b.

  Returns:
    The layer, extended.
  """
  at = places(lengths, counts, new_k.shape[1])
  return _write(layer, _encode(new_k, new_v, layer), at, slots)


def put(layer: Layer, new_k: jax.Array, new_v: jax.Array, column: jax.Array) -> Layer:
  """Writes new_k and new_v [B, T, K, H] from `column` on into one layer's tail."""
  new = _encode(new_k, new_v, layer)
  arrays = []
  for array, value, axis in zip(layer, new, (3, 2, 2, 2), strict=True):
    if array is not None:
      value = jnp.moveaxis(value, 1, axis)
      array = jax.lax.dynamic_update_slice_in_dim(array, value, column, axis)
    arrays.append(array)
  return Layer(*arrays)


def read(layer: Layer, attend_len: int, slots: jax.Array | None) -> Layer:
  """The first `attend_len` positions of each row's slot, [B, ...], as values to read."""

  def rows(x, axis):
    if x is None:
      return None
    x = jax.lax.slice_in_dim(x, 0, attend_len, axis=axis)
    return from_bits(x if slots is None else x[slots])

  return Layer(*map(rows, layer, (3, 2, 2, 2)))


def _write(layer: Layer, new: Layer, at: jax.Array, slots: jax.Array | None) -> Layer:
  """Puts new tokens, arrays [B, T, K, ...], at positions int32 [B, T] of each row's slot."""
  rows = jnp.arange(at.shape[0]) if slots is None else slots
  rows = jnp.broadcast_to(rows[:, None], at.shape)
  k = layer.k.at[rows, :, :, at].set(_as(new.k, layer.k), mode='drop')
  v = layer.v.at[rows, :, at].set(_as(new.v, layer.v), mode='drop')
  if layer.k_scale is None:
    return Layer(k, v)
  scales = (
    held.at[rows, :, at].set(_as(value, held), mode='drop')
    for held, value in zip(layer[2:], new[2:], strict=True))
  return Layer(k, v, *scales)


def _encode(new_k: jax.Array, new_v: jax.Array, layer: Layer) -> Layer:
  """New tokens float32 [B, T, K, H] as a layer keeps them, in that order of axes."""
  if layer.k_scale is None:
    return Layer(_as(new_k, layer.k), _as(new_v, layer.v))
  (k, k_scale), (v, v_scale) = (_quantised(x, layer.k_scale) for x in (new_k, new_v))
  return Layer(k, v, k_scale, v_scale)


def _quantised(x: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Codes from -127 to 127 of x [..., H] and their scales [...], which are kept as `like` is."""
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  if like.dtype != jnp.float32:
    # Rounded upwards: the codes of the largest number must not leave their range.
    scale = (scale * (1 + 2**-8)).astype(jnp.bfloat16)
  value = scale.astype(jnp.float32)[..., None]
  codes = jnp.round(x / jnp.where(value > 0, value, 1.0)).astype(jnp.int8)
  return codes, _as(scale, like)


def _as(new: jax.Array, held: jax.Array) -> jax.Array:
  if new.dtype == held.dtype:
    return new
  return to_bits(new.astype(jnp.bfloat16)) if held.dtype == jnp.uint16 else new.astype(held.dtype)
