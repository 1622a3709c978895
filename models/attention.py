"""Causal grouped-query attention over packed rows and over a cache.

Keys and values are never repeated over the query groups, and the softmax is float32.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries a key-value
head, H head width.
"""

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Causal attention within whole rows.

  Args:
    q: float32 [B, T, N, H], rotated.
    k: [B, T, K, H], rotated. Its dtype is that of both products' operands.
    v: [B, T, K, H].
    segment_ids: int32 [B, T] of packed rows: a token sees only its own segment.

  Returns:
    float32 [B, T, N, H].
  """
  index = jnp.arange(q.shape[1])
  mask = (index[None, :] <= index[:, None])[None]
  if segment_ids is not None:
    mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
  return _masked(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask)


def cached_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array
) -> jax.Array:
  """Attention of the newest tokens over a cache that holds them already.

  Args:
    q: float32 [B, T, N, H], rotated; query t of a row stands at index lengths + t of its keys.
    k: [B, K, H, S], rotated. Its dtype is that of both products' operands.
    v: [B, K, S, H].
    lengths: int32 [B].

  Returns:
    float32 [B, T, N, H].
  """
  index = lengths[:, None] + jnp.arange(q.shape[1])
  mask = jnp.arange(k.shape[-1]) <= index[:, :, None]
  return _masked(q, k, v, mask)


def _masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """q [B, T, N, H], k [B, K, H, S], v [B, K, S, H], mask [B or 1, T, S] -> [B, T, N, H]."""
  batch, width, heads, head_dim = q.shape
  kv_heads, keys = k.shape[1], k.shape[-1]
  groups = heads // kv_heads
  q = (q * head_dim**-0.5).reshape(batch, width, kv_heads, groups, head_dim)
  # The queries of a group are rows of one product with the keys they share.
  q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * width, head_dim)
  scores = jnp.matmul(q.astype(k.dtype), k, preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, kv_heads, groups, width, keys)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  weights = weights.reshape(batch, kv_heads, groups * width, keys)
  out = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
  out = out.reshape(batch, kv_heads, groups, width, head_dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, width, heads, head_dim)
