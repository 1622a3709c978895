"""Beginnings that conversations share: computed once, then copied from slot to slot.

The episodes of a task type begin with the same system prompt and the same few-shots. What of a new
prompt's beginning some slot holds already, or what is kept in the store because it was shared
before, is copied there instead of being computed; of several new prompts with one beginning the
first computes it, and the others wait for that dispatch. The prompts alone decide: nobody says what
is shared, but for which policy a conversation has: the keys and values of another are others.

Here is the host's side: which tokens lie where, what to copy, what to keep. Keys and values are
moved by `inference.programs`.

Axes: S slots, C context.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from models.kv_cache import KVCache


def shared_lengths(held: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """How many tokens of ids, int32 [n], each row of held, int32 [S, C], begins with; int [S]."""
  ids = ids[: held.shape[1]]
  same = held[:, : len(ids)] == ids
  return np.where(same.all(axis=1), len(ids), same.argmin(axis=1) if len(ids) else 0)


@dataclasses.dataclass(frozen=True)
class Key:
  """Of an entry: whose keys and values they are, and the tokens' int32 bytes."""

  policy: int
  ids: bytes


class PrefixStore:
  """Keys and values by the tokens that they belong to; what was used longest ago goes first."""

  def __init__(self, max_bytes: int):
    """An empty store of at most `max_bytes` of keys and values."""
    self.max_bytes, self.nbytes = max_bytes, 0
    self._rows: collections.OrderedDict[Key, KVCache] = collections.OrderedDict()

  def __len__(self) -> int:
    return len(self._rows)

  def find(self, ids: np.ndarray, policy: int = 0) -> tuple[int, Key | None]:
    """The most tokens of ids, int32 [n], that a policy's entry begins with, and its key."""
    best = 0, None
    for key in self._rows:
      if key.policy != policy:
        continue
      shared = int(shared_lengths(np.frombuffer(key.ids, np.int32)[None], ids)[0])
      if shared > best[0]:
        best = shared, key
    return best

  def row(self, key: Key) -> KVCache:
    """An entry's keys and values, [1, ...]; it counts as used."""
    self._rows.move_to_end(key)
    return self._rows[key]

  def add(self, ids: np.ndarray, row: KVCache, policy: int = 0) -> None:
    """Keeps the keys and values of ids, int32 [n], in place of entries that ids begin with."""
    new = Key(policy, ids.tobytes())
    for key in [k for k in self._rows if k.policy == policy and new.ids.startswith(k.ids)]:
      self._drop(key)
    if row.nbytes > self.max_bytes:
      return
    self._rows[new] = row
    self.nbytes += row.nbytes
    while self.nbytes > self.max_bytes:
      self._drop(next(iter(self._rows)))

  def clear(self) -> None:
    self._rows.clear()
    self.nbytes = 0

  def _drop(self, key: Key) -> None:
    self.nbytes -= self._rows.pop(key).nbytes


@dataclasses.dataclass(frozen=True)
class Waiting:
  """A slot with a prompt to compute.

  Attributes:
    held: tokens at its beginning whose keys and values are there.
    total: all tokens of it.
  """

  held: int
  total: int


@dataclasses.dataclass(frozen=True)
class Copy:
  """The first `count` tokens of a slot come from another slot (an index) or an entry (its key)."""

  slot: int
  source: int | Key
  count: int


def plan(
  ids: np.ndarray,
  held: np.ndarray,
  waiting: Mapping[int, Waiting],
  store: PrefixStore,
  min_tokens: int,
  policies: np.ndarray,
) -> tuple[list[int], list[Copy]]:
  """Decides whose prompts are computed now, and what is copied before.

  Args:
    ids: int32 [S, C], the tokens of every slot.
    held: int [S], of them those whose keys and values are there; a waiting slot's own, too.
    waiting: by slot.
    store: of beginnings.
    min_tokens: fewer are computed rather than copied. A dispatch of its own has to save at least
      four times as many.
    policies: int [S], of each slot; nothing is shared between different ones.

  Returns:
    The slots to compute now (at least one; the others share what these compute), and their copies.
  """
  first: list[int] = []
  later: list[int] = []
  copies: dict[int, Copy] = {}
  saved = 0
  for slot, prompt in waiting.items():
    own = ids[slot, : prompt.total]
    # The last token is computed in any case: the first sampled one follows from it.
    same = np.minimum(shared_lengths(ids, own), prompt.total - 1)
    same = np.where(policies == policies[slot], same, 0)
    there = np.minimum(same, held)
    source: int | Key = int(there.argmax())
    count = int(there.max())
    stored, key = store.find(own[:-1], int(policies[slot]))
    if stored > count:
      source, count = key, stored
    if count >= prompt.held + min_tokens:
      copies[slot] = Copy(slot, source, count)
    else:
      count = prompt.held
    soon = max((min(int(same[other]), waiting[other].total) for other in first), default=0)
    if soon >= count + min_tokens:
      later.append(slot)
      saved += soon - count
    else:
      first.append(slot)
  now = first if saved >= 4 * min_tokens else [*waiting]
  return now, [copies[slot] for slot in now if slot in copies]


def by_source(copies: Sequence[Copy]) -> dict[int | Key, list[Copy]]:
  """The copies of each source."""
  groups: dict[int | Key, list[Copy]] = {}
  for copy in copies:
    groups.setdefault(copy.source, []).append(copy)
  return groups
