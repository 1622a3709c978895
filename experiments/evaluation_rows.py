"""What an evaluation of hint distillation compares: rows, and the differences between them.

A row is written POLICY, or POLICY+MEMORY, or POLICY+MEMORY@K:

  base  sft  distilled     who plays: the start of both students, or one of them
  hints                    with the run's bank, chosen as its config says
  random  fixed            with the run's bank, chosen without looking at the task: controls
  self-hints ...           with another writer's bank over the same failures (WRITER-hints)
  @6                       six hints in place of the config's k
"""

import dataclasses
from collections.abc import Sequence

from data import errors
from retrieval import hints as hints_lib

POLICIES = ('base', 'sft', 'distilled')
CONTROLS = ('random', 'fixed')
_WRITER_SUFFIX = '-hints'


@dataclasses.dataclass(frozen=True)
class Row:
  """One policy under one condition.

  Attributes:
    id: as it was written.
    policy: one of `POLICIES`.
    memory: 'none' or 'hints'.
    retrieval: of the hints; '' is the config's.
    k: hints; 0 is the config's.
    writer: of the bank; '' is the config's.
  """

  id: str
  policy: str
  memory: str = 'none'
  retrieval: str = ''
  k: int = 0
  writer: str = ''


def parse(text: str) -> list[Row]:
  """Reads a comma list of rows.

  Raises:
    errors.UserError: a row that has no meaning, one given twice, or no row 'base', with which all
      others are compared.
  """
  rows = [_parse_row(part.strip()) for part in text.split(',') if part.strip()]
  ids = [row.id for row in rows]
  if twice := sorted({i for i in ids if ids.count(i) > 1}):
    raise errors.UserError(f'evaluate names {", ".join(twice)} twice.')
  if 'base' not in ids:
    raise errors.UserError('evaluate needs the row base: all others are compared with it.')
  return rows


def _parse_row(text: str) -> Row:
  policy, plus, memory = text.partition('+')
  memory, at, k = memory.partition('@')
  row = Row(text, policy)
  if plus:
    row = dataclasses.replace(row, memory='hints')
  if memory in CONTROLS:
    row = dataclasses.replace(row, retrieval=memory)
  elif memory.endswith(_WRITER_SUFFIX):
    row = dataclasses.replace(row, writer=memory.removesuffix(_WRITER_SUFFIX))
  elif plus and memory != 'hints':
    policy = ''
  if at and k.isdecimal() and int(k) > 0:
    row = dataclasses.replace(row, k=int(k))
  elif at:
    policy = ''
  if at and not plus:
    policy = ''
  if policy not in POLICIES or row.writer not in ('', *hints_lib.WRITERS):
    raise errors.UserError(
      f'evaluate has {text!r}; a row is POLICY, POLICY+MEMORY or POLICY+MEMORY@K with a policy of '
      f'{", ".join(POLICIES)} and a memory of hints, {", ".join(CONTROLS)}, '
      f'{", ".join(name + _WRITER_SUFFIX for name in hints_lib.WRITERS)}.')
  return row


def pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
  """The differences that are reported, as (a, b) for a minus b.

  Every row against base; a row with a memory against the same policy without; the hints against
  what else base was given; the student of the teacher against its teacher and the other student.
  """
  ids = [row.id for row in rows]
  wanted = [(row.id, 'base') for row in rows if row.id != 'base']
  wanted += [(row.id, row.policy) for row in rows if row.memory != 'none' and row.policy != 'base']
  wanted += [('base+hints', row.id) for row in rows
             if row.policy == 'base' and row.memory != 'none' and row.id != 'base+hints']
  wanted += [('distilled', 'sft'), ('distilled', 'base+hints')]
  return list(dict.fromkeys(p for p in wanted if set(p) <= set(ids)))
