"""Causal attention of packed rows by a kernel for GPUs, in Pallas over Triton.

FlashAttention's two passes (arXiv 2205.14135, 2307.08691) for neighbouring segments. Which keys a
query sees is one interval, so a row is described by two numbers a token: the first key that a query
sees, and where the queries end that see a key. They are the mask inside a block and the bounds of
the loops over blocks: what lies in no query's interval is never read. Keys and values are not
repeated over the query groups, and no T x S numbers are held in either direction.

Axes: B batch, T tokens, N query heads, K key-value heads, G = N / K queries a key-value head,
H head width.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from models import sharding

MAX_HEAD_DIM = 256
_MASKED = -1e30
_LOG2_E = math.log2(math.e)  # The hardware's exponential is that of base 2.


class _Sizes(NamedTuple):
  """Tokens of a block, and how the compiler spreads a program.

  Attributes:
    own: queries (or, in the pass over keys, keys) of a program.
    other: keys (or queries) that it reads at a time.
    warps: of 32 threads, of a program.
    stages: blocks on their way from memory at a time.
  """

  own: int
  other: int
  warps: int
  stages: int

  @property
  def compiler_params(self):
    return triton.CompilerParams(num_warps=self.warps, num_stages=self.stages)


def _sizes(head_dim: int, dtype) -> dict[str, _Sizes]:
  """For the forward pass, and for the gradients of queries and of keys and values."""
  if jnp.dtype(dtype).itemsize > 2 or head_dim > 128:
    return {
      'forward': _Sizes(64, 32, 4, 2), 'dq': _Sizes(64, 32, 4, 2), 'dkv': _Sizes(32, 32, 4, 2)}
  return {
    'forward': _Sizes(128, 64, 8, 3), 'dq': _Sizes(128, 64, 8, 2), 'dkv': _Sizes(64, 64, 4, 2)}


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """a times b over one axis of each: float32."""
  dims = ((contract[:1], contract[1:]), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _blocks(size: int, first, end):
  """Indices of the first block of `size` that holds `first`, and of the one behind `end` - 1."""
  return jax.lax.div(first, size), jax.lax.div(end + size - 1, size)


def _forward_kernel(q_ref, k_ref, v_ref, low_ref, out_ref, norm_ref, *, size: int):
  """One block of queries of one head.

  Refs: q and out [C, H], k and v [T, H], low [T], norm [C] (of base 2).
  """
  count, head_dim = q_ref.shape
  start = pl.program_id(0) * count
  q, low = q_ref[...], low_ref[pl.ds(start, count)]
  queries = start + jnp.arange(count)

  def read(block, carry):
    out, top, total = carry
    own = pl.ds(block * size, size)
    keys = block * size + jnp.arange(size)
    scores = _dot(q, k_ref[own, :], (1, 1)) * _LOG2_E
    mask = (keys[None] >= low[:, None]) & (keys[None] <= queries[:, None])
    scores = jnp.where(mask, scores, _MASKED)
    new_top = jnp.maximum(top, scores.max(axis=1))
    # A query that has seen only masked keys counted them as whole; its first own key undoes that.
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - new_top[:, None])
    out = out * shrink[:, None] + _dot(weights.astype(v_ref.dtype), v_ref[own, :], (1, 0))
    return out, new_top, total * shrink + weights.sum(axis=1)

  zeros = jnp.zeros((count, head_dim), jnp.float32)
  empty = jnp.full((count,), _MASKED, jnp.float32), jnp.zeros((count,), jnp.float32)
  first, end = _blocks(size, low_ref[start], start + count)
  out, top, total = jax.lax.fori_loop(first, end, read, (zeros, *empty))
  out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
  norm_ref[...] = top + jnp.log2(total)


def _dq_kernel(
  q_ref, k_ref, v_ref, low_ref, grad_ref, norm_ref, inner_ref, dq_ref, *, size: int):
  """The gradient of one block of queries of one head.

  Refs: q, grad and dq [C, H], k and v [T, H], low [T], norm and inner [C].
  """
  count = q_ref.shape[0]
  start = pl.program_id(0) * count
  q, grad, low = q_ref[...], grad_ref[...], low_ref[pl.ds(start, count)]
  norm, inner = norm_ref[...], inner_ref[...]
  queries = start + jnp.arange(count)

  def read(block, dq):
    own = pl.ds(block * size, size)
    keys = block * size + jnp.arange(size)
    k = k_ref[own, :]
    scores = _dot(q, k, (1, 1)) * _LOG2_E
    mask = (keys[None] >= low[:, None]) & (keys[None] <= queries[:, None])
    weights = jnp.exp2(jnp.where(mask, scores, _MASKED) - norm[:, None])
    dscores = weights * (_dot(grad, v_ref[own, :], (1, 1)) - inner[:, None])
    return dq + _dot(dscores.astype(k.dtype), k, (1, 0))

  first, end = _blocks(size, low_ref[start], start + count)
  dq = jax.lax.fori_loop(first, end, read, jnp.zeros(q.shape, jnp.float32))
  dq_ref[...] = dq.astype(dq_ref.dtype)


def _dkv_kernel(
  q_ref, k_ref, v_ref, low_ref, high_ref, grad_ref, norm_ref, inner_ref, dk_ref, dv_ref, *,
  size: int):
  """The gradients of one block of keys and values of one head, over all queries of its group.

  Scores lie with their keys first, so that no product waits for a transposition of them.

  Refs: q and grad [T, G, H], k, v, dk and dv [C, H], low and high [T], norm and inner [G, T].
  """
  count = k_ref.shape[0]
  start = pl.program_id(0) * count
  k, v = k_ref[...], v_ref[...]
  keys = start + jnp.arange(count)
  first, end = _blocks(size, start, high_ref[start + count - 1])

  def read(index, carry):
    dk, dv = carry
    # One loop over the queries of one head after the other keeps loads on their way throughout.
    head, block = jax.lax.div(index, end - first), first + jax.lax.rem(index, end - first)
    own = pl.ds(block * size, size)
    queries = block * size + jnp.arange(size)
    q, grad = q_ref[own, head, :], grad_ref[own, head, :]
    scores = _dot(k, q, (1, 1)) * _LOG2_E
    mask = (keys[:, None] >= low_ref[own][None]) & (keys[:, None] <= queries[None])
    weights = jnp.exp2(jnp.where(mask, scores, _MASKED) - norm_ref[head, own][None])
    dv += _dot(weights.astype(grad.dtype), grad, (1, 0))
    dscores = weights * (_dot(v, grad, (1, 1)) - inner_ref[head, own][None])
    return dk + _dot(dscores.astype(q.dtype), q, (1, 0)), dv

  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = jax.lax.fori_loop(0, q_ref.shape[1] * (end - first), read, (zeros, zeros))
  dk_ref[...] = dk.astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)


def _specs(width: int, groups: int, head_dim: int, count: int):
  """How a program sees its arrays; the grid is (blocks, heads, rows).

  Returns:
    by name, of a block of one head, all tokens of the key-value head of a query head, all tokens of
    a group of query heads, a row's numbers, a block's numbers of a head, a group's numbers.
  """
  return {
    'block': pl.BlockSpec((None, count, None, head_dim), lambda i, n, b: (b, i, n, 0)),
    'keys': pl.BlockSpec((None, width, None, head_dim), lambda i, n, b: (b, 0, n // groups, 0)),
    'group': pl.BlockSpec((None, width, groups, head_dim), lambda i, n, b: (b, 0, n, 0)),
    'row': pl.BlockSpec((None, width), lambda i, n, b: (b, 0)),
    'block_sums': pl.BlockSpec((None, None, count), lambda i, n, b: (b, n, i)),
    'group_sums': pl.BlockSpec((None, groups, width), lambda i, n, b: (b, n, 0)),
  }


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, low, high, interpret: bool) -> jax.Array:
  """Attention of rows of whole blocks.

  Args:
    q: [B, T, N, H], scaled.
    k: [B, T, K, H].
    v: [B, T, K, H].
    low: int32 [B, T], the first key that a query sees; the last is its own. Never falls.
    high: int32 [B, T], one behind the last query that sees a key. Never falls.
    interpret: static.

  Returns:
    [B, T, N, H] in q's dtype.
  """
  return _flash_fwd(q, k, v, low, high, interpret)[0]


def _flash_fwd(q, k, v, low, high, interpret):
  batch, width, heads, head_dim = q.shape
  sizes = _sizes(head_dim, k.dtype)['forward']
  specs = _specs(width, heads // k.shape[2], head_dim, sizes.own)
  out, norm = pl.pallas_call(
    functools.partial(_forward_kernel, size=sizes.other),
    grid=(width // sizes.own, heads, batch),
    in_specs=[specs[name] for name in ('block', 'keys', 'keys', 'row')],
    out_specs=[specs['block'], specs['block_sums']],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((batch, heads, width), jnp.float32)],
    compiler_params=sizes.compiler_params, interpret=interpret, name='flash_forward',
  )(q, k, v, low)
  return out, (q, k, v, low, high, out, norm)


def _flash_bwd(interpret, residuals, grad):
  q, k, v, low, high, out, norm = residuals
  batch, width, heads, head_dim = q.shape
  kv_heads = k.shape[2]
  groups = heads // kv_heads
  grad = grad.astype(q.dtype)
  # The softmax's Jacobian needs only the sum of grad * out (FlashAttention, algorithm 4).
  inner = jnp.einsum(
    'btnh,btnh->bnt', grad.astype(jnp.float32), out.astype(jnp.float32))
  sizes = _sizes(head_dim, k.dtype)
  own = sizes['dq']
  specs = _specs(width, groups, head_dim, own.own)
  dq = pl.pallas_call(
    functools.partial(_dq_kernel, size=own.other),
    grid=(width // own.own, heads, batch),
    in_specs=[specs[name] for name in (
      'block', 'keys', 'keys', 'row', 'block', 'block_sums', 'block_sums')],
    out_specs=specs['block'],
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=own.compiler_params, interpret=interpret, name='flash_dq',
  )(q, k, v, low, grad, norm, inner)
  own = sizes['dkv']
  specs = _specs(width, groups, head_dim, own.own)
  dk, dv = pl.pallas_call(
    functools.partial(_dkv_kernel, size=own.other),
    grid=(width // own.own, kv_heads, batch),
    in_specs=[specs[name] for name in (
      'group', 'block', 'block', 'row', 'row', 'group', 'group_sums', 'group_sums')],
    out_specs=[specs['block'], specs['block']],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    compiler_params=own.compiler_params, interpret=interpret, name='flash_dkv',
  )(q, k, v, low, high, grad, norm, inner)
  return dq, dk, dv, None, None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _intervals(segment_ids: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
  """The first key that each query sees, and one behind the last query that sees each key.

  Args:
    segment_ids: int32 [B, T]; a segment's tokens are neighbours.
    window: static; 0 is none.

  Returns:
    int32 [B, T], twice.
  """
  width = segment_ids.shape[1]
  places = jnp.broadcast_to(jnp.arange(width), segment_ids.shape)
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
  ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
  low = jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
  high = jax.lax.cummin(jnp.where(ends, places + 1, width), axis=1, reverse=True)
  if window:
    low, high = jnp.maximum(low, places - window + 1), jnp.minimum(high, places + window)
  return low, high


def flash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array,
  *,
  window: int = 0,
  interpret: bool = False,
) -> jax.Array:
  """Attention within whole rows; under `jax.set_mesh` each device computes its rows and heads.

  Args:
    q: [B, T, N, H], rotated and scaled, in the dtype of the products' operands; H is at most
      MAX_HEAD_DIM.
    k: [B, T, K, H], rotated.
    v: [B, T, K, H].
    segment_ids: int32 [B, T]; a token sees only its own segment, whose tokens are neighbours.
    window: a token sees so many of the newest tokens, itself included; 0 is all of them.
    interpret: run the kernel's program without a GPU (tests).

  Returns:
    [B, T, N, H] in q's dtype.
  """
  width, head_dim = q.shape[1], q.shape[3]
  # Blocks are powers of two; heads are filled up with zeros, which no product sees.
  fill = max(16, pl.next_power_of_2(head_dim)) - head_dim
  whole = max(size for own in _sizes(head_dim + fill, k.dtype).values() for size in own[:2])
  pad = -width % whole

  def local(q, k, v, segment_ids):
    low, high = _intervals(segment_ids, window)
    # What is filled up sees itself.
    places = jnp.broadcast_to(jnp.arange(width, width + pad), (q.shape[0], pad))
    low, high = jnp.concatenate([low, places], 1), jnp.concatenate([high, places + 1], 1)
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, fill))) for x in (q, k, v))
    return _flash(q, k, v, low, high, interpret)[:, :width, :, :head_dim]

  return sharding.over_rows_and_heads(local, q, k, v, segment_ids)
