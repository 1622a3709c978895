"""What an evaluation of experience retrieval compares (arXiv 2603.18272, its tables 1 and 4).

A row is written POLICY or POLICY+CONDITION, and is played on the easy and on the hard split:

  frozen               the model as it is
  lora                 trained on demonstrations without a memory
  exprag_lora          trained with a memory in every context
  exprag_lora_dropout  likewise, with retrieval dropout
  distilled            trained on what the teacher solved, its memory removed

  matched              the index of the split's own training tasks
  mismatched           the other split's
  all                  both in one index
  random               matched, drawn by chance: the control of whether retrieval matters
  growing              starts empty; what was played joins it
  (none)               an empty index: no memory
"""

import dataclasses
from collections.abc import Sequence

from data import errors

POLICIES = ('frozen', 'lora', 'exprag_lora', 'exprag_lora_dropout', 'distilled')
CONDITIONS = ('matched', 'mismatched', 'all', 'random', 'growing')
SPLITS = ('easy', 'hard')


@dataclasses.dataclass(frozen=True)
class Row:
  """One policy with one index on one split.

  Attributes:
    split: 'easy' or 'hard'.
    policy: one of `POLICIES`.
    condition: one of `CONDITIONS`, or 'empty'.
  """

  split: str
  policy: str
  condition: str = 'empty'

  @property
  def name(self) -> str:
    """As it is written in a config."""
    return self.policy if self.condition == 'empty' else f'{self.policy}+{self.condition}'

  @property
  def id(self) -> str:
    return f'{self.split}/{self.name}'

  @property
  def bank(self) -> str:
    """The bank that the condition retrieves from; '' is none."""
    if self.condition == 'mismatched':
      return next(split for split in SPLITS if split != self.split)
    if self.condition in ('empty', 'growing'):
      return ''
    return 'all' if self.condition == 'all' else self.split


def parse(text: str) -> list[Row]:
  """Reads a comma list of rows, each for both splits.

  Raises:
    errors.UserError: a row that has no meaning, one given twice, or none.
  """
  names = [part.strip() for part in text.split(',') if part.strip()]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise errors.UserError(f'evaluate names {", ".join(twice)} twice.')
  if not names:
    raise errors.UserError('evaluate names no row.')
  rows = []
  for split in SPLITS:
    for name in names:
      policy, plus, condition = name.partition('+')
      if policy not in POLICIES or (plus and condition not in CONDITIONS):
        raise errors.UserError(
          f'evaluate has {name!r}; a row is POLICY or POLICY+CONDITION with a policy of '
          f'{", ".join(POLICIES)} and a condition of {", ".join(CONDITIONS)}.')
      rows.append(Row(split, policy, condition or 'empty'))
  return rows


def pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
  """The differences that are reported, as (a, b) for a minus b, within each split.

  ExpRAG-LoRA against the other policies; every index of a policy against its matched one turned
  round: what a worse index costs; retrieval dropout against none in each condition; the student
  against LoRA and against its teacher.
  """
  ids = {row.id for row in rows}
  wanted = []
  for split in SPLITS:
    for trained in ('exprag_lora', 'exprag_lora_dropout'):
      best = f'{split}/{trained}+matched'
      wanted += [(best, f'{split}/{other}') for other in (
        'lora', 'lora+matched', 'frozen+matched', 'frozen')]
    for policy in POLICIES:
      best = f'{split}/{policy}+matched'
      wanted += [(best, f'{split}/{policy}+{other}') for other in CONDITIONS[1:]]
      wanted.append((best, f'{split}/{policy}'))
    for condition in ('', *(f'+{name}' for name in CONDITIONS)):
      wanted.append(
        (f'{split}/exprag_lora_dropout{condition}', f'{split}/exprag_lora{condition}'))
    wanted += [(f'{split}/distilled', f'{split}/{other}') for other in (
      'lora', 'exprag_lora+matched', 'exprag_lora_dropout+matched', 'frozen+matched')]
  return list(dict.fromkeys(pair for pair in wanted if set(pair) <= ids))


def headline(pair: tuple[str, str]) -> bool:
  """Whether a difference is one of the method's claims, and not only of the record."""
  a, b = (name.partition('/')[2] for name in pair)
  return (b == 'lora' and a != 'lora+matched') or (
    a.startswith('exprag_lora_dropout') and a.replace('_dropout', '') == b)


def matrix(rates: dict[str, float]) -> str:
  """Success in % by policy and condition, as text for a terminal; one block a split.

  Args:
    rates: row id -> success rate.
  """
  columns = ('matched', 'mismatched', 'empty', 'all', 'random', 'growing')
  there = {name.partition('+')[2] or 'empty' for name in rates}
  used = [column for column in columns if column in there]
  lines = []
  for split in SPLITS:
    lines.append(f'{split:<22}' + ''.join(f'{column:>12}' for column in used))
    for policy in POLICIES:
      cells = []
      for column in used:
        name = f'{split}/{policy}' + ('' if column == 'empty' else f'+{column}')
        cells.append(f'{100 * rates[name]:.1f}' if name in rates else '')
      if any(cells):
        lines.append(f'  {policy:<20}' + ''.join(f'{cell:>12}' for cell in cells))
  return '\n'.join(lines)


def collapse(rates: dict[str, float]) -> dict[str, dict[str, float]]:
  """What an empty and a mismatched index cost, in success rate, by split and trained policy.

  Args:
    rates: row id -> success rate.

  Returns:
    '{split}/{policy}' -> {'empty': matched minus empty, 'mismatched': matched minus mismatched}.
  """
  costs: dict[str, dict[str, float]] = {}
  for split in SPLITS:
    for policy in POLICIES:
      own = f'{split}/{policy}'
      for condition, other in (('empty', own), ('mismatched', f'{own}+mismatched')):
        if f'{own}+matched' in rates and other in rates:
          costs.setdefault(own, {})[condition] = rates[f'{own}+matched'] - rates[other]
  return costs
