"""The attended lengths that programs are compiled for: cost follows the tokens that there are."""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Of the positions that a dispatch reads: a split that saves less is not worth a program.
_MIN_SAVED = 0.2


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


def affordable(lengths: Sequence[int], cache_bytes: int, room: float) -> list[int]:
  """The attended lengths for which decoding has the memory.

  All of a slot is read where it lies; less of it is copied first, so that a dispatch reads what it
  needs and no more.

  Args:
    lengths: of `attend_buckets`.
    cache_bytes: of the whole cache on a device.
    room: bytes that are free there.
  """
  whole = lengths[-1]
  return [n for n in lengths if n == whole or n / whole * cache_bytes <= room]


@dataclasses.dataclass(frozen=True)
class Split:
  """Two classes of slots in one decode dispatch; hashable.

  Attributes:
    short: positions that are read of all slots.
    long: positions that are read of the longest slots.
    count: how many these are.
  """

  short: int
  long: int
  count: int


def splits(lengths: Sequence[int], slots: int, max_positions: float) -> list[Split]:
  """All splits that decoding may have: a program is compiled for each that is used.

  Their lengths are every other one of `attend_buckets`, which about double, and their counts an
  eighth and a half of the slots: of 10 lengths 20 splits.

  Args:
    lengths: of `attend_buckets`.
    slots: of a dispatch.
    max_positions: for whose copy there is memory.
  """
  coarse = list(lengths)[::-2][::-1]
  counts = sorted({n for n in (max(slots // 8, 1), slots // 2) if 0 < n < slots})
  found = [
    Split(short, long, count) for long in coarse for short in coarse if short < long
    for count in counts]
  return [s for s in found if _positions(s, slots) <= max_positions]


def choose(
  own: Sequence[int], whole: int, found: Sequence[Split], steps: int, copied: bool
) -> Split | None:
  """The split that reads the fewest positions; None where it would save too little.

  Args:
    own: tokens of each slot; 0 of one at rest.
    whole: positions that are read of every slot without a split.
    found: of `splits`.
    steps: of the dispatch.
    copied: whether these positions are copied first, as those of a split are: as much as 2 steps.
  """
  order = np.sort(np.asarray(own))[::-1]
  fit = [s for s in found if s.long >= order[0] and s.short >= order[s.count]]
  best = min(fit, key=lambda s: _positions(s, len(order)), default=None)
  if best is None:
    return None
  cost = (steps + 2) * _positions(best, len(order))
  plain = (steps + 2 * copied) * whole * len(order)
  return best if cost <= (1 - _MIN_SAVED) * plain else None


def _positions(split: Split, slots: int) -> int:
  return slots * split.short + split.count * (split.long - split.short)
