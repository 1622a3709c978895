"""Batched multi-turn generation over static-shaped slots; knows tokens, not text.

A slot holds one conversation. Its keys and values stay on the device between turns, so a turn costs
its new tokens only: re-reading the history each turn would make 30 turns of 100 tokens after a
1,000-token prompt prefill 73,500 tokens where 4,000 are new.

A dispatch runs one compiled program (`inference.programs`) over all the work at hand:

- *prefill*: the new tokens of all waiting slots, cut into blocks of `block_len` tokens. A block
  knows its slot and position, several blocks may belong to one slot, and a batch of blocks is a row
  of bucketed length: a 180-token prompt and a 10-token observation share a dispatch with little
  padding. The last token's hidden state gives the first sampled token.
- *decode*: up to `decode_steps` tokens for every active slot, with sampling and stop tests on the
  device. It ends early as soon as a quarter of the slots that were busy are done, so that the
  caller can refill them instead of carrying idle rows along.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from inference import programs
from inference.sampling import GREEDY, SamplingConfig
from models import decoder
from models.kv_cache import KVCache

# Share of the busy slots whose end makes decoding return: a step costs the same for 32 rows as for
# 24, and a prefill of 8 turns already fills the processor.
_REFILL_SHARE = 0.25
_UINT32 = 0xFFFFFFFF


class ContextOverflow(Exception):
  """The turn cannot fit into the slot; the slot is as it was before."""


@dataclasses.dataclass(frozen=True)
class Completion:
  """One finished model call.

  Attributes:
    slot: index of the slot.
    tokens: int32 [m], sampled; the stop token is included where one was sampled.
    logprobs: float32 [m], natural logarithms under the model's own distribution (temperature 1).
    stop_reason: 'stop' (a stop token) or 'length' (`max_new_tokens` reached).
    prefilled_tokens: tokens that were computed before the first sampled one.
    prompt_tokens: all tokens the first sampled one was conditioned on, cached ones included.
  """

  slot: int
  tokens: np.ndarray
  logprobs: np.ndarray
  stop_reason: str
  prefilled_tokens: int
  prompt_tokens: int


@dataclasses.dataclass
class Stats:
  """Counts since the engine was made. Seconds of calls that compiled are in `compile_s` only."""

  prefilled: int = 0
  prefill_computed: int = 0  # prefilled tokens and their padding
  generated: int = 0
  decode_computed: int = 0  # rows times steps, idle rows included
  decoded: int = 0  # tokens of them that were wanted
  prefill_dispatches: int = 0
  decode_dispatches: int = 0
  prefill_s: float = 0.0
  decode_s: float = 0.0
  compile_s: float = 0.0
  traces: int = 0

  @property
  def dispatches(self) -> int:
    return self.prefill_dispatches + self.decode_dispatches

  @property
  def padded_share(self) -> float:
    """Share of the prefilled positions that was padding."""
    return 1 - self.prefilled / self.prefill_computed if self.prefill_computed else 0.0

  @property
  def idle_share(self) -> float:
    """Share of the decoded positions whose slot was done or empty."""
    return 1 - self.decoded / self.decode_computed if self.decode_computed else 0.0

  def as_dict(self) -> dict[str, float]:
    derived = ('dispatches', 'padded_share', 'idle_share')
    return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclasses.dataclass
class _Slot:
  """The host's side of a slot."""

  length: int = 0  # tokens in the cache, without the turn in progress
  last: int | None = None  # sampled and not cached
  seed: int = 0
  index: int = 0  # tokens sampled since reset
  new: np.ndarray | None = None  # waiting for prefill
  budget: int = 0  # max_new_tokens of the turn in progress
  running: bool = False
  prompt_tokens: int = 0
  prefilled_tokens: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)

  @property
  def cached(self) -> int:
    """Tokens that the device's cache holds once all that was dispatched is done."""
    return self.length + max(len(self.tokens) - 1, 0)


def attend_buckets(max_len: int, step: int = 128) -> list[int]:
  """Static lengths of the attended prefix: multiples of `step`, coarser beyond 4 of them.

  A program is compiled for each that is used; 128 positions more cost 32 slots of SmolLM2-135M
  about a tenth of a decode step.
  """
  lengths, width = [], step
  while not lengths or lengths[-1] < max_len:
    lengths.append((lengths[-1] if lengths else 0) + width)
    if lengths[-1] >= 4 * width:
      width *= 2
  return [min(length, max_len) for length in lengths]


class Engine:
  """Slots, their cache and the compiled programs.

  Use: `submit` a turn to each free slot, then `step` until it hands back completions; submit the
  next turn of a conversation to the same slot (only its new tokens), or `reset=True` for a new one.

  Tokens, greedy or sampled, depend on the slot's own tokens and seed and not on what else is in the
  batch, but for rounding: products of different widths may break a near tie differently.
  """

  def __init__(
    self,
    model: decoder.Model,
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
  ):
    """Merges the adapter and allocates the cache.

    Args:
      model: with or without an adapter; it is not changed.
      num_slots: conversations at a time.
      max_len: tokens that a slot can hold.
      stop_ids: sampling one of these ends a turn.
      sampling: the same for all slots.
      decode_steps: most tokens a slot samples in one decode dispatch.
      cache_dtype: None is the model's compute dtype.
      mesh: of `sharding.AXES`: slots over data, key-value heads over tensor, where they
        divide. The model must lie on the same mesh.
      seed: of the engine; with a request's seed and a token's index it keys every draw.
      block_len: tokens of a prefill block.
      block_buckets: numbers of blocks a prefill dispatch is compiled for.
      attend_step: granularity of the attended length in decoding; twice that in prefill, which has
        a program for every pair of attended length and bucket.
    """
    model = decoder.prepare_for_decode(decoder.merge_lora(model))
    self.num_slots, self.max_len = num_slots, max_len
    self.stats = Stats()
    self._params = (model.lora, model.frozen)
    self._stop_ids = frozenset(stop_ids)
    self._decode_steps = decode_steps
    self._block_len = block_len
    self._block_buckets = sorted(set(block_buckets))
    self._decode_lengths = attend_buckets(max_len, attend_step)
    self._prefill_lengths = attend_buckets(max_len, 2 * attend_step)
    self._slots = [_Slot() for _ in range(num_slots)]
    self._requests = 0
    spec = programs.Spec(
      graphdef=model.graphdef,
      sampling=sampling,
      stop_ids=tuple(sorted(self._stop_ids)),
      num_slots=num_slots,
      block_len=block_len,
      decode_steps=decode_steps,
      mesh=mesh,
    )
    self._programs = programs.compiled(spec)
    self._cache = KVCache.init(
      model.config, num_slots, max_len, cache_dtype or model.config.dtype
    )
    self._state = programs.SlotState.init(num_slots, seed & _UINT32)
    if shardings := spec.shardings():
      self._cache = jax.device_put(self._cache, shardings[0])
      self._state = jax.device_put(self._state, shardings[1])

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

    Raises:
      ContextOverflow: conversation, new tokens and max_new_tokens exceed max_len together.
      ValueError: the slot has a turn in progress, there is nothing to condition on, or `keep` is
        more than there is.
    """
    state = self._slots[slot]
    if state.running:
      raise ValueError(f'Slot {slot} has a turn in progress.')
    if max_new_tokens < 1:
      raise ValueError(f'max_new_tokens={max_new_tokens} is not positive.')
    tokens = np.asarray(tokens, np.int32).reshape(-1)
    length, last = (0, None) if reset else (state.length, state.last)
    if keep is not None and not reset:
      if not 0 <= keep <= self.length(slot):
        raise ValueError(f'Slot {slot} has {self.length(slot)} tokens and cannot keep {keep}.')
      if keep <= length:
        length, last = keep, None
    if last is not None:
      tokens = np.concatenate([np.asarray([last], np.int32), tokens])
    if not len(tokens):
      raise ValueError(f'Slot {slot} got an empty turn and has no token to go on from.')
    if length + len(tokens) + max_new_tokens > self.max_len:
      raise ContextOverflow(
        f'{length} cached, {len(tokens)} new and up to {max_new_tokens} sampled tokens exceed the '
        f'{self.max_len} tokens of a slot.'
      )
    if reset:
      state.seed = (self._requests if seed is None else seed) & _UINT32
      state.index = 0
      self._requests += 1
    elif seed is not None:
      state.seed = seed & _UINT32
    state.length, state.last, state.new = length, None, tokens
    state.budget, state.running = max_new_tokens, True
    state.tokens, state.logprobs = [], []
    state.prefilled_tokens, state.prompt_tokens = len(tokens), length + len(tokens)

  def step(self) -> list[Completion]:
    """Prefills what is waiting, decodes once, and hands back the turns that ended (by slot)."""
    busy = self.busy
    if not busy:
      return []
    waiting = [i for i, slot in enumerate(self._slots) if slot.new is not None]
    if waiting:
      self._run_prefill(waiting)
    longest = max(slot.cached for slot in self._slots if slot.running)
    leave_at = np.int32(busy - math.ceil(_REFILL_SHARE * busy))
    with self._clock('decode'):
      attend_len = next(n for n in self._decode_lengths if n >= longest)
      prefix = self._programs.prefix(self._cache, attend_len=attend_len)
      self._cache, self._state, packed = self._programs.decode(
        self._params, self._cache, prefix, self._state, leave_at
      )
      # The step's one transfer to the host.
      packed = np.asarray(packed)
    return self._collect(packed)

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

  def _run_prefill(self, waiting: list[int]) -> None:
    """Dispatches the waiting slots' tokens, block by block; earlier blocks of a slot go first."""
    width = self._block_len
    queue = collections.deque()  # (slot, start, tokens, ends)
    # Short slots first: the attended length of a dispatch is its longest slot's.
    for index in sorted(waiting, key=lambda i: self._slots[i].prompt_tokens):
      slot = self._slots[index]
      for offset in range(0, len(slot.new), width):
        piece = slot.new[offset : offset + width]
        queue.append((index, slot.length + offset, piece, offset + width >= len(slot.new)))
    while queue:
      size = self._bucket(len(queue))
      blocks = np.zeros((size, width + len(programs.BLOCK_FIELDS)), np.int32)
      ends = np.full((min(size, self.num_slots),), size, np.int32)
      ending, longest = 0, 0
      for row in range(min(size, len(queue))):
        index, cursor, piece, last = queue.popleft()
        slot = self._slots[index]
        blocks[row, : len(piece)] = piece
        key = np.asarray([slot.seed, slot.index], np.uint32).view(np.int32)
        blocks[row, width:] = (index, cursor, len(piece), slot.budget, *key)
        longest = max(longest, cursor + len(piece))
        if last:
          ends[ending] = row
          ending += 1
          slot.length, slot.new = slot.length + slot.prefilled_tokens, None
        self.stats.prefilled += len(piece)
      self.stats.prefill_computed += size * width
      attend_len = next(n for n in self._prefill_lengths if n >= longest)
      with self._clock('prefill'):
        self._cache, self._state = self._programs.prefill(
          self._params, self._cache, self._state, blocks, ends, attend_len=attend_len
        )
        # Waits, but transfers nothing: prefill and decode are timed apart.
        jax.block_until_ready(self._state.first)

  def _bucket(self, blocks: int) -> int:
    """Blocks of the next dispatch when this many wait.

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

  def _collect(self, packed: np.ndarray) -> list[Completion]:
    """Reads a decode dispatch's result: int32 [S, 2 * (decode_steps + 1) + 2]."""
    width = self._decode_steps + 1
    tokens, logprobs = packed[:, :width], packed[:, width : 2 * width].view(np.float32)
    active, steps = packed[:, -2], int(packed[0, -1])
    self.stats.decode_computed += steps * self.num_slots
    completions = []
    for index, slot in enumerate(self._slots):
      if not slot.running:
        continue
      valid = tokens[index] >= 0
      new = tokens[index][valid].tolist()
      self.stats.generated += len(new)
      self.stats.decoded += int(valid[1:].sum())
      slot.tokens += new
      slot.logprobs += logprobs[index][valid].tolist()
      slot.index += len(new)
      if active[index]:
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
        )
      )
      slot.tokens, slot.logprobs = [], []
    return completions
