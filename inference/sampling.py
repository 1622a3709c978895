"""Choosing the next token on the device: greedy, temperature, top-k, top-p.

Axes: R rows, V vocabulary. Nothing here sorts: on two cores a sort of 32 x 49,152 logits takes
longer than the forward pass that made them. Thresholds are found by bisection over the bits of a
float, and the draw inverts the cumulative distribution with one uniform number a row.
"""

import dataclasses

import jax
import jax.numpy as jnp

from data.errors import UserError
from models import native

# Width of the blocks of the two-level cumulative sum: near sqrt(V) for V = 49,152 to 152,064.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is chosen.

  Attributes:
    temperature: 0 is greedy (the lowest id among equals).
    top_p: keeps the smallest set of most likely tokens whose mass reaches top_p, after top_k.
    top_k: keeps the k most likely tokens; 0 keeps all. Tokens tied with the last one are kept.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0

  def __post_init__(self):
    if not self.temperature >= 0.0:
      raise UserError(f'temperature={self.temperature} is negative; 0 is greedy.')
    if not 0.0 < self.top_p <= 1.0:
      raise UserError(f'top_p={self.top_p} is not in (0, 1]; 1 keeps every token.')
    if self.top_k < 0:
      raise UserError(f'top_k={self.top_k} is negative; 0 keeps every token.')


GREEDY = SamplingConfig()


def sample(
  logits: jax.Array,
  config: SamplingConfig,
  keys: jax.Array,
  allowed: jax.Array | None = None,
  *,
  own: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token a row.

  Args:
    logits: float32 [R, V].
    config: static.
    keys: typed random keys [R], one stream a row, unused by greedy decoding.
    allowed: bool [R, V], tokens to choose from, before top-k and top-p; None is all of them.
    own: by the CPU's own kernels (`models.native`) as far as they go.

  Returns:
    tokens int32 [R] and their log-probabilities float32 [R] under the model's own distribution
    (temperature 1, nothing filtered).
  """
  if own:
    peak, tokens, total = (x[:, None] for x in native.peaks(logits))
  else:
    peak = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True)
  choices, best = logits, peak
  if allowed is not None:
    choices = jnp.where(allowed, logits, -jnp.inf)
    best = jnp.max(choices, axis=-1, keepdims=True)
  if own and allowed is None and config.temperature == 0.0:
    tokens = tokens[:, 0]
  elif config.temperature == 0.0:
    # Not argmax: XLA's CPU backend reduces (value, index) pairs without vectors, 3 ms for 32 rows.
    vocab = logits.shape[-1]
    tokens = jnp.min(jnp.where(choices == best, jnp.arange(vocab), vocab - 1), axis=-1)
  else:
    weights = _filtered(jnp.exp((choices - best) / config.temperature), config)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, ()))(keys)
    tokens = draw(weights, uniform)
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
  return tokens.astype(jnp.int32), (chosen - peak - jnp.log(total))[:, 0]


def _filtered(weights: jax.Array, config: SamplingConfig) -> jax.Array:
  """Sets to zero the weights [R, V] (largest 1) that top-k and then top-p take out."""
  if 0 < config.top_k < weights.shape[-1]:
    count = lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= config.top_k
    weights = jnp.where(weights >= _threshold(weights, count), weights, 0.0)
  if config.top_p < 1.0:
    mass = config.top_p * jnp.sum(weights, axis=-1)
    enough = lambda kept: jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) >= mass
    weights = jnp.where(weights >= _threshold(weights, enough), weights, 0.0)
  return weights


def _threshold(weights: jax.Array, enough) -> jax.Array:
  """The largest t, float32 [R, 1], for which keeping weights >= t is enough.

  Bits of non-negative floats are ordered as the floats are, so 31 halvings are exact.
  """
  bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
  rows = weights.shape[0]
  one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
  # Invariant: low is enough (everything is kept), high is not (nothing is).
  low, high = jnp.zeros((rows,), jnp.int32), jnp.full((rows,), one + 1, jnp.int32)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    good = enough(bits >= middle[:, None])
    return jnp.where(good, middle, low), jnp.where(good, high, middle)

  low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
  return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
  """Inverts the cumulative distribution.

  Args:
    weights: float32 [R, V], not negative, at least one positive a row; need not sum to 1.
    uniform: float32 [R] in [0, 1).

  Returns:
    int32 [R]; never a token of weight zero.
  """
  rows, vocab = weights.shape
  weights = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
  # Two levels: first the block, then the token in it. One cumulative sum over V would cost more
  # than the head's product, and lose precision along the way.
  sums = jnp.cumsum(jnp.sum(weights, axis=-1), axis=-1)
  target = uniform * sums[:, -1]
  block = jnp.sum(sums <= target[:, None], axis=-1)
  before = jnp.where(block > 0, jnp.take_along_axis(sums, block[:, None] - 1, axis=-1)[:, 0], 0.0)
  inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
  token = jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1)
  # Rounding may carry the target past the block's last positive weight.
  last = jnp.max(jnp.where(inside > 0, jnp.arange(_BLOCK), 0), axis=-1)
  return (block * _BLOCK + jnp.minimum(token, last)).astype(jnp.int32)
