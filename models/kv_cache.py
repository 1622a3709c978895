"""Keys and values of every slot: an explicit argument and result of `decoder.forward_cached`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Arrays of one layer each, so that a donated cache is updated in place.

  Keys lie transposed: the products of both attention steps then read the cache along its last axis.

  Attributes:
    k: L arrays [slots, K, H, max_len], rotated keys.
    v: L arrays [slots, K, max_len, H].
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]

  @classmethod
  def init(cls, config, num_slots: int, max_len: int, dtype: str = 'float32') -> KVCache:
    """An empty cache.

    Args:
      config: DecoderConfig.
      num_slots: rows.
      max_len: tokens a slot can hold.
      dtype: 'float32' or 'bfloat16'. On CPU bfloat16 is kept as its bits in uint16: XLA scatters
        bfloat16 there by converting the whole array to float32 and back (7 times slower).
    """
    heads, width = config.num_kv_heads, config.head_dim
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16 and jax.default_backend() == 'cpu':
      dtype = jnp.dtype('uint16')

    def empty(*shape):
      return tuple(jnp.zeros((num_slots, *shape), dtype) for _ in range(config.num_layers))

    return cls(empty(heads, width, max_len), empty(heads, max_len, width))

  @property
  def num_slots(self) -> int:
    return self.v[0].shape[0]

  @property
  def max_len(self) -> int:
    return self.v[0].shape[2]

  def window(self, attend_len: int) -> KVCache:
    """A copy of the first `attend_len` positions, for a loop of decode steps.

    Attention over a part of a cache makes XLA copy that part at every step; a loop that carries a
    window (max_len == attend_len) copies once before and, by `restore`, once after.
    """
    if attend_len >= self.max_len:
      return self
    return KVCache(
      tuple(k[..., :attend_len] for k in self.k), tuple(v[:, :, :attend_len] for v in self.v)
    )

  def restore(self, window: KVCache) -> KVCache:
    """This cache with its first positions taken from a window of it."""
    n = window.max_len
    if n == self.max_len:
      return window
    return KVCache(
      tuple(k.at[..., :n].set(new) for k, new in zip(self.k, window.k, strict=True)),
      tuple(v.at[:, :, :n].set(new) for v, new in zip(self.v, window.v, strict=True)),
    )


def extend(
  k: jax.Array,
  v: jax.Array,
  new_k: jax.Array,
  new_v: jax.Array,
  lengths: jax.Array,
  counts: jax.Array,
  slots: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Writes the valid new tokens of each row into one layer's cache.

  Tokens beyond a row's count, and positions beyond max_len, get an index outside the array and are
  dropped by the scatter: they can neither wrap nor be clamped onto valid entries.

  Args:
    k: [slots, K, H, S].
    v: [slots, K, S, H].
    new_k: [B, T, K, H].
    new_v: [B, T, K, H].
    lengths: int32 [B], where each row begins to write.
    counts: int32 [B], how many of its T tokens are valid.
    slots: int32 [B], the slot of each row; None: row b is slot b.

  Returns:
    k and v, extended.
  """
  batch, width = new_k.shape[:2]
  offset = jnp.arange(width)
  index = jnp.where(offset < counts[:, None], lengths[:, None] + offset, v.shape[2])
  rows = jnp.arange(batch) if slots is None else slots
  rows = jnp.broadcast_to(rows[:, None], index.shape)
  k = k.at[rows, :, :, index].set(_encode(new_k, k.dtype), mode='drop')
  v = v.at[rows, :, index].set(_encode(new_v, v.dtype), mode='drop')
  return k, v


def read(
  k: jax.Array, v: jax.Array, attend_len: int, slots: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """The first `attend_len` positions of each row's slot: [B, K, H, S] and [B, K, S, H]."""
  if attend_len < v.shape[2]:
    k, v = k[..., :attend_len], v[:, :, :attend_len]
  if slots is not None:
    k, v = k[slots], v[slots]
  return _decode(k), _decode(v)


def _encode(x: jax.Array, dtype) -> jax.Array:
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  return x.astype(dtype)


def _decode(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
