"""The engine's compiled programs: prefill of blocks, and several steps of decoding.

Axes: S slots, B blocks, T tokens of a block, R slots that start to sample, D embedding, C tokens of
a verifying step (the newest and its draft), G columns of adapters that lie side by side.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from inference import lookup, trie
from inference.lookup import LookupConfig
from inference.sampling import SamplingConfig, sample
from models import decoder, incremental, kv_cache
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
  lookup: LookupConfig | None = None

  @property
  def shards(self) -> int:
    """Parts of the slots, in order, each on devices of its own; 1 where they do not divide."""
    size = 1 if self.mesh is None else self.mesh.shape['data']
    return 1 if self.num_slots % size else size

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
  section: Callable
  decode: Callable
  verify: Callable
  absorb: Callable
  take: Callable
  place: Callable
  traces: collections.Counter


@functools.lru_cache(maxsize=8)
def compiled(spec: Spec) -> Programs:
  """The programs of a spec; engines with equal specs and shapes share what is compiled."""
  traces = collections.Counter()

  def prefill_program(params, cache, state, blocks, ends, tries=None, gates=None, *, attend_len):
    traces['prefill'] += 1
    return prefill(spec, params, cache, state, blocks, ends, tries, gates, attend_len=attend_len)

  def prefix_program(cache, *, attend_len):
    traces['prefix'] += 1
    return cache.prefix(attend_len)

  def section_program(cache, rows, *, start, end):
    traces['section'] += 1
    return cache.section(rows, start, end)

  def decode_program(params, prefix, state, leave_at, tries=None, gates=None, longer=None):
    traces['decode'] += 1
    return decode(spec, params, prefix, state, leave_at, tries, gates, longer)

  def verify_program(
    params, prefix, state, leave_at, tries, gates, longer, context, drafting):
    traces['verify'] += 1
    return verify(spec, params, prefix, state, leave_at, tries, gates, longer, context, drafting)

  def absorb_program(cache, new):
    traces['absorb'] += 1
    return cache.absorb(*new, in_place=incremental.reads_in_place(spec.graphdef, cache))

  def take_program(cache, slot, *, attend_len):
    traces['take'] += 1
    return cache.row(slot, attend_len)

  def place_program(cache, row, slots, count):
    traces['place'] += 1
    return cache.with_row(row, slots, count)

  pinned = [{}, {}, {}, {}]
  if shardings := spec.shardings():
    # Results fed back as arguments retrace once if their shardings are left to the compiler.
    slots, whole = shardings
    row = NamedSharding(spec.mesh, PartitionSpec(None, *slots.spec[1:]))
    outs = ((slots, whole), slots, ((slots, whole), whole, whole), row)
    pinned = [{'out_shardings': out} for out in outs]
  # Decoding reads the cache or a prefix of it, made apart, and another program writes to it: within
  # one, XLA copies the whole cache before it writes, 46 instead of 12 ms a core for 6 layers of
  # SmolLM2-135M and 32 slots of 512.
  reading = {'donate_argnames': 'state'}
  return Programs(
    jax.jit(
      prefill_program, static_argnames='attend_len', donate_argnames=('cache', 'state'),
      **pinned[0]),
    jax.jit(prefix_program, static_argnames='attend_len', **pinned[1]),
    jax.jit(section_program, static_argnames=('start', 'end'), **pinned[3]),
    jax.jit(decode_program, **reading, **pinned[2]),
    jax.jit(verify_program, **reading, **pinned[2]),
    jax.jit(absorb_program, donate_argnames='cache', **pinned[1]),
    jax.jit(take_program, static_argnames='attend_len', **pinned[3]),
    jax.jit(place_program, donate_argnames='cache', **pinned[1]),
    traces,
  )


# Edges int32 [S, E, 3] and nodes int32 [S] of `inference.trie`; None where no slot is restricted.
Tries = tuple[jax.Array, jax.Array] | None
# `KVCache.section` of some slots, and these slots, int32 [n]: what the prefix of all leaves out.
Longer = tuple[KVCache, jax.Array] | None
# What decoding adds to a cache: the arguments of `KVCache.absorb`, a tail and its places.
New = tuple[KVCache, jax.Array]


def _choose(
  spec: Spec, params, hidden, counts, engine_seed, seed, index, edges=None, nodes=None
):
  """Samples from hidden states [R, D] -> tokens int32 [R], logprobs float32 [R], stop bool [R].

  What `counts` [R] leaves out may be anything. A draw's key is (engine seed, request seed, token
  index): the same in any batch. Edges [R, E, 3] and nodes [R] restrict it.
  """
  logits = decoder.logits(spec.graphdef, params[1], hidden, counts)
  fold = jax.random.fold_in
  key = jax.random.key(engine_seed)
  keys = jax.vmap(lambda seed, index: fold(fold(key, seed), index))
  mask = None if edges is None else trie.allowed(edges, nodes, logits.shape[-1])
  tokens, logprobs = sample(
    logits, spec.sampling, keys(seed, index), mask, own=decoder.is_native(spec.graphdef))
  return tokens, logprobs, jnp.isin(tokens, jnp.asarray(spec.stop_ids, jnp.int32))


def prefill(
  spec: Spec,
  params: tuple[nnx.State, nnx.State],
  cache: KVCache,
  state: SlotState,
  blocks: jax.Array,
  ends: jax.Array,
  tries: Tries = None,
  gates: jax.Array | None = None,
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
      first token, budget the turn's max_new_tokens. A block with count 0 is padding. Of a mesh each
      of `Spec.shards` equal parts has blocks of the slots that lie there, and no others.
    ends: int32 [R], rows of `blocks` that are the last of their slot, in parts likewise; B where
      there is none.
    tries: what the slots may reply.
    gates: float32 [S, G], which of several adapters each slot has (`models.adapters`); None where
      there is one at most.
    attend_len: static, at least the end of the furthest block.
  """
  width = spec.block_len
  slots, cursors, counts, budgets, seeds, indices = blocks[:, width:].T
  there = ends < blocks.shape[0]
  rows = jnp.minimum(ends, blocks.shape[0] - 1)

  def extend(params, tokens, cache, cursors, counts, slots, rows, gates):
    """Of a part's blocks and slots, each counted from the first of all."""
    part = 0 if spec.shards == 1 else jax.lax.axis_index('data')
    hidden, cache = incremental.forward_cached(
      spec.graphdef, *params, tokens, cache, cursors, counts,
      slots=slots - part * cache.num_slots, attend_len=attend_len, gates=gates)
    rows = jnp.clip(rows - part * len(tokens), 0, len(tokens) - 1)
    return hidden[rows, jnp.maximum(counts[rows] - 1, 0)], cache

  if spec.shards > 1:
    # Left to itself the compiler has every device compute all blocks, as any may be of any slot.
    own = PartitionSpec('data')
    extend = jax.shard_map(
      extend, mesh=spec.mesh, axis_names={'data'}, in_specs=(PartitionSpec(), *[own] * 7),
      out_specs=own, check_vma=False)
  hidden, cache = extend(
    params, blocks[:, :width], cache, cursors, counts, slots, rows,
    None if gates is None else gates[slots])
  seeds, indices = (
    jax.lax.bitcast_convert_type(x[rows], jnp.uint32) for x in (seeds, indices)
  )
  own = () if tries is None else (array[slots[rows]] for array in tries)
  tokens, logprobs, stop = _choose(
    spec, params, hidden, there, state.engine_seed, seeds, indices, *own
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
  prefix: KVCache,
  state: SlotState,
  leave_at: jax.Array,
  tries: Tries = None,
  gates: jax.Array | None = None,
  longer: Longer = None,
) -> tuple[New, SlotState, jax.Array]:
  """Samples up to `decode_steps` tokens for every active slot.

  Args:
    spec: static.
    params: the adapter's and the frozen state.
    prefix: what is attended to, at least as long as the longest active slot that `longer` does not
      name: the cache itself, or `KVCache.prefix` of it; only read.
    state: donated.
    leave_at: int32, return as soon as no more slots than this are active.
    tries: what the slots may reply; their nodes are those before the prefill's token.
    gates: as for `prefill`.
    longer: what active slots have beyond the prefix.

  Returns:
    What the cache has to absorb, the slots' state, and all that the host wants to know as one int32
    array [S, 2 * (decode_steps + 1) + 2]: tokens (the prefill's first; -1 where none), the bits of
    their float32 log-probabilities, active, steps done.
  """
  steps, slots = spec.decode_steps, spec.num_slots
  tokens = jnp.full((slots, steps + 1), -1, jnp.int32).at[:, 0].set(state.first)
  logprobs = jnp.zeros((slots, steps + 1), jnp.float32).at[:, 0].set(state.first_logprob)

  before = state.lengths

  def unfinished(carry):
    step, _, state, *_ = carry
    return (step < steps) & (jnp.sum(state.active) > leave_at)

  def advance(carry):
    step, tail, state, tokens, logprobs, nodes = carry
    hidden, tail = incremental.forward_step(
      spec.graphdef, *params, state.last, prefix, tail, _read(state, before), step, gates=gates,
      longer=longer, counts=state.active
    )
    new, logprob, stop = _choose(
      spec, params, hidden, state.active, state.engine_seed, state.seed, state.index, edges, nodes
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
    if nodes is not None:
      nodes = trie.follow(edges, nodes, new)
    return step + 1, tail, state, tokens, logprobs, nodes

  edges, nodes = _enter(tries, state)
  carry = (jnp.int32(0), prefix.tail(steps), state, tokens, logprobs, nodes)
  step, tail, state, tokens, logprobs, _ = jax.lax.while_loop(unfinished, advance, carry)
  # A slot that ended went on with the others: only what it wrote while active is kept.
  new = tail, kv_cache.places(before, state.lengths - before, steps)
  packed = _pack(tokens, logprobs, state.active, jnp.broadcast_to(step, (slots,)))
  return new, dataclasses.replace(state, first=jnp.full_like(state.first, -1)), packed


def _read(state: SlotState, lengths: jax.Array) -> jax.Array:
  """Tokens of each slot that a step reads: of one at rest none, where that is worth anything."""
  return jnp.where(state.active, lengths, 0)


def _enter(tries: Tries, state: SlotState) -> tuple[jax.Array | None, jax.Array | None]:
  """Edges, and nodes behind the tokens that the prefill sampled; None where nothing restricts."""
  if tries is None:
    return None, None
  edges, nodes = tries
  return edges, jnp.where(state.first < 0, nodes, trie.follow(edges, nodes, state.first))


def _pack(tokens: jax.Array, logprobs: jax.Array, *columns: jax.Array) -> jax.Array:
  """One int32 array [S, ...] of tokens [S, W], the bits of logprobs [S, W], and columns [S]."""
  bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
  return jnp.concatenate([tokens, bits, jnp.stack(columns, axis=1).astype(jnp.int32)], axis=1)


def verify(
  spec: Spec,
  params: tuple[nnx.State, nnx.State],
  prefix: KVCache,
  state: SlotState,
  leave_at: jax.Array,
  tries: Tries,
  gates: jax.Array | None,
  longer: Longer,
  context: jax.Array,
  drafting: jax.Array,
) -> tuple[New, SlotState, jax.Array]:
  """`decode` with drafts (`inference.lookup`): up to C tokens a step and active slot.

  Args:
    spec: static; its `lookup` is set.
    params, prefix, state, leave_at, tries, gates, longer: as for `decode`.
    context: int32 [S, all that is attended to], the cached tokens.
    drafting: bool [S], slots that draft; the others sample one token a step.

  Returns:
    As `decode`, with `decode_steps * C` in place of `decode_steps` (-1 between the tokens, too),
    and three columns more at the end: steps with a draft (which may be empty), its tokens, and
    those accepted.
  """
  slots, width = spec.num_slots, spec.lookup.draft_len + 1
  columns = spec.decode_steps * width
  tokens = jnp.full((slots, columns + 1), -1, jnp.int32).at[:, 0].set(state.first)
  logprobs = jnp.zeros((slots, columns + 1), jnp.float32).at[:, 0].set(state.first_logprob)
  before, ahead, rows = state.lengths, jnp.arange(width), jnp.arange(slots)[:, None]
  context = jnp.pad(context, ((0, 0), (0, columns + 1)))
  context = context.at[rows[:, 0], before].set(state.last)
  at_columns = lambda array, value, start: jax.lax.dynamic_update_slice(array, value, (0, start))

  def unfinished(carry):
    step, state = carry[:2]
    return (step < spec.decode_steps) & (jnp.sum(state.active) > leave_at)

  def advance(carry):
    step, state, tail, places, context, tokens, logprobs, counts, nodes = carry
    drafts, drafted = lookup.propose(context, state.lengths + 1, spec.lookup)
    drafted = jnp.where(state.active & drafting, jnp.minimum(drafted, state.remaining - 1), 0)
    start, own = step * width, state.lengths[:, None] + ahead
    places = at_columns(places, own, start)
    fed = jnp.concatenate([state.last[:, None], drafts], axis=1)
    wanted = state.active[:, None] & (ahead <= drafted[:, None])
    hidden, tail = incremental.forward_step(
      spec.graphdef, *params, fed, prefix, tail, _read(state, before), start, places, gates, longer,
      wanted
    )
    seeds = jnp.broadcast_to(state.seed[:, None], fed.shape)
    indices = state.index[:, None] + ahead.astype(jnp.uint32)
    restricted, path = (), [nodes]
    if nodes is not None:
      for i in range(width - 1):
        path.append(trie.follow(edges, path[-1], drafts[:, i]))
      path = jnp.stack(path, axis=1)
      restricted = jnp.repeat(edges, width, axis=0), path.reshape(-1)
    chosen = _choose(
      spec, params, hidden.reshape(-1, hidden.shape[-1]), wanted.reshape(-1), state.engine_seed,
      seeds.reshape(-1), indices.reshape(-1), *restricted
    )
    new, logprob, stop = (x.reshape(fed.shape) for x in chosen)
    # Kept: what the draft had right, the choice behind it, and nothing behind a stop token.
    kept = ahead <= lookup.accepted(drafts, drafted, new)[:, None]
    kept &= jnp.cumsum(stop, axis=1) - stop == 0
    kept &= state.active[:, None]
    count = jnp.sum(kept, axis=1, dtype=jnp.int32)
    final = jnp.maximum(count - 1, 0)[:, None]
    newest = jnp.take_along_axis(new, final, axis=1)[:, 0]
    if nodes is not None:
      behind = trie.follow(edges, jnp.take_along_axis(path, final, axis=1)[:, 0], newest)
      nodes = jnp.where(count > 0, behind, nodes)
    places = at_columns(places, jnp.where(kept, own, kv_cache.OUTSIDE), start)
    context = context.at[rows, jnp.where(kept, own + 1, kv_cache.OUTSIDE)].set(new, mode='drop')
    tokens = at_columns(tokens, jnp.where(kept, new, -1), start + 1)
    logprobs = at_columns(logprobs, logprob, start + 1)
    remaining = state.remaining - count
    verified = (state.active & drafting).astype(jnp.int32)
    counts += jnp.stack([verified, drafted, verified * (count - 1)], axis=1)
    state = dataclasses.replace(
      state,
      lengths=state.lengths + count,
      last=jnp.where(count > 0, newest, state.last),
      active=state.active & ~jnp.any(stop & kept, axis=1) & (remaining > 0),
      remaining=remaining,
      index=state.index + count.astype(jnp.uint32),
    )
    return step + 1, state, tail, places, context, tokens, logprobs, counts, nodes

  edges, nodes = _enter(tries, state)
  places = jnp.full((slots, columns), kv_cache.OUTSIDE, jnp.int32)
  counts = jnp.zeros((slots, 3), jnp.int32)
  carry = (
    jnp.int32(0), state, prefix.tail(columns), places, context, tokens, logprobs, counts, nodes)
  step, state, tail, places, _, tokens, logprobs, counts, _ = jax.lax.while_loop(
    unfinished, advance, carry)
  packed = _pack(tokens, logprobs, state.active, jnp.broadcast_to(step, (slots,)), *counts.T)
  return (tail, places), dataclasses.replace(state, first=jnp.full_like(state.first, -1)), packed
