"""Causal grouped-query attention over packed rows and over a cache.

Keys and values are never repeated over the query groups: the queries that share a head are rows of
one product with it. The softmax is float32 and is normalised after the second product, on H numbers
a query instead of S.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries a key-value
head, H head width, C queries of a block.
"""

import functools

import jax
import jax.numpy as jnp

from models import platform, splash
from models.layers import from_bits, to_bits

MASKED = -1e30
MIN_BLOCK, MAX_BLOCKS = 128, 8


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  window: int = 0,
  is_local: jax.Array | None = None,
) -> jax.Array:
  """Causal attention within whole rows: splash attention on a TPU, elsewhere in blocks.

  The blocks: at most MAX_BLOCKS of queries, each against the keys from its window's start to its
  end, so that nearly half of the square, or all outside the window, is never computed. The backward
  pass computes the scores of a block anew (as
  FlashAttention does, arXiv 2205.14135): no layer keeps T x S numbers.

  Args:
    q: float32 [B, T, N, H], rotated.
    k: [B, T, K, H], rotated. Its dtype is that of all products' operands.
    v: [B, T, K, H].
    segment_ids: int32 [B, T] of packed rows: a token sees only its own segment.
    window: a token sees so many of the newest tokens, itself included; 0 is all of them.
    is_local: bool [], whether the window holds; None is True. Only one of the two is computed.

  Returns:
    float32 [B, T, N, H].
  """
  batch, width, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  q = (q * head_dim**-0.5).astype(k.dtype)
  if window >= width:
    window = 0
  if platform.name() == 'tpu':
    if segment_ids is None:
      segment_ids = jnp.zeros((batch, width), jnp.int32)

    def run(window):
      return splash.splash_attention(q, k, v, segment_ids, window=window).astype(jnp.float32)

    return _choose(run, window, is_local)
  q = q.reshape(batch, width, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  out = _choose(functools.partial(_blocked, q, k, v, segment_ids), window, is_local)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, width, heads, head_dim)


def _choose(run, window: int, is_local: jax.Array | None) -> jax.Array:
  """run(window) where `is_local`, else run(0): a branch, of which one side is computed."""
  if not window or is_local is None:
    return run(window)
  return jax.lax.cond(is_local, lambda: run(window), lambda: run(0))


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lengths: jax.Array,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  *,
  window: int = 0,
) -> jax.Array:
  """Attention of the newest tokens over a cache that holds them already.

  Args:
    q: float32 [B, T, N, H], rotated; query t of a row stands at index lengths + t of its keys.
    k: [B, K, H, S], rotated. Its dtype is that of both products' operands.
    v: [B, K, S, H].
    lengths: int32 [B].
    k_scale: [B, K, S] where keys are int8 codes; its dtype is then that of the operands.
    v_scale: likewise of the values.
    window: as in `attention`.

  Returns:
    float32 [B, T, N, H].
  """
  batch, width, heads, head_dim = q.shape
  index = lengths[:, None] + jnp.arange(width)
  mask = jnp.arange(k.shape[-1]) <= index[:, :, None]
  if window:
    mask &= jnp.arange(k.shape[-1]) > index[:, :, None] - window
  scores = _scores(_grouped(q, k.shape[1]), k, k_scale)
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  out = _weighted(weights, v, v_scale) / weights.sum(axis=-1, keepdims=True)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, width, heads, head_dim)


def decode_attention(
  q: jax.Array,
  prefix: tuple[jax.Array | None, ...],
  tail: tuple[jax.Array | None, ...],
  lengths: jax.Array,
  step: jax.Array,
  places: jax.Array | None = None,
  *,
  window: int = 0,
) -> jax.Array:
  """Attention of the new tokens of each row over a prefix and a tail that holds them already.

  Args:
    q: float32 [B, T, N, H], rotated.
    prefix: keys [B, K, H, S], rotated, and values [B, K, S, H]; of an int8 cache their scales
      [B, K, S], too.
    tail: keys [B, K, H, W] and values [B, K, W, H], likewise: what came after the prefix.
    lengths: int32 [B], valid positions of the prefix.
    step: int32, the first new token's column of the tail.
    places: int32 [B, W], the position of each column, beyond all others for one that does not
      count; None: a row's columns follow its prefix.
    window: as in `attention`.

  Returns:
    float32 [B, T, N, H].
  """
  (k, v, *scales), (tail_k, tail_v, *tail_scales) = prefix, tail
  k_scale, v_scale = scales or (None, None)
  tail_k_scale, tail_v_scale = tail_scales or (None, None)
  batch, width, heads, head_dim = q.shape
  if places is None:
    places = lengths[:, None] + jnp.arange(tail_k.shape[-1])
  own = jax.lax.dynamic_slice_in_dim(places, step, width, axis=1)[:, :, None]
  old = jnp.arange(k.shape[-1]) < lengths[:, None, None]
  new = places[:, None] <= own
  if window:
    old &= jnp.arange(k.shape[-1]) > own - window
    new &= places[:, None] > own - window
  q = _grouped(q, k.shape[1])
  old = jnp.where(old[:, None, None], _scores(q, k, k_scale), MASKED)
  new = jnp.where(new[:, None, None], _scores(q, tail_k, tail_k_scale), MASKED)
  peak = jnp.maximum(old.max(axis=-1, keepdims=True), new.max(axis=-1, keepdims=True))
  old, new = jnp.exp(old - peak), jnp.exp(new - peak)
  out = _weighted(old, v, v_scale) + _weighted(new, tail_v, tail_v_scale)
  out /= old.sum(axis=-1, keepdims=True) + new.sum(axis=-1, keepdims=True)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, width, heads, head_dim)


def _grouped(q: jax.Array, kv_heads: int) -> jax.Array:
  """q [B, T, N, H] -> [B, K, G, T, H], divided by the square root of H."""
  batch, width, heads, head_dim = q.shape
  q = (q * head_dim**-0.5).reshape(batch, width, kv_heads, heads // kv_heads, head_dim)
  return q.transpose(0, 2, 3, 1, 4)


def _scores(q: jax.Array, k: jax.Array, scale: jax.Array | None) -> jax.Array:
  """Products of q [B, K, G, T, H] with keys [B, K, H, S]: float32 [B, K, G, T, S].

  The scale of a key multiplies its scores: its codes are never multiplied out.
  """
  if scale is None:
    return _product(q.astype(k.dtype), k, 2)
  scores = _product(q.astype(scale.dtype), k.astype(scale.dtype), 2)
  return scores * scale[:, :, None, None].astype(jnp.float32)


def _weighted(weights: jax.Array, v: jax.Array, scale: jax.Array | None) -> jax.Array:
  """Sums of values [B, K, S, H] by weights float32 [B, K, G, T, S]: float32 [B, K, G, T, H]."""
  if scale is None:
    return _product(weights.astype(v.dtype), v, 2)
  weights = weights * scale[:, :, None, None].astype(jnp.float32)
  return _product(weights.astype(scale.dtype), v.astype(scale.dtype), 2)


def _product(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
  """a [B, K, G, T, x] times b [B, K, ...], contracted over b's axis: float32 [B, K, G, T, y]."""
  rows = a.reshape(*a.shape[:2], -1, a.shape[-1])
  dims = (((3,), (contract,)), ((0, 1), (0, 1)))
  y = jax.lax.dot_general(rows, b, dims, preferred_element_type=jnp.float32)
  return y.reshape(*a.shape[:4], -1)


def _gradient_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """a [B, K, G, C, x], b [B, K, G, C, y], summed over queries: float32 [B, K, x, y].

  The narrow one comes first: 1.1 ms on one core for x = 64, y = 512, but 2.6 ms for the converse.
  """
  a, b = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (a, b))
  dims = (((2,), (2,)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _blocks(width: int, window: int) -> list[tuple[int, int, int]]:
  """(start, end) of the blocks of queries, and the first key that any of them sees."""
  size = -(-width // (MIN_BLOCK * MAX_BLOCKS)) * MIN_BLOCK
  return [
    (start, min(start + size, width), max(start - window + 1, 0) if window else 0)
    for start in range(0, width, size)]


def _block_scores(q, k, segment_ids, window, start, end, first) -> jax.Array:
  """Masked scores of queries start .. end with keys first .. end: float32 [B, K, G, C, S]."""
  scores = _product(q[:, :, :, start:end], k[:, :, first:end], 3)
  places = jnp.arange(first, end), jnp.arange(start, end)[:, None]
  mask = (places[0] <= places[1])[None]
  if window:
    mask &= places[0] > places[1] - window
  if segment_ids is not None:
    mask &= segment_ids[:, start:end, None] == segment_ids[:, None, first:end]
  return jnp.where(mask[:, None, None], scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q, k, v, segment_ids, window: int) -> jax.Array:
  """q [B, K, G, T, H], scaled, k and v [B, K, T, H] -> float32 [B, K, G, T, H]."""
  return _blocked_fwd(q, k, v, segment_ids, window)[0]


def _blocked_fwd(q, k, v, segment_ids, window):
  outs, norms = [], []
  for start, end, first in _blocks(q.shape[3], window):
    scores = _block_scores(q, k, segment_ids, window, start, end, first)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    outs.append(_product(weights.astype(v.dtype), v[:, :, first:end], 2) / total)
    norms.append(top + jnp.log(total))
  out, norm = jnp.concatenate(outs, axis=3), jnp.concatenate(norms, axis=3)
  return out, (*map(to_bits, (q, k, v)), segment_ids, out, norm)


def _blocked_bwd(window, residuals, grad):
  *qkv, segment_ids, out, norm = residuals
  q, k, v = map(from_bits, qkv)
  dtype = q.dtype
  # The softmax's Jacobian needs only the sum of grad * out (FlashAttention, algorithm 4).
  inner = jnp.sum(grad * out, axis=-1, keepdims=True)
  grad = grad.astype(dtype)
  dq = []
  dk = dv = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]))  # Transposed: [B, K, H, T].
  for start, end, first in _blocks(q.shape[3], window):
    rows = functools.partial(jax.lax.slice_in_dim, start_index=start, limit_index=end, axis=3)
    scores = _block_scores(q, k, segment_ids, window, start, end, first)
    weights = jnp.exp(scores - rows(norm))
    dscores = weights * (_product(rows(grad), v[:, :, first:end], 3) - rows(inner))
    weights, dscores = weights.astype(dtype), dscores.astype(dtype)
    dq.append(_product(dscores, k[:, :, first:end], 2))
    dk = dk.at[..., first:end].add(_gradient_product(rows(q), dscores))
    dv = dv.at[..., first:end].add(_gradient_product(rows(grad), weights))
  dq = jnp.concatenate(dq, axis=3)
  dk, dv = dk.swapaxes(2, 3), dv.swapaxes(2, 3)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
