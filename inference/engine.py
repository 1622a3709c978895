"""Batched multi-turn generation over static-shaped slots; knows tokens, not text.

A slot holds one conversation. Its keys and values stay on the device between turns, so a turn costs
its new tokens only: re-reading the history each turn would make 30 turns of 100 tokens after a
1,000-token prompt prefill 73,500 tokens where 4,000 are new.

A dispatch runs one compiled program (`inference.programs`) over all the work at hand:

- *prefill*: the new tokens of all waiting slots, cut into blocks of `block_len` tokens. A block
  knows its slot and position, several blocks may belong to one slot, and a batch of blocks is a row
  of bucketed length: a 180-token prompt and a 10-token observation share a dispatch with little
  padding. The last token's hidden state gives the first sampled token.
- *copy*: beginnings of prompts that another slot has, or had (`inference.prefixes`), are copied and
  not computed again.
- *decode*: up to `decode_steps` tokens for every active slot, with sampling and stop tests on the
  device. It ends early as soon as a quarter of the slots that were busy are done, so that the
  caller can refill them instead of carrying idle rows along. With `lookup` every step verifies a
  draft (`inference.lookup`).

With two groups of slots the device computes one group's dispatch while the host reads the other's
result and its environments step.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from data.errors import UserError
from data.replies import Trie
from inference import lengths, prefixes, programs
from inference.lookup import Acceptance, LookupConfig, pays
from inference.results import Completion, ContextOverflow, Stats
from inference.sampling import GREEDY, SamplingConfig
from inference.trie import Tables
from models import adapters, decoder, incremental, memory
from models.kv_cache import KVCache

# Share of the busy slots whose end makes decoding return: a step costs the same for 32 rows as for
# 24, and a prefill of 8 turns already fills the processor.
_REFILL_SHARE = 0.25
_UINT32 = 0xFFFFFFFF


@dataclasses.dataclass
class _Slot:
  """The host's side of a slot."""

  length: int = 0  # tokens in the cache, without those that wait or were sampled in this turn
  policy: int = 0  # of the conversation
  last: int | None = None  # sampled and not cached
  seed: int = 0
  index: int = 0  # tokens sampled since reset
  new: np.ndarray | None = None  # waiting for prefill
  budget: int = 0  # max_new_tokens of the turn in progress
  running: bool = False
  prompt_tokens: int = 0
  prefilled_tokens: int = 0
  copied_tokens: int = 0
  fresh: bool = False  # the turn in progress does not go on where the last one ended
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)

  @property
  def cached(self) -> int:
    """Tokens that the device's cache holds once all that was dispatched is done."""
    return self.length + max(len(self.tokens) - 1, 0)


class Engine:
  """Slots, their cache and the compiled programs.

  Use: `submit` a turn to each free slot, then `step` until it hands back completions; submit the
  next turn of a conversation to the same slot (only its new tokens), or `reset=True` for a new one.

  Tokens, greedy or sampled, depend on the slot's own tokens, seed and policy, and not on what else
  is in the batch, but for rounding: products of different widths may break a near tie differently.

  Attributes:
    num_slots: conversations at a time.
    max_len: tokens that a slot can hold.
    num_policies: that conversations may have: 1 of a model, as many as there are side by side.
  """

  def __init__(
    self,
    model: decoder.Model | adapters.SideBySide,
    *,
    num_slots: int,
    max_len: int,
    stop_ids: Sequence[int],
    sampling: SamplingConfig = GREEDY,
    decode_steps: int = 8,
    cache_dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
    block_len: int = 16,
    block_buckets: Sequence[int] = (8, 24, 64),
    attend_step: int = 128,
    lookup: LookupConfig | None = None,
    share_prefixes: bool = True,
    prefix_bytes: int = 256 * 2**20,
    groups: int = 1,
  ):
    """Merges the adapter and allocates the cache.

    Args:
      model: with or without an adapter, which is merged into a copy of the kernels; or several
        adapters side by side, of which each conversation has one.
      num_slots: conversations at a time.
      max_len: tokens that a slot can hold.
      stop_ids: sampling one of these ends a turn.
      sampling: the same for all slots.
      decode_steps: most tokens a slot samples in one decode dispatch.
      cache_dtype: 'float32', 'bfloat16' or 'int8'; None is the model's compute dtype.
      mesh: of `sharding.AXES`: slots over data, key-value heads over tensor, where they
        divide. The model must lie on the same mesh.
      seed: of the engine; with a request's seed and a token's index it keys every draw.
      block_len: tokens of a prefill block.
      block_buckets: numbers of blocks a prefill dispatch is compiled for; on a mesh the data shards
        have equal parts of them.
      attend_step: granularity of the attended length in decoding; twice that in prefill, which has
        a program for every pair of attended length and bucket.
      lookup: drafts from the slot's own context; None decodes token by token.
      share_prefixes: copies what a new conversation begins with from where it was computed before.
      prefix_bytes: most bytes of the beginnings that are kept after the slots that had them.
      groups: of slots, each with dispatches of its own; with 2 `step` returns while the other
        group's is computed. A prefill's seconds are then counted as decoding's.

    Raises:
      UserError: the slots do not divide into the groups.
    """
    if groups < 1 or num_slots % groups:
      raise UserError(f'{num_slots} slots do not divide into {groups} groups.')
    prepared = adapters.prepare(model)
    model, self._gates = prepared.model, prepared.gates
    self.num_policies = len(self._gates)
    self.num_slots, self.max_len = num_slots, max_len
    self.stats = Stats()
    self._lookup = lookup
    self._params = (model.lora, model.frozen)
    self._stop_ids = frozenset(stop_ids)
    self._decode_steps = decode_steps
    self._block_len = block_len
    self._lengths = lengths.attend_buckets(max_len, attend_step)
    self._prefill_lengths = lengths.attend_buckets(max_len, 2 * attend_step)
    self._slots = [_Slot() for _ in range(num_slots)]
    # The tokens of each slot's conversation, in their positions.
    self._ids = np.zeros((num_slots, max_len), np.int32)
    self._store = prefixes.PrefixStore(prefix_bytes) if share_prefixes else None
    self._acceptance = Acceptance(num_slots, lookup) if lookup else None
    self._tables = Tables(num_slots)
    self._requests = 0
    self._group_size = num_slots // groups
    # Dispatches whose results were not read yet: group, result, tokens of a step.
    self._flying: collections.deque[tuple[int, jax.Array, int]] = collections.deque()
    spec = programs.Spec(
      graphdef=model.graphdef,
      sampling=sampling,
      stop_ids=tuple(sorted(self._stop_ids)),
      num_slots=self._group_size,
      block_len=block_len,
      decode_steps=decode_steps,
      mesh=mesh,
      lookup=lookup,
    )
    self._programs = programs.compiled(spec)
    self._shards = spec.shards
    self._block_buckets = sorted({-(-blocks // self._shards) for blocks in block_buckets})
    self._caches, self._states = [], []
    # Whole lines of a CPU's cache for each number of a key, where its own kernel reads them.
    positions = -(-max_len // 32) * 32 if decoder.is_native(model.graphdef) else max_len
    for _ in range(groups):
      cache = KVCache.init(
        model.config, self._group_size, positions, cache_dtype or model.config.dtype)
      state = programs.SlotState.init(self._group_size, seed & _UINT32)
      if shardings := spec.shardings():
        cache, state = map(jax.device_put, (cache, state), shardings)
      self._caches.append(cache)
      self._states.append(state)
    # A CPU's own kernel reads each slot's tokens where they lie: no copy, no attended length.
    self._in_place = incremental.reads_in_place(model.graphdef, self._caches[0])
    held = memory.held_bytes(self._caches)
    room = memory.USABLE * memory.device_bytes() - memory.held_bytes(self._params) - held
    self._decode_lengths = lengths.affordable(self._lengths, held, room)
    # Slots on several devices have no order in common: a gather of the longest would move their
    # keys and values between devices, more than it saves.
    apart = mesh is not None and mesh.shape['data'] > 1
    room_positions = room / held * max_len * num_slots
    self._splits = (
      [] if apart else lengths.splits(self._lengths, self._group_size, room_positions))

  def length(self, slot: int) -> int:
    """Tokens of the slot's conversation, the last sampled one included."""
    state = self._slots[slot]
    return state.length + (state.last is not None)

  @property
  def busy(self) -> int:
    """Slots with a turn in progress."""
    return sum(slot.running for slot in self._slots)

  def submit(
    self,
    slot: int,
    tokens: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    *,
    reset: bool = False,
    keep: int | None = None,
    seed: int | None = None,
    allowed: Trie | None = None,
    policy: int | None = None,
  ) -> None:
    """Queues a turn; `step` computes it.

    Args:
      slot: a slot without a turn in progress.
      tokens: int32 [n], new tokens. The last token sampled in the slot is put before them here.
      max_new_tokens: at least 1.
      reset: begins a new conversation: the slot's tokens are forgotten.
      keep: goes on after that many tokens of the slot's conversation and forgets the rest; None
        keeps all. What is kept stays cached.
      seed: of the request's random stream, from `reset` on. By default the number of the request,
        which makes draws depend on the order of submission; pass one for draws that do not.
      allowed: what may be sampled in this turn; None is everything.
      policy: of the conversation, the index of one of those side by side. None is 0 of a new
        conversation; one that goes on keeps its own.

    Raises:
      ContextOverflow: conversation, new tokens and max_new_tokens exceed max_len together.
      ValueError: the slot has a turn in progress, there is nothing to condition on, `keep` is more
        than there is, or the policy does not exist or is not the one that the conversation has.
    """
    state = self._slots[slot]
    if state.running:
      raise ValueError(f'Slot {slot} has a turn in progress.')
    if max_new_tokens < 1:
      raise ValueError(f'max_new_tokens={max_new_tokens} is not positive.')
    if policy is None:
      policy = 0 if reset else state.policy
    if not 0 <= policy < self.num_policies or not (reset or policy == state.policy):
      raise ValueError(
        f'Slot {slot} cannot take policy {policy}: there are {self.num_policies}, and a '
        'conversation that goes on keeps its own; begin a new one with reset=True.')
    tokens = np.asarray(tokens, np.int32).reshape(-1)
    before = state.length
    length, last = (0, None) if reset else (before, state.last)
    if keep is not None and not reset:
      if not 0 <= keep <= self.length(slot):
        raise ValueError(f'Slot {slot} has {self.length(slot)} tokens and cannot keep {keep}.')
      if keep <= length:
        length, last = keep, None
    if last is not None:
      tokens = np.concatenate([np.asarray([last], np.int32), tokens])
    prefilled = len(tokens)
    if reset and prefilled and self._store is not None and policy == state.policy:
      # What the slot's last conversation began with, too.
      held = self._ids[slot : slot + 1, : state.length]
      length = min(int(prefixes.shared_lengths(held, tokens)[0]), prefilled - 1)
      tokens = tokens[length:]
    if not len(tokens):
      raise ValueError(f'Slot {slot} got an empty turn and has no token to go on from.')
    if length + len(tokens) + max_new_tokens > self.max_len:
      raise ContextOverflow(
        f'{length} cached, {len(tokens)} new and up to {max_new_tokens} sampled tokens exceed the '
        f'{self.max_len} tokens of a slot.'
      )
    if reset:
      state.seed = (self._requests if seed is None else seed) & _UINT32
      state.index, state.policy = 0, policy
      self._requests += 1
      if self._acceptance is not None:
        self._acceptance.reset(slot)
    elif seed is not None:
      state.seed = seed & _UINT32
    self._tables.set(slot, allowed)
    state.length, state.last, state.new = length, None, tokens
    self._ids[slot, length : length + len(tokens)] = tokens
    state.budget, state.running = max_new_tokens, True
    state.tokens, state.logprobs = [], []
    state.fresh = reset or length < before
    state.prefilled_tokens, state.prompt_tokens = prefilled, length + len(tokens)
    state.copied_tokens = prefilled - len(tokens)

  def step(self) -> list[Completion]:
    """Prefills what is waiting, decodes once, and hands back the turns that ended (by slot).

    Of several groups: dispatches that for every group at rest, and hands back the turns of the
    group whose dispatch is the oldest.
    """
    flying = [group for group, *_ in self._flying]
    for group in range(len(self._caches)):
      if group not in flying:
        self._dispatch(group)
    if not self._flying:
      return []
    group, packed, width = self._flying.popleft()
    started = time.perf_counter()
    # The dispatch's one transfer to the host.
    packed = np.asarray(packed)
    self.stats.decode_s += time.perf_counter() - started
    return self._collect(group, packed, width)

  def _members(self, group: int) -> range:
    """The slots of a group."""
    return range(group * self._group_size, (group + 1) * self._group_size)

  def _gates_of(self, slots: slice) -> np.ndarray | None:
    """Float32 [S, R], the gates of each slot's policy; None where there is one, which is merged."""
    if not self._gates.size:
      return None
    return self._gates[[slot.policy for slot in self._slots[slots]]]

  def _dispatch(self, group: int) -> None:
    """Sends a group's prefill and decoding to the device, if there is any."""
    members = self._members(group)
    slots = slice(members.start, members.stop)
    running = np.array([slot.running for slot in self._slots[slots]])
    busy = int(running.sum())
    if not busy:
      return
    waiting = [i for i in members if self._slots[i].new is not None]
    if waiting:
      self._run_prefill(group, waiting)
    own = np.array([slot.cached if slot.running else 0 for slot in self._slots[slots]])
    leave_at = np.int32(busy - math.ceil(_REFILL_SHARE * busy))
    width = 1
    with self._clock('decode'):
      cache, state = self._caches[group], self._states[group]
      attend_len, prefix, longer = self._attended(cache, own)
      arguments = (
        self._params, prefix, state, leave_at, self._tables.arrays(slots), self._gates_of(slots),
        longer)
      drafting = None if self._acceptance is None else self._acceptance.drafting[slots]
      if drafting is not None and pays(drafting, running):
        width += self._lookup.draft_len
        result = self._programs.verify(
          *arguments, self._ids[slots, :attend_len].copy(), drafting)
      else:
        result = self._programs.decode(*arguments)
      new, self._states[group], packed = result
      self._caches[group] = self._programs.absorb(cache, new)
    self._flying.append((group, packed, width))

  def _attended(
    self, cache: KVCache, own: np.ndarray
  ) -> tuple[int, KVCache, programs.Longer]:
    """What decoding reads of a group's cache: its length, the prefix of all slots, and the rest.

    Args:
      cache: the group's.
      own: int [S], tokens of each slot; 0 of one at rest.
    """
    if self._in_place:
      return self.max_len, cache, None
    attend_len = next(n for n in self._decode_lengths if n >= own.max())
    copied = attend_len < self.max_len or not cache.readable
    split = lengths.choose(own, attend_len, self._splits, self._decode_steps, copied)
    if split is not None:
      rows = np.argsort(-own, kind='stable')[: split.count].astype(np.int32)
      prefix = self._programs.prefix(cache, attend_len=split.short)
      section = self._programs.section(cache, rows, start=split.short, end=split.long)
      return split.long, prefix, (section, rows)
    if copied:
      cache = self._programs.prefix(cache, attend_len=attend_len)
    return attend_len, cache, None

  def run_until_complete(self) -> list[Completion]:
    """Steps until no turn is in progress; all completions, in the order in which they ended."""
    completions = []
    while self.busy:
      completions += self.step()
    return completions

  @contextlib.contextmanager
  def _clock(self, program: str):
    """Counts a dispatch, its seconds, and whether it compiled."""
    traces = self._programs.traces
    start, before = time.perf_counter(), traces.total()
    yield
    new = traces.total() - before
    field = 'compile_s' if new else f'{program}_s'
    setattr(self.stats, field, getattr(self.stats, field) + time.perf_counter() - start)
    self.stats.traces += new
    field = f'{program}_dispatches'
    setattr(self.stats, field, getattr(self.stats, field) + 1)

  def forget(self) -> None:
    """Empties all slots and counts from zero again, but for what was compiled.

    Raises:
      ValueError: a turn is in progress.
    """
    if self.busy:
      raise ValueError('An engine with turns in progress cannot forget them.')
    for slot in self._slots:
      slot.length, slot.last = 0, None
    if self._store is not None:
      self._store.clear()
    self.stats = Stats(compile_s=self.stats.compile_s, traces=self.stats.traces)

  def _run_prefill(self, group: int, waiting: list[int]) -> None:
    """Prefills the waiting slots of a group; where they share a beginning, in several rounds."""
    while waiting:
      now = waiting
      if self._store is not None:
        fresh = [index for index in waiting if self._slots[index].fresh]
        now = [index for index in waiting if not self._slots[index].fresh]
        now += self._share(group, fresh)
      self._dispatch_blocks(group, now)
      waiting = [index for index in waiting if self._slots[index].new is not None]

  def _share(self, group: int, waiting: list[int]) -> list[int]:
    """Copies what waiting slots share with others; returns those to be computed now."""
    if not waiting:
      return []
    held = np.array([slot.cached for slot in self._slots])
    prompts = {
      index: prefixes.Waiting(self._slots[index].length, self._slots[index].prompt_tokens)
      for index in waiting}
    policies = np.array([slot.policy for slot in self._slots])
    now, copies = prefixes.plan(
      self._ids, held, prompts, self._store, self._block_len, policies)
    for source, own in prefixes.by_source(copies).items():
      with self._clock('copy'):
        if isinstance(source, prefixes.Key):
          row = self._store.row(source)
        else:
          row = self._take(source, max(copy.count for copy in own))
        slots = np.zeros(self._group_size, np.int32)
        slots[: len(own)] = [copy.slot % self._group_size for copy in own]
        self._caches[group] = self._programs.place(
          self._caches[group], row, slots, np.int32(len(own)))
      for copy in own:
        slot = self._slots[copy.slot]
        slot.new = slot.new[copy.count - slot.length :]
        slot.copied_tokens += copy.count - slot.length
        slot.length = copy.count
    for index in now:
      slot = self._slots[index]
      self.stats.copied += slot.copied_tokens
      if slot.copied_tokens:
        self._keep(index, slot.length)
    return now

  def _keep(self, index: int, length: int) -> None:
    """Puts the slot's first tokens, which another conversation had, too, into the store."""
    ids, policy = self._ids[index, :length], self._slots[index].policy
    found, _ = self._store.find(ids, policy)
    if length < 4 * self._block_len or found > length - self._block_len:
      return
    positions = next(n for n in self._lengths if n >= length)
    size = self._caches[0].nbytes // (self._group_size * self.max_len) * positions
    if size <= self._store.max_bytes:
      with self._clock('copy'):
        self._store.add(ids, self._take(index, length), policy)

  def _take(self, slot: int, length: int) -> KVCache:
    """A copy of the slot's first tokens, and of what lies behind them up to a static length."""
    attend_len = next(n for n in self._lengths if n >= length)
    group, row = divmod(slot, self._group_size)
    return self._programs.take(self._caches[group], np.int32(row), attend_len=attend_len)

  def _dispatch_blocks(self, group: int, waiting: list[int]) -> None:
    """Dispatches the waiting slots' tokens, block by block; earlier blocks of a slot go first."""
    width, members = self._block_len, self._members(group)
    # Devices that hold other slots have blocks of their own: (slot, start, tokens, ends).
    shard_slots = self._group_size // self._shards
    queues = [collections.deque() for _ in range(self._shards)]
    # Short slots first: the attended length of a dispatch is its longest slot's.
    for index in sorted(waiting, key=lambda i: self._slots[i].prompt_tokens):
      slot, queue = self._slots[index], queues[(index - members.start) // shard_slots]
      for offset in range(0, len(slot.new), width):
        piece = slot.new[offset : offset + width]
        queue.append((index, slot.length + offset, piece, offset + width >= len(slot.new)))
    while any(queues):
      size = self._bucket(max(map(len, queues)))
      total, longest = self._shards * size, 0
      blocks = np.zeros((self._shards, size, width + len(programs.BLOCK_FIELDS)), np.int32)
      ends = np.full((self._shards, min(size, shard_slots)), total, np.int32)
      for shard, queue in enumerate(queues):
        blocks[shard, :, width] = shard * shard_slots
        ending = 0
        for row in range(min(size, len(queue))):
          index, cursor, piece, last = queue.popleft()
          slot = self._slots[index]
          blocks[shard, row, : len(piece)] = piece
          key = np.asarray([slot.seed, slot.index], np.uint32).view(np.int32)
          blocks[shard, row, width:] = (
            index - members.start, cursor, len(piece), slot.budget, *key)
          longest = max(longest, cursor + len(piece))
          if last:
            ends[shard, ending] = shard * size + row
            ending += 1
            slot.length, slot.new = slot.prompt_tokens, None
          self.stats.prefilled += len(piece)
      blocks, ends = blocks.reshape(total, -1), ends.reshape(-1)
      self.stats.prefill_computed += total * width
      attend_len = next(n for n in self._prefill_lengths if n >= longest)
      own = slice(members.start, members.stop)
      with self._clock('prefill'):
        self._caches[group], self._states[group] = self._programs.prefill(
          self._params, self._caches[group], self._states[group], blocks, ends,
          self._tables.arrays(own), self._gates_of(own), attend_len=attend_len
        )
        if len(self._caches) == 1:
          # Waits, but transfers nothing: prefill and decode are timed apart.
          jax.block_until_ready(self._states[group].first)

  def _bucket(self, blocks: int) -> int:
    """Blocks of each shard in the next dispatch when this many wait.

    Filling a smaller bucket and coming again costs a dispatch (about as much as 4 blocks: the
    weights are read once more); padding a larger one costs its empty blocks.
    """
    fits = next((b for b in self._block_buckets if b >= blocks), self._block_buckets[-1])
    fills = max((b for b in self._block_buckets if b <= blocks), default=fits)
    if fits <= blocks:
      return fits
    rest = blocks - fills
    again = next(b for b in self._block_buckets if b >= rest)
    return fits if fits <= fills + again + 4 else fills

  def _collect(self, group: int, packed: np.ndarray, width: int) -> list[Completion]:
    """Reads a decode dispatch's result.

    Args:
      group: whose it is.
      packed: int32 [S, 2 * columns + 2], or 3 more behind them of a dispatch that verified drafts;
        columns are decode_steps * width + 1.
      width: tokens of a step.
    """
    columns = self._decode_steps * width + 1
    tokens, logprobs = packed[:, :columns], packed[:, columns : 2 * columns].view(np.float32)
    active, steps = packed[:, 2 * columns], int(packed[0, 2 * columns + 1])
    drafts = packed[:, 2 * columns + 2 :]
    self.stats.decode_computed += steps * width * self._group_size
    completions = []
    for row, index in enumerate(self._members(group)):
      slot = self._slots[index]
      if not slot.running or slot.new is not None:
        continue
      valid = tokens[row] >= 0
      new = tokens[row][valid].tolist()
      self.stats.generated += len(new)
      self.stats.decoded += int(valid[1:].sum())
      start = slot.length + len(slot.tokens)
      self._ids[index, start : start + len(new)] = new
      if self._acceptance is not None:
        verified, drafted, accepted = drafts[row].tolist() if width > 1 else (0, 0, 0)
        self.stats.verified += verified
        self.stats.drafted += drafted
        self.stats.accepted += accepted
        self._acceptance.update(index, verified, accepted, len(new))
      slot.tokens += new
      slot.logprobs += logprobs[row][valid].tolist()
      slot.index += len(new)
      self._tables.advance(index, new)
      if active[row]:
        continue
      slot.length, slot.last, slot.running = slot.cached, slot.tokens[-1], False
      completions.append(
        Completion(
          slot=index,
          tokens=np.asarray(slot.tokens, np.int32),
          logprobs=np.asarray(slot.logprobs, np.float32),
          stop_reason='stop' if slot.last in self._stop_ids else 'length',
          prefilled_tokens=slot.prefilled_tokens,
          prompt_tokens=slot.prompt_tokens,
          copied_tokens=slot.copied_tokens,
        )
      )
      slot.tokens, slot.logprobs = [], []
      self._tables.set(index, None)
    return completions
