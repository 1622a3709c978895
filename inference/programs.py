"""The engine's compiled programs: prefill of blocks, and several steps of decoding.

Axes: S slots, B blocks, T tokens of a block, R slots that start to sample, D embedding.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from inference.sampling import SamplingConfig, sample
from models import decoder
from models.kv_cache import KVCache

# Columns of a block's row after its tokens.
BLOCK_FIELDS = ('slot', 'cursor', 'count', 'budget', 'seed', 'index')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
  """What decoding needs to know of every slot, on the device; arrays of [S]."""

  lengths: jax.Array  # int32, tokens in the cache: the slot's cursor
  last: jax.Array  # int32, the last sampled token, which is not in the cache yet
  active: jax.Array  # bool
  remaining: jax.Array  # int32, tokens that may still be sampled in this turn
  seed: jax.Array  # uint32, of the request
  index: jax.Array  # uint32, tokens sampled since the request began
  first: jax.Array  # int32, token that the prefill sampled, -1 if none since the last decode
  first_logprob: jax.Array  # float32
  engine_seed: jax.Array  # uint32 []

  @classmethod
  def init(cls, slots: int, engine_seed: int) -> 'SlotState':
    # One buffer each: donated buffers must not be shared.
    ints = lambda: jnp.zeros((slots,), jnp.int32)
    words = lambda: jnp.zeros((slots,), jnp.uint32)
    return cls(
      lengths=ints(),
      last=ints(),
      active=jnp.zeros((slots,), bool),
      remaining=ints(),
      seed=words(),
      index=words(),
      first=ints() - 1,
      first_logprob=jnp.zeros((slots,), jnp.float32),
      engine_seed=jnp.uint32(engine_seed),
    )


@dataclasses.dataclass(frozen=True)
class Spec:
  """All that a program is compiled for besides the shapes of its arguments; hashable."""

  graphdef: nnx.GraphDef
  sampling: SamplingConfig
  stop_ids: tuple[int, ...]
  num_slots: int
  block_len: int
  decode_steps: int
  mesh: jax.sharding.Mesh | None

  def shardings(self) -> tuple[NamedSharding, NamedSharding] | None:
    """Of the cache's arrays [S, K, ...] and of everything else.

    Slots over data, key-value heads over tensor; a dimension that does not divide is whole.
    """
    if self.mesh is None:
      return None
    sizes = (('data', self.num_slots), ('tensor', decoder.config_of(self.graphdef).num_kv_heads))
    parts = [axis if size % self.mesh.shape[axis] == 0 else None for axis, size in sizes]
    return (
      NamedSharding(self.mesh, PartitionSpec(*parts)),
      NamedSharding(self.mesh, PartitionSpec()),
    )


@dataclasses.dataclass(frozen=True)
class Programs:
  """Jitted programs and how often each was traced."""

  prefill: Callable
  prefix: Callable
  decode: Callable
  traces: collections.Counter


@functools.lru_cache(maxsize=8)
def compiled(spec: Spec) -> Programs:
  """The programs of a spec; engines with equal specs and shapes share what is compiled."""
  traces = collections.Counter()

  def prefill_program(params, cache, state, blocks, ends, *, attend_len):
    traces['prefill'] += 1
    return prefill(spec, params, cache, state, blocks, ends, attend_len=attend_len)

  def prefix_program(cache, *, attend_len):
    traces['prefix'] += 1
    return cache.prefix(attend_len)

  def decode_program(params, cache, prefix, state, leave_at):
    traces['decode'] += 1
    return decode(spec, params, cache, prefix, state, leave_at)

  pinned = [{}, {}, {}]
  if shardings := spec.shardings():
    # Results fed back as arguments retrace once if their shardings are left to the compiler.
    slots, whole = shardings
    outs = ((slots, whole), slots, (slots, whole, whole))
    pinned = [{'out_shardings': out} for out in outs]
  donated = {'donate_argnames': ('cache', 'state')}
  return Programs(
    jax.jit(prefill_program, static_argnames='attend_len', **donated, **pinned[0]),
    # Apart from decoding: within one program XLA copies the whole cache before it writes to it,
    # 46 instead of 12 ms a core for 6 layers of SmolLM2-135M and 32 slots of 512.
    jax.jit(prefix_program, static_argnames='attend_len', **pinned[1]),
    jax.jit(decode_program, **donated, **pinned[2]),
    traces,
  )


def _choose(spec: Spec, params, hidden, engine_seed, seed, index):
  """Samples from hidden states [R, D] -> tokens int32 [R], logprobs float32 [R], stop bool [R].

  A draw's key is (engine seed, request seed, token index): the same in any batch.
  """
  logits = decoder.logits(spec.graphdef, params[1], hidden)
  fold = jax.random.fold_in
  key = jax.random.key(engine_seed)
  keys = jax.vmap(lambda seed, index: fold(fold(key, seed), index))
  tokens, logprobs = sample(logits, spec.sampling, keys(seed, index))
  return tokens, logprobs, jnp.isin(tokens, jnp.asarray(spec.stop_ids, jnp.int32))


def prefill(
  spec: Spec,
  params: tuple[nnx.State, nnx.State],
  cache: KVCache,
  state: SlotState,
  blocks: jax.Array,
  ends: jax.Array,
  *,
  attend_len: int,
) -> tuple[KVCache, SlotState]:
  """Extends slots by blocks and samples the first token of the slots that are complete.

  Args:
    spec: static.
    params: the adapter's and the frozen state.
    cache: donated.
    state: donated.
    blocks: int32 [B, T + 6]: the tokens, then BLOCK_FIELDS; cursor is the position of the block's
      first token, budget the turn's max_new_tokens. A block with count 0 is padding.
    ends: int32 [R], rows of `blocks` that are the last of their slot; B where there is none.
    attend_len: static, at least the end of the furthest block.
  """
  width = spec.block_len
  slots, cursors, counts, budgets, seeds, indices = blocks[:, width:].T
  hidden, cache = decoder.forward_cached(
    spec.graphdef,
    *params,
    blocks[:, :width],
    cache,
    cursors,
    counts,
    slots=slots,
    attend_len=attend_len,
  )
  there = ends < blocks.shape[0]
  rows = jnp.minimum(ends, blocks.shape[0] - 1)
  seeds, indices = (
    jax.lax.bitcast_convert_type(x[rows], jnp.uint32) for x in (seeds, indices)
  )
  hidden = hidden[rows, jnp.maximum(counts[rows] - 1, 0)]
  tokens, logprobs, stop = _choose(
    spec, params, hidden, state.engine_seed, seeds, indices
  )
  remaining = budgets[rows] - 1
  # Rows that end nothing point outside the arrays and are dropped.
  target = jnp.where(there, slots[rows], spec.num_slots)
  put = lambda array, new: array.at[target].set(new, mode='drop')
  return cache, dataclasses.replace(
    state,
    lengths=put(state.lengths, cursors[rows] + counts[rows]),
    last=put(state.last, tokens),
    active=put(state.active, ~stop & (remaining > 0)),
    remaining=put(state.remaining, remaining),
    seed=put(state.seed, seeds),
    index=put(state.index, indices + 1),
    first=put(state.first, tokens),
    first_logprob=put(state.first_logprob, logprobs),
  )


def decode(
  spec: Spec,
  params: tuple[nnx.State, nnx.State],
  cache: KVCache,
  prefix: KVCache,
  state: SlotState,
  leave_at: jax.Array,
) -> tuple[KVCache, SlotState, jax.Array]:
  """Samples up to `decode_steps` tokens for every active slot.

  Args:
    spec: static.
    params: the adapter's and the frozen state.
    cache: donated.
    prefix: of the cache, at least as long as the longest active slot.
    state: donated.
    leave_at: int32, return as soon as no more slots than this are active.

  Returns:
    The cache, the slots' state, and all that the host wants to know as one int32 array
    [S, 2 * (decode_steps + 1) + 2]: tokens (the prefill's first; -1 where none), the bits of their
    float32 log-probabilities, active, steps done.
  """
  steps, slots = spec.decode_steps, spec.num_slots
  tokens = jnp.full((slots, steps + 1), -1, jnp.int32).at[:, 0].set(state.first)
  logprobs = jnp.zeros((slots, steps + 1), jnp.float32).at[:, 0].set(state.first_logprob)

  before = state.lengths

  def unfinished(carry):
    step, _, state, _, _ = carry
    return (step < steps) & (jnp.sum(state.active) > leave_at)

  def advance(carry):
    step, tail, state, tokens, logprobs = carry
    hidden, tail = decoder.forward_step(
      spec.graphdef, *params, state.last, prefix, tail, before, step
    )
    new, logprob, stop = _choose(
      spec, params, hidden, state.engine_seed, state.seed, state.index
    )
    column = lambda array, value: jax.lax.dynamic_update_slice(
      array, value[:, None], (0, step + 1)
    )
    active, one = state.active, state.active.astype(jnp.int32)
    tokens = column(tokens, jnp.where(active, new, -1))
    logprobs = column(logprobs, logprob)
    remaining = state.remaining - one
    state = dataclasses.replace(
      state,
      lengths=state.lengths + one,
      last=jnp.where(active, new, state.last),
      active=active & ~stop & (remaining > 0),
      remaining=remaining,
      index=state.index + one.astype(jnp.uint32),
    )
    return step + 1, tail, state, tokens, logprobs

  carry = (jnp.int32(0), cache.tail(steps), state, tokens, logprobs)
  step, tail, state, tokens, logprobs = jax.lax.while_loop(unfinished, advance, carry)
  # A slot that ended went on with the others: only what it wrote while active is kept.
  cache = cache.absorb(tail, before, state.lengths - before)
  packed = jnp.concatenate(
    [
      tokens,
      jax.lax.bitcast_convert_type(logprobs, jnp.int32),
      state.active.astype(jnp.int32)[:, None],
      jnp.broadcast_to(step, (slots, 1)),
    ],
    axis=1,
  )
  return cache, dataclasses.replace(state, first=jnp.full_like(state.first, -1)), packed
