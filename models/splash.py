"""Causal attention of packed rows by splash attention, the Pallas kernel for TPU.

The kernel skips the blocks above the diagonal, masks by segment inside the others, and never holds
T x T numbers, in either direction. Keys and values are not repeated over the query groups.

Axes: B batch, T tokens, N query heads, K key-value heads, H head width.
"""

import jax
import jax.numpy as jnp

from models import sharding

# The widest block that divides T is taken: on a TPU the kernel's time falls with the block's size
# until its scores (block x block float32) crowd out VMEM.
_BLOCKS = (512, 256, 128)
_LANES = 128


def _kernel(heads: int, width: int, window: int, interpret: bool):
  """A function of one row: q [N, T, H], k and v [K, T, H], segment ids [T]."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  block = next(b for b in _BLOCKS if width % b == 0)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
  one = splash.CausalMask((width, width))
  if window:
    # Whole blocks outside the window are skipped as well.
    one = splash.LocalMask((width, width), (window - 1, 0), 0)
  mask = splash.MultiHeadMask([one] * heads)
  # Not cached: the kernel holds its mask's tables, which belong to the trace that made them.
  kernel = splash.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
  return lambda q, k, v, segments: kernel(
    q, k, v, segment_ids=splash.SegmentIds(segments, segments))


def splash_attention(
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
    q: [B, T, N, H], rotated and scaled, in the dtype of the products' operands.
    k: [B, T, K, H], rotated.
    v: [B, T, K, H].
    segment_ids: int32 [B, T]; a token sees only its own segment.
    window: a token sees so many of the newest tokens, itself included; 0 is all of them.
    interpret: run the kernel's program without a TPU (tests).

  Returns:
    [B, T, N, H] in q's dtype.
  """
  width, head_dim = q.shape[1], q.shape[3]
  pad = -width % _LANES
  # Heads narrower than a lane tile are filled up with zeros, which no product sees.
  fill = -head_dim % _LANES

  def local(q, k, v, segment_ids):
    kernel = _kernel(q.shape[2], width + pad, window, interpret)
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, fill))).transpose(0, 2, 1, 3)
               for x in (q, k, v))
    out = jax.vmap(kernel)(q, k, v, jnp.pad(segment_ids, ((0, 0), (0, pad))))
    return out.transpose(0, 2, 1, 3)[:, :width, :, :head_dim]

  return sharding.over_rows_and_heads(local, q, k, v, segment_ids)
