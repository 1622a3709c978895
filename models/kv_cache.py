"""Keys and values of every slot: an explicit argument and result of `decoder.forward_cached`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from models.layers import from_bits, to_bits


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
      dtype: 'float32' or 'bfloat16'. bfloat16 is kept as `layers.to_bits` on CPU, where its scatter
        is 7 times slower.
    """
    heads, width = config.num_kv_heads, config.head_dim
    dtype = to_bits(jnp.zeros((), dtype)).dtype

    def empty(*shape):
      return tuple(jnp.zeros((num_slots, *shape), dtype) for _ in range(config.num_layers))

    return cls(empty(heads, width, max_len), empty(heads, max_len, width))

  @property
  def num_slots(self) -> int:
    return self.v[0].shape[0]

  @property
  def max_len(self) -> int:
    return self.v[0].shape[2]

  def prefix(self, attend_len: int) -> KVCache:
    """The first `attend_len` positions, as values to read, for a loop of `decoder.forward_step`.

    Attention over a part of a cache makes XLA copy that part (and decode its bits) at every step;
    a loop that reads a prefix and writes a tail copies once.
    """
    return KVCache(
      tuple(from_bits(k[..., :attend_len]) for k in self.k),
      tuple(from_bits(v[:, :, :attend_len]) for v in self.v),
    )

  def tail(self, steps: int) -> KVCache:
    """Room for the tokens of a loop of `steps` decode steps, all slots at the same step."""

    def empty(x, axis):
      shape = (*x.shape[:axis], steps, *x.shape[axis + 1 :])
      return jnp.zeros(shape, jnp.bfloat16 if x.dtype == jnp.uint16 else x.dtype)

    return KVCache(tuple(empty(k, 3) for k in self.k), tuple(empty(v, 2) for v in self.v))

  def absorb(self, tail: KVCache, lengths: jax.Array, counts: jax.Array) -> KVCache:
    """This cache, each slot extended at `lengths` by the first `counts` tokens of its tail."""
    layers = [
      extend(k, v, new_k.transpose(0, 3, 1, 2), new_v.transpose(0, 2, 1, 3), lengths, counts, None)
      for k, v, new_k, new_v in zip(self.k, self.v, tail.k, tail.v, strict=True)
    ]
    return KVCache(*zip(*layers, strict=True))


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
  k = k.at[rows, :, :, index].set(_encode(new_k, k), mode='drop')
  v = v.at[rows, :, index].set(_encode(new_v, v), mode='drop')
  return k, v


def put(
  k: jax.Array, v: jax.Array, new_k: jax.Array, new_v: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Writes new_k and new_v [B, 1, K, H] at position `step` of one layer's tail."""
  new_k, new_v = new_k.transpose(0, 2, 3, 1), new_v.transpose(0, 2, 1, 3)
  k = jax.lax.dynamic_update_slice_in_dim(k, new_k.astype(k.dtype), step, 3)
  return k, jax.lax.dynamic_update_slice_in_dim(v, new_v.astype(v.dtype), step, 2)


def read(
  k: jax.Array, v: jax.Array, attend_len: int, slots: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """The first `attend_len` positions of each row's slot: [B, K, H, S] and [B, K, S, H]."""
  if attend_len < v.shape[2]:
    k, v = k[..., :attend_len], v[:, :, :attend_len]
  if slots is not None:
    k, v = k[slots], v[slots]
  return from_bits(k), from_bits(v)


def _encode(new: jax.Array, cache: jax.Array) -> jax.Array:
  return to_bits(new.astype(jnp.bfloat16)) if cache.dtype == jnp.uint16 else new.astype(cache.dtype)
