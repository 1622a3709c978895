"""Packing of examples into rows, and batches of rows that a counter alone determines.

Axes: R rows of the data set, B rows of a micro-batch, A micro-batches of a step, T tokens of a row,
G shards of a micro-batch, M loss tokens of a shard.
"""

import bisect
import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

# Lengths of rows that are tried: multiples of STEP up to WIDEST times the longest example's, until
# rows are filled to FULL.
STEP, WIDEST, FULL = 128, 8, 0.95


@dataclasses.dataclass(frozen=True)
class Example:
  """One training sequence.

  Attributes:
    tokens: int32 [n].
    loss_mask: bool [n], True for tokens whose prediction is trained. The first token of a sequence
      has nothing that predicts it and never counts.
    id: of the episode it comes from.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  id: str


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows.

  Attributes:
    tokens: int32 [R, T], 0 in the padding.
    segment_ids: int32 [R, T], 1, 2, ... within a row, 0 is padding.
    positions: int32 [R, T], counted within each segment.
    loss_mask: bool [R, T], on the tokens that are predicted.
    num_examples: examples that were packed.
    too_long: ids of the examples longer than a row, which were left out.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  loss_mask: np.ndarray
  num_examples: int
  too_long: tuple[str, ...]

  @property
  def num_rows(self) -> int:
    return self.tokens.shape[0]

  @property
  def num_tokens(self) -> int:
    """Tokens that are not padding."""
    return int((self.segment_ids > 0).sum())

  @property
  def num_loss_tokens(self) -> int:
    return int(self.loss_mask.sum())

  @property
  def context(self) -> float:
    """Keys that a token reads, on average: those of its segment up to itself."""
    used = self.segment_ids > 0
    return float((self.positions[used] + 1).mean()) if used.any() else 0.0

  @property
  def efficiency(self) -> float:
    """Share of the rows' places that hold a token, 0 to 1."""
    return self.num_tokens / max(1, self.tokens.size)

  def digest(self) -> str:
    """Names the packed data: a resumed run must see the same rows."""
    digest = hashlib.sha256(repr(self.tokens.shape).encode())
    for array in (self.tokens, self.segment_ids, self.loss_mask):
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _assign(lengths: Sequence[int], row_len: int) -> list[list[int]]:
  """Best-fit decreasing: longest first, each into the fullest row that still takes it.

  Args:
    lengths: of examples; those of 0 or above `row_len` are in no row.
    row_len: places of a row.

  Returns:
    The indices in each row. Ties go by their order and that of the rows.
  """
  rows: list[list[int]] = []
  spaces: list[tuple[int, int]] = []  # (free places, row), sorted
  fitting = [i for i, length in enumerate(lengths) if 0 < length <= row_len]
  for index in sorted(fitting, key=lambda i: -lengths[i]):
    found = bisect.bisect_left(spaces, (lengths[index], -1))
    if found == len(spaces):
      rows.append([])
      free, row = row_len, len(rows) - 1
    else:
      free, row = spaces.pop(found)
    rows[row].append(index)
    bisect.insort(spaces, (free - lengths[index], row))
  return rows


def choose_row_len(lengths: Sequence[int], limit: int) -> int:
  """The shortest row of a few that holds the longest example and is filled to FULL.

  What a row wastes is what is left when no whole example fits any more: rows of twice or three
  times the usual length waste a third to a half, where the lengths differ little.

  Args:
    lengths: of the examples, at least one of them positive.
    limit: tokens that the model's context holds; no row is longer.

  Returns:
    A multiple of 128, or `limit`; that which packs best where none is filled so far.
  """
  longest = -(-max(lengths) // STEP) * STEP
  found = {}
  for row_len in range(min(longest, limit), min(WIDEST * longest, limit) + 1, STEP):
    rows = _assign(lengths, row_len)
    placed = sum(lengths[i] for row in rows for i in row)
    found[row_len] = placed / max(1, len(rows) * row_len)
    if found[row_len] >= FULL:
      return row_len
  return max(found, key=found.get)


def pack(examples: Sequence[Example], row_len: int) -> Rows:
  """Packs examples into rows, `_assign` says how; deterministic.

  Args:
    examples: any number, of any lengths; empty ones are not packed.
    row_len: T.

  Returns:
    Rows; examples longer than a row are left out and listed.
  """
  too_long = tuple(e.id for e in examples if len(e.tokens) > row_len)
  rows = [[examples[i] for i in row] for row in _assign([len(e.tokens) for e in examples], row_len)]

  shape = (len(rows), row_len)
  tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
  loss_mask = np.zeros(shape, bool)
  for row, members in enumerate(rows):
    start = 0
    for segment, example in enumerate(members, 1):
      length = len(example.tokens)
      place = slice(start, start + length)
      tokens[row, place] = example.tokens
      segment_ids[row, place] = segment
      positions[row, place] = np.arange(length)
      loss_mask[row, place] = example.loss_mask
      loss_mask[row, start] = False
      start += length
  return Rows(tokens, segment_ids, positions, loss_mask, sum(map(len, rows)), too_long)


class Batches:
  """The batches of a run; batch `step` depends on (rows, seed, step) and nothing else.

  Every epoch visits all rows once in an order of its own; an epoch's last batch is filled up with
  empty rows. The head is computed for loss tokens only, a static number of them: `loss_budget` is
  the largest number in any shard of any batch of the run.
  """

  def __init__(
    self,
    rows: Rows,
    *,
    batch_rows: int,
    grad_accum: int = 1,
    epochs: float = 1.0,
    seed: int = 0,
    num_shards: int = 1,
    budget_multiple: int = 32,
  ):
    """Plans the run.

    Args:
      rows: the packed data, at least one row.
      batch_rows: B, rows of a micro-batch.
      grad_accum: A, micro-batches of a step.
      epochs: passes over the rows; a fraction is rounded up to a whole step.
      seed: of the orders.
      num_shards: G, shards of a micro-batch's rows; divides B.
      budget_multiple: the loss budget is rounded up to it.
    """
    if batch_rows % num_shards:
      raise ValueError(f'{batch_rows} rows do not divide into {num_shards} shards.')
    self._rows, self._seed = rows, seed
    self._shape = (grad_accum, batch_rows)
    self.num_shards = num_shards
    self.steps_per_epoch = math.ceil(rows.num_rows / (batch_rows * grad_accum))
    self.num_steps = math.ceil(epochs * self.steps_per_epoch - 1e-9)
    self._order = (-1, np.zeros(0, np.int64))
    # One more, empty, row to fill up with.
    per_row = np.append(rows.loss_mask.sum(axis=1), 0)
    self._row_tokens = np.append((rows.segment_ids > 0).sum(axis=1), 0)
    most, self.num_tokens, self.num_loss_tokens = 0, 0, 0
    for step in range(self.num_steps):
      picked = self._pick(step)
      most = max(most, int(per_row[picked].reshape(grad_accum, num_shards, -1).sum(-1).max()))
      self.num_tokens += self.tokens_in(step)
      self.num_loss_tokens += int(per_row[picked].sum())
    self.loss_budget = max(1, math.ceil(most / budget_multiple)) * budget_multiple

  def _pick(self, step: int) -> np.ndarray:
    """Row indices [A, B] of a step; `num_rows` stands for the empty row."""
    epoch, place = divmod(step, self.steps_per_epoch)
    if self._order[0] != epoch:
      order = np.random.default_rng((self._seed, epoch)).permutation(self._rows.num_rows)
      fill = self.steps_per_epoch * math.prod(self._shape) - len(order)
      self._order = (epoch, np.append(order, np.full(fill, self._rows.num_rows)))
    size = math.prod(self._shape)
    return self._order[1][place * size : (place + 1) * size].reshape(self._shape)

  def tokens_in(self, step: int) -> int:
    """Tokens of a step that are not padding."""
    return int(self._row_tokens[self._pick(step)].sum())

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    """The batch of a step, 0 <= step < num_steps.

    Returns:
      int32 [A, B, T] 'tokens', 'segment_ids', 'positions'; and of the loss tokens [A, G, M]:
      int32 'loss_index' (the place that predicts it, within the shard's B / G * T places), int32
      'loss_target', float32 'loss_weight' (0 in the unused part of the budget).
    """
    parts = [self.part(step, shard) for shard in range(self.num_shards)]
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}

  def part(self, step: int, shard: int) -> dict[str, np.ndarray]:
    """What one shard gets of the batch: [A, B / G, T] and [A, 1, M]; no other row is made."""
    accum = self._shape[0]
    picked = self._pick(step).reshape(accum, self.num_shards, -1)[:, shard]
    row = np.minimum(picked, self._rows.num_rows - 1)
    real = (picked < self._rows.num_rows)[..., None]
    batch = {
      name: np.where(real, getattr(self._rows, name)[row], 0)
      for name in ('tokens', 'segment_ids', 'positions')
    }
    mask = np.where(real, self._rows.loss_mask[row], False).reshape(accum, -1)
    tokens = batch['tokens'].reshape(accum, -1)
    index, target = (np.zeros((accum, 1, self.loss_budget), np.int32) for _ in range(2))
    weight = np.zeros(index.shape, np.float32)
    for a in range(accum):
      found = np.flatnonzero(mask[a])
      # The place before a loss token is in its own segment: a first token never counts.
      index[a, 0, : len(found)] = found - 1
      target[a, 0, : len(found)] = tokens[a, found]
      weight[a, 0, : len(found)] = 1.0
    return batch | {'loss_index': index, 'loss_target': target, 'loss_weight': weight}
