"""Cross entropy of the output head; of a frozen one without (tokens, vocabulary) logits.

A frozen head is a constant of training, so the gradient with respect to the hidden states is known
as soon as the softmax is: it is formed in the forward pass, tile by tile, and the backward pass
only scales it. Per token that is two products with the head, as in the dense computation. A head
that is trained belongs to a small model with a small vocabulary: its loss is the dense one.

Axes: G shards of the batch, M loss tokens of a shard, C tokens of a chunk, V vocabulary, D
embedding.
"""

import functools

import jax
import jax.numpy as jnp

from models import platform
from models.layers import from_bits, matmul, to_bits

# On 2 cores, V = 49152, D = 576, products with the whole vocabulary reached 200 to 490 GFLOP/s; a
# tile that stays in the cache reached 280 a core.
CPU_VOCAB_TILE = 4096


def default_vocab_tile(vocab_size: int, num_devices: int = 1) -> int:
  """Rows of the head that one product reads: a cache-sized tile on one CPU, else all of them.

  With more devices the vocabulary may be sharded, and slicing it would gather it.
  """
  small = platform.name() == 'cpu' and num_devices == 1
  return min(CPU_VOCAB_TILE, vocab_size) if small else vocab_size


def frozen_head_cross_entropy(
  hidden: jax.Array,
  kernel: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  dtype: str = 'float32',
  label_smoothing: float = 0.0,
  token_chunk: int = 1024,
  vocab_tile: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of the cross entropies, differentiable with respect to `hidden` only.

  With smoothing e the target distribution is (1 - e) onehot + e / V (Szegedy et al. 2016, section
  7).

  Args:
    hidden: float32 [G, M, D], states that predict a loss token.
    kernel: [V, D], the frozen head; its gradient is zero by definition.
    targets: int32 [G, M].
    weights: float32 [G, M]; 0 for the padding of a static budget. Constants.
    dtype: operands of the products, 'float32' or 'bfloat16'; sums are float32.
    label_smoothing: e, in [0, 1).
    token_chunk: tokens of a shard that are in flight at once.
    vocab_tile: rows of the head in one product; None is `default_vocab_tile`.

  Returns:
    (loss, correct): float32 scalars, the weighted sums of the loss and of "the target has the
    highest logit".
  """
  if vocab_tile is None:
    vocab_tile = default_vocab_tile(kernel.shape[0])
  chunk = min(token_chunk, targets.shape[1])
  pad = -targets.shape[1] % chunk
  if pad:
    widen = lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    hidden, targets, weights = widen(hidden), widen(targets), widen(weights)
  static = (dtype, float(label_smoothing), chunk, min(vocab_tile, kernel.shape[0]))
  return _cross_entropy(static, hidden, kernel, targets, weights)


def trained_head_cross_entropy(
  hidden: jax.Array,
  kernel: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  dtype: str = 'float32',
  label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """As `frozen_head_cross_entropy`, differentiable with respect to `kernel` too.

  Holds the logits, G M V float32: 50 MB for 8,192 tokens and a vocabulary of 1,536.
  """
  logits = matmul(hidden, kernel.T, dtype, frozen=False)
  logprobs = jax.nn.log_softmax(logits)
  target = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
  loss = -(1 - label_smoothing) * target
  if label_smoothing:
    loss -= label_smoothing * logprobs.mean(axis=-1)
  correct = (target >= logprobs.max(axis=-1)).astype(jnp.float32)
  return (loss * weights).sum(), (correct * weights).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, hidden, kernel, targets, weights):
  return _cross_entropy_fwd(static, hidden, kernel, targets, weights)[0]


def _cross_entropy_fwd(static, hidden, kernel, targets, weights):
  dtype, smoothing, chunk, _ = static
  # The smoothing's part of the loss is linear in the mean logit, which needs no logits.
  mean_row = from_bits(kernel).astype(jnp.float32).mean(axis=0) if smoothing else None
  kernel = to_bits(kernel)  # Of which tiles and single rows are cut.

  def one(sums, inputs):
    loss, correct, grad = _chunk(static, inputs[0], kernel, mean_row, inputs[1], inputs[2])
    return (sums[0] + loss, sums[1] + correct), grad

  split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
  inputs = (split(hidden), split(targets), split(weights))
  sums, grads = jax.lax.scan(one, (jnp.float32(0), jnp.float32(0)), inputs)
  return sums, jnp.moveaxis(grads, 0, 1).reshape(hidden.shape).astype(hidden.dtype)


def _cross_entropy_bwd(static, grad_hidden, cotangents):
  del static
  return cotangents[0] * grad_hidden, None, None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _chunk(static, hidden, kernel, mean_row, targets, weights):
  """Loss, hits and d(loss)/d(hidden) of one chunk: hidden [G, C, D], targets and weights [G, C].

  The softmax runs over tiles of the vocabulary with a running maximum, and the expected head row
  (the gradient's dense part) is its "value" sum: Milakov and Gimelshein (arXiv 1805.02867).
  """
  dtype, smoothing, _, tile = static
  vocab = kernel.shape[0]
  operand = hidden.astype(dtype)
  contract = lambda axis: (((2,), (axis,)), ((), ()))

  def visit(carry, start, size):
    peak, total, expected, target_logit = carry
    rows = from_bits(jax.lax.dynamic_slice_in_dim(kernel, start, size)).astype(dtype)
    logits = jax.lax.dot_general(operand, rows, contract(1), preferred_element_type=jnp.float32)
    new_peak = jnp.maximum(peak, logits.max(axis=-1))
    rescale = jnp.exp(peak - new_peak)
    weight = jnp.exp(logits - new_peak[..., None])
    total = total * rescale + weight.sum(axis=-1)
    expected = expected * rescale[..., None] + jax.lax.dot_general(
      weight.astype(dtype), rows, contract(0), preferred_element_type=jnp.float32
    )
    local = targets - start
    here = (local >= 0) & (local < size)
    found = jnp.take_along_axis(logits, jnp.clip(local, 0, size - 1)[..., None], axis=-1)[..., 0]
    return new_peak, total, expected, jnp.where(here, found, target_logit)

  zeros = jnp.zeros(targets.shape, jnp.float32)
  carry = (zeros - jnp.inf, zeros, jnp.zeros(hidden.shape, jnp.float32), zeros)
  if tile == vocab:
    carry = visit(carry, 0, vocab)
  else:
    whole = vocab // tile
    carry = jax.lax.fori_loop(0, whole, lambda i, c: visit(c, i * tile, tile), carry)
    if vocab % tile:
      carry = visit(carry, whole * tile, vocab % tile)
  peak, total, expected, target_logit = carry

  loss = peak + jnp.log(total) - (1 - smoothing) * target_logit
  grad = expected / total[..., None]
  grad -= (1 - smoothing) * from_bits(kernel[targets]).astype(dtype).astype(jnp.float32)
  if smoothing:
    loss -= smoothing * (operand.astype(jnp.float32) @ mean_row)
    grad -= smoothing * mean_row
  correct = (target_logit >= peak).astype(jnp.float32)
  return (loss * weights).sum(), (correct * weights).sum(), grad * weights[..., None]
