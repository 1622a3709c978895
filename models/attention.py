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

from models import flash, platform, splash
from models.layers import from_bits, rearranged, to_bits, transposed

MASKED = -1e30
# Queries of a block: as few as MIN_BLOCK up to 2,048 tokens, then so many that there are MAX_BLOCKS
# blocks, but no more than MAX_BLOCK: their scores, MAX_BLOCK x T, are linear in the length.
MIN_BLOCK, MAX_BLOCK, MAX_BLOCKS = 128, 512, 16
PATHS = ('auto', 'blocks', 'kernel')


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  window: int = 0,
  is_local: jax.Array | None = None,
  path: str = 'auto',
) -> jax.Array:
  """Causal attention within whole rows, by a kernel of the platform or in blocks.

  The kernels are `splash` on a TPU and `flash` elsewhere. The blocks: a block of queries reads the
  keys from the block in which its first segment, or its window, begins to its own end, and nothing
  before them; how many that are is found out as it runs. The backward pass computes the scores of a
  block anew (as FlashAttention does, arXiv 2205.14135): no layer keeps T x S numbers.

  Args:
    q: float32 [B, T, N, H], rotated.
    k: [B, T, K, H], rotated. Its dtype is that of all products' operands.
    v: [B, T, K, H].
    segment_ids: int32 [B, T] of packed rows: a token sees only its own segment, whose tokens are
      neighbours.
    window: a token sees so many of the newest tokens, itself included; 0 is all of them.
    is_local: bool [], whether the window holds; None is True. Only one of the two is computed.
    path: one of PATHS; 'auto' is the kernel on a TPU and blocks elsewhere. The kernel for GPUs is
      interpreted on a CPU (for tests); `training.attention_path` says where it can be relied on.

  Returns:
    float32 [B, T, N, H].
  """
  batch, width, heads, head_dim = q.shape
  q = (q * head_dim**-0.5).astype(k.dtype)
  if window >= width:
    window = 0
  if segment_ids is None:
    segment_ids = jnp.zeros((batch, width), jnp.int32)
  where = platform.name()
  if path == 'kernel' or (path == 'auto' and where == 'tpu'):
    kernel = splash.splash_attention
    if where != 'tpu':
      kernel = functools.partial(flash.flash_attention, interpret=where == 'cpu')

    def run(window):
      return kernel(q, k, v, segment_ids, window=window).astype(jnp.float32)

    return _choose(run, window, is_local)
  kv_heads = k.shape[2]
  size, count = _blocks(width)
  # Rows by themselves read only what each needs; on a mesh they lie on different devices.
  groups = batch if jax.sharding.get_abstract_mesh().size <= 1 else 1
  pad = ((0, 0), (0, count * size - width))
  q, k, v = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (q, k, v))
  segment_ids = jnp.pad(segment_ids, pad, constant_values=-1).reshape(groups, -1, count * size)
  q = q.reshape(groups, -1, count, size, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2)
  k, v = (x.reshape(groups, -1, *x.shape[1:]) for x in (k, v))
  out = _choose(functools.partial(_blocked, q, k, v, segment_ids), window, is_local)
  return out.swapaxes(1, 2).reshape(batch, count * size, heads, head_dim)[:, :width]


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
  section: tuple[jax.Array | None, ...] = (),
  rows: jax.Array | None = None,
  *,
  window: int = 0,
) -> jax.Array:
  """Attention of the new tokens of each row over a prefix and a tail that holds them already.

  Rows that are longer than the prefix go on in a section, which the others do not read.

  Args:
    q: float32 [B, T, N, H], rotated.
    prefix: keys [B, K, H, S], rotated, and values [B, K, S, H]; of an int8 cache their scales
      [B, K, S], too.
    tail: keys [B, K, H, W] and values [B, K, W, H], likewise: what came after the prefix.
    lengths: int32 [B], valid positions of the prefix, and of the section behind it.
    step: int32, the first new token's column of the tail.
    places: int32 [B, W], the position of each column, beyond all others for one that does not
      count; None: a row's columns follow its prefix.
    section: of some rows, what follows the prefix: as the prefix, with [n] for [B].
    rows: int32 [n], those rows, each once; None without a section.
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
  if rows is not None:
    far_k, far_v, *far_scales = section
    far_k_scale, far_v_scale = far_scales or (None, None)
    index = k.shape[-1] + jnp.arange(far_k.shape[-1])
    far = index < lengths[rows, None, None]
    if window:
      far &= index > own[rows] - window
    far = jnp.where(far[:, None, None], _scores(q[rows], far_k, far_k_scale), MASKED)
    peak = peak.at[rows].max(far.max(axis=-1, keepdims=True))
    far = jnp.exp(far - peak[rows])
  old, new = jnp.exp(old - peak), jnp.exp(new - peak)
  out = _weighted(old, v, v_scale) + _weighted(new, tail_v, tail_v_scale)
  total = old.sum(axis=-1, keepdims=True) + new.sum(axis=-1, keepdims=True)
  if rows is not None:
    out = out.at[rows].add(_weighted(far, far_v, far_v_scale))
    total = total.at[rows].add(far.sum(axis=-1, keepdims=True))
  out /= total
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

  The narrower one comes first: on CPU it is `transposed`.
  """
  a, b = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (a, b))
  if platform.name() == 'cpu':
    a, contract = transposed(a), ((3,), (2,))
  else:
    contract = ((2,), (2,))
  return jax.lax.dot_general(
    a, b, (contract, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _blocks(width: int) -> tuple[int, int]:
  """Queries of a block, and how many blocks there are."""
  size = min(width, MAX_BLOCK, -(-width // (MIN_BLOCK * MAX_BLOCKS)) * MIN_BLOCK)
  return size, -(-width // size)


def _widths(count: int) -> list[int]:
  """How many blocks of keys a block of queries may read: each is a branch of the program."""
  steps = [1] + [w for n in range(1, count.bit_length()) for w in (2**n, 3 * 2**(n - 1))]
  return [w for w in steps if w < count] + [count]


def _visits(segment_ids, size: int, window: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The blocks of queries of all groups, in the order in which they are visited.

  Those that read as many blocks of keys follow each other, and two are visited at a time (see
  `_blocked`), where their number is even.

  Args:
    segment_ids: int32 [g, R, T].
    size: queries of a block, of which there are n.
    window: static.

  Returns:
    int32 [V, lanes], group * n + block of each; int32 [W] twice, the first of the V, and the one
    behind the last, that reads as many keys as each of `_widths` says.
  """
  groups, _, width = segment_ids.shape
  starts = jnp.arange(0, width, size)
  same = segment_ids[..., ::size, None] == segment_ids[..., None, :]
  first = jnp.argmax(same, axis=-1).min(axis=1)
  if window:
    first = jnp.maximum(first, starts - window + 1)
  needed = (starts // size + 1 - first // size).reshape(-1)
  # Large ones need no company, and their scores are the memory that a long row takes.
  lanes = 2 if len(needed) % 2 == 0 and size <= MIN_BLOCK else 1
  order = jnp.argsort(needed)
  most = needed[order].reshape(-1, lanes).max(axis=1)
  ends = jnp.searchsorted(most, jnp.array(_widths(len(starts))), side='right').astype(jnp.int32)
  return order.reshape(-1, lanes), jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def _block_scores(q, k, segment_ids, window, start, first) -> jax.Array:
  """Masked scores of queries from `start` with keys from `first` on: float32 [R, K, G, C, S].

  Args:
    q: [R, K, G, C, H].
    k: [R, K, S, H].
    segment_ids: int32 [R, T].
    window: static.
    start: int32.
    first: int32.
  """
  queries, keys = start + jnp.arange(q.shape[3])[:, None], first + jnp.arange(k.shape[2])
  mask = (keys <= queries)[None]
  if window:
    mask &= keys > queries - window
  cut = functools.partial(jax.lax.dynamic_slice_in_dim, segment_ids, axis=1)
  mask &= cut(start, q.shape[3])[:, :, None] == cut(first, k.shape[2])[:, None]
  # The same for all heads: where the compiler heeds the barrier, it is not computed for each.
  bias = jax.lax.optimization_barrier(jnp.where(mask, 0.0, MASKED)[:, None, None])
  return _product(q, k, 3) + bias


def _part(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [n, ...] -> [...], not as bits."""
  return from_bits(jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False))


def _queries(x: jax.Array, place: jax.Array) -> jax.Array:
  """A block, not as bits: x [V, R, C, K, G, H] -> [R, K, G, C, H]."""
  return rearranged(_part(x, place), (0, 2, 3, 1, 4))


def _keys(x: jax.Array, group: jax.Array, first: jax.Array, count: int) -> jax.Array:
  """Some keys or values of a group, not as bits: x [g, R, T, K, H] -> [R, K, count, H]."""
  shape = (1, x.shape[1], count, *x.shape[3:])
  own = from_bits(jax.lax.dynamic_slice(x, (group, 0, first, 0, 0), shape)[0])
  return rearranged(own, (0, 2, 1, 3))


def _read(blocks, k, v, segment_ids, window, place, width):
  """What a visit reads: group, first key, queries, keys, values and scores of a block.

  The keys are those of `width` blocks (static), up to the end of its own.
  """
  size, count = blocks.shape[2], len(blocks) // len(k)
  group, block = place // count, place % count
  first = jnp.maximum(block + 1 - width, 0) * size
  q = _queries(blocks, place)
  own_k, own_v = (_keys(x, group, first, width * size) for x in (k, v))
  segments = _part(segment_ids, group)
  scores = _block_scores(q, own_k, segments, window, block * size, first)
  return group, first, q, own_k, own_v, scores


def _put(x: jax.Array, place: jax.Array, part: jax.Array) -> jax.Array:
  """Undoes `_queries`, for one that is not bits."""
  return jax.lax.dynamic_update_index_in_dim(x, jnp.moveaxis(part, 3, 1), place, 0)


def _per_block(x: jax.Array) -> jax.Array:
  """[g, n, ...] -> [g * n, ...], as bits."""
  return to_bits(x.reshape(-1, *x.shape[2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q, k, v, segment_ids, window: int) -> jax.Array:
  """Attention of groups of rows, one block of queries after the other.

  Blocks that read as many keys are visited by one loop; a branch inside of it would copy what the
  backward pass adds to. On CPU two blocks at a time keep two threads busy, which share the small
  products of one badly.

  Axes: g groups, R rows of a group, n blocks.

  Args:
    q: [g, n, R, C, K, G, H], scaled.
    k: [g, R, T, K, H].
    v: [g, R, T, K, H].
    segment_ids: int32 [g, R, T].
    window: static; 0 is none.

  Returns:
    float32 [g, n, R, C, K, G, H].
  """
  return _blocked_fwd(q, k, v, segment_ids, window)[0]


def _blocked_fwd(q, k, v, segment_ids, window):
  size, count, dtype = q.shape[3], q.shape[1], q.dtype
  # Masks are the same in all layers: without a barrier, a scan over these makes and keeps T x S of
  # them before its first layer.
  q, segment_ids = jax.lax.optimization_barrier((q, segment_ids))
  blocks, k, v = _per_block(q), to_bits(k), to_bits(v)
  visits, *bounds = _visits(segment_ids, size, window)

  def attend(place, width):
    *_, own_v, scores = _read(blocks, k, v, segment_ids, window, place, width)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return _product(weights.astype(dtype), own_v, 2) / total, top + jnp.log(total)

  results = jnp.zeros(blocks.shape), jnp.zeros((*blocks.shape[:-1], 1))
  for width, low, high in zip(_widths(count), *bounds, strict=True):

    def visit(i, results, width=width):
      for place in visits[i]:
        results = tuple(
          _put(x, place, y) for x, y in zip(results, attend(place, width), strict=True))
      return results

    results = jax.lax.fori_loop(low, high, visit, results)
  out, norm = results
  kept = to_bits(out.astype(dtype))
  return out.reshape(*q.shape), (blocks, k, v, segment_ids, kept, norm)


def _blocked_bwd(window, residuals, grad):
  blocks, k, v, segment_ids, out, norm = residuals
  size, count, shape = grad.shape[3], grad.shape[1], grad.shape
  dtype = from_bits(k).dtype
  grad, segment_ids = jax.lax.optimization_barrier((grad, segment_ids))  # As in the forward pass.
  grad = to_bits(grad.reshape(blocks.shape).astype(dtype))
  visits, *bounds = _visits(segment_ids, size, window)

  def differentiate(place, width):
    group, first, own_q, own_k, own_v, scores = _read(
      blocks, k, v, segment_ids, window, place, width)
    own_grad, own_out = (_queries(x, place) for x in (grad, out))
    # The softmax's Jacobian needs only the sum of grad * out (FlashAttention, algorithm 4).
    inner = (own_grad.astype(jnp.float32) * own_out.astype(jnp.float32)).sum(-1, keepdims=True)
    weights = jnp.exp(scores - _queries(norm, place))
    dscores = weights * (_product(own_grad, own_v, 3) - inner)
    weights, dscores = weights.astype(dtype), dscores.astype(dtype)
    parts = _gradient_product(own_q, dscores), _gradient_product(own_grad, weights)
    return (group, 0, 0, 0, first), parts, _product(dscores, own_k, 2)

  def add(total, place, part):
    old = jax.lax.dynamic_slice(total, place, (1, *part.shape))
    return jax.lax.dynamic_update_slice(total, old + part, place)

  sums = jnp.zeros((*k.shape[:2], *k.shape[3:], k.shape[2]))  # Transposed: [g, R, K, H, T].
  sums = sums, sums, jnp.zeros(blocks.shape)
  for width, low, high in zip(_widths(count), *bounds, strict=True):

    def visit(i, sums, width=width):
      dk, dv, dq = sums
      places = list(visits[i])
      done = [differentiate(place, width) for place in places]
      for place, (at, parts, own) in zip(places, done, strict=True):
        dk, dv = add(dk, at, parts[0]), add(dv, at, parts[1])
        dq = _put(dq, place, own)
      return dk, dv, dq

    sums = jax.lax.fori_loop(low, high, visit, sums)
  dk, dv, dq = sums
  dk, dv = jnp.moveaxis(dk, 4, 2), jnp.moveaxis(dv, 4, 2)
  return dq.reshape(shape).astype(dtype), dk.astype(dtype), dv.astype(dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
