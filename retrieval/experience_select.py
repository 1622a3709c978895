"""Which K experiences a task gets, and the text they take in the prompt (arXiv 2603.18272).

What was played on the task itself is never among them: leave-one-out by task instance holds for
every selection, since an index may hold the queried task whenever it was made from the split that
is played.

Axis legend: Q queries, N experiences.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from data import errors
from retrieval import experience as experience_lib
from retrieval import experience_index, hint_rules

OUTCOMES = ('all', 'success', 'failure')
ORDERS = ('best_first', 'best_last')
# Candidates that diversity chooses from, for each one wanted.
_POOL = 8


@dataclasses.dataclass(frozen=True)
class Query:
  """What is known of a task when experiences are chosen for it.

  Attributes:
    task_id: the instance; everything that was played on it is left out.
    task_type, instruction: of the task.
    history: for dynamic retrieval, task and history so far (`experience.flat_text`).
  """

  task_id: str
  task_type: str
  instruction: str
  history: str = ''

  def text(self, query: str) -> str:
    """What is compared with the keys of `experience_index.key_text`."""
    return hint_rules.bare_instruction(self.instruction) if query == 'static' else self.history

  @property
  def group(self) -> tuple[str, str]:
    return experience_lib.group_of(self.task_type, self.instruction)


@dataclasses.dataclass(frozen=True)
class Rules:
  """How experiences are chosen.

  Attributes:
    k: experiences a prompt; fewer where the index has fewer, or the budget takes fewer.
    outcomes: 'all', 'success' or 'failure'.
    same_type: only of the queried task's type.
    diversity: weight of maximal marginal relevance (Carbonell and Goldstein 1998), 0..1: each next
      experience loses this share of its likeness to those already chosen; 0 takes the nearest.
    order: of the block: 'best_first' or 'best_last'.
    format: storage format, a key of `experience.FORMATS`.
    max_tokens: of the rendered experiences together; 0 is no limit.
    seed: of the method 'random'.
  """

  k: int = 2
  outcomes: str = 'all'
  same_type: bool = False
  diversity: float = 0.0
  order: str = 'best_first'
  format: str = 'chat'
  max_tokens: int = 0
  seed: int = 0

  def __post_init__(self):
    experience_lib.get_format(self.format)
    if self.outcomes not in OUTCOMES:
      raise errors.UserError(f'outcomes is {", ".join(OUTCOMES)}, not {self.outcomes!r}.')
    if self.order not in ORDERS:
      raise errors.UserError(f'block_order is {" or ".join(ORDERS)}, not {self.order!r}.')
    if not 0 <= self.diversity < 1:
      raise errors.UserError(f'diversity lies in 0..1 (1 excluded), not {self.diversity}.')
    if self.k < 0 or self.max_tokens < 0:
      raise errors.UserError('k and memory_tokens must not be negative.')


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """One chosen experience; `score` is comparable within one method only."""

  experience: experience_lib.Experience
  score: float
  text: str


@dataclasses.dataclass(frozen=True)
class Selection:
  """The experiences of one prompt, in the order of the block.

  Attributes:
    experiences: at most k.
    dropped: how many more were among the k nearest and did not fit into the budget.
    retrieval_tokens: tokens that the encoder read to choose them.
  """

  experiences: tuple[Retrieved, ...] = ()
  dropped: int = 0
  retrieval_tokens: int = 0


def select_many(
  queries: Sequence[Query],
  index: experience_index.ExperienceIndex,
  rules: Rules,
  count_tokens: Callable[[str], int],
) -> list[Selection]:
  """Chooses the experiences of every query, embedding all of them in one batch.

  Args:
    queries: Q tasks, or Q moments of tasks.
    index: the bank.
    rules: how.
    count_tokens: tokens of a text in the prompt, for the budget.

  Returns:
    Q selections.

  Raises:
    errors.UserError: the most similar experience alone is larger than the budget.
  """
  if not rules.k or not queries or not len(index.bank):
    return [Selection() for _ in queries]
  if index.method == 'random':
    ranked = [(_random(query, index, rules), 0) for query in queries]
  else:
    ranked = _nearest(queries, index, rules)
  return [
    _fit([(index.bank.experiences[n], score) for n, score in chosen], rules, count_tokens, tokens)
    for chosen, tokens in ranked]


def select_other(
  query: Query,
  index: experience_index.ExperienceIndex,
  rules: Rules,
  count_tokens: Callable[[str], int],
) -> Selection:
  """Experiences of other kinds of tasks, drawn by chance: a memory that does not help.

  Args:
    query, index, rules, count_tokens: as for `select_many`; likeness plays no part.
  """
  pool = [
    n for n, e in enumerate(index.bank.experiences)
    if e.group != query.group and _allowed(e, query, rules, any_type=True)]
  chosen = _draw(pool, rules.k, f'other {rules.seed} {query.task_id}')
  return _fit([(index.bank.experiences[n], 0.0) for n in chosen], rules, count_tokens, 0)


def _allowed(experience, query, rules, *, any_type=False) -> bool:
  return (
    experience.task_id != query.task_id
    and rules.outcomes in ('all', experience.outcome)
    and (any_type or not rules.same_type or experience.task_type == query.task_type))


def _draw(pool: Sequence[int], k: int, key: str) -> list[int]:
  digest = hashlib.sha256(key.encode()).digest()
  rng = np.random.default_rng(int.from_bytes(digest[:8], 'big'))
  return [pool[i] for i in rng.permutation(len(pool))[:k]]


def _random(query, index, rules) -> list[tuple[int, float]]:
  pool = [
    n for n, e in enumerate(index.bank.experiences) if _allowed(e, query, rules)]
  return [(n, 0.0) for n in _draw(pool, rules.k, f'random {rules.seed} {query.task_id}')]


def _nearest(queries, index, rules) -> list[tuple[list[tuple[int, float]], int]]:
  """(row of the bank, score) of the chosen ones, best first, and the encoder's tokens.

  An index cannot be asked for what passes a filter: it is asked for more and more until enough of
  what it gives passes, or there is no more.
  """
  experiences = index.bank.experiences
  wanted = rules.k * (_POOL if rules.diversity else 1)
  answers: list = [None] * len(queries)
  left, fetch = list(range(len(queries))), min(len(experiences), 4 * wanted + 8)
  while left:
    ids, scores, tokens = index.search([queries[i].text(index.query) for i in left], fetch)
    short = []
    for i, row, row_scores, count in zip(left, ids.tolist(), scores.tolist(), tokens):
      found = [
        (n, s) for n, s in zip(row, row_scores) if _allowed(experiences[n], queries[i], rules)]
      if len(found) < wanted and fetch < len(experiences):
        short.append(i)
        continue
      chosen = _diverse(found[:wanted], index, rules) if rules.diversity else found[:rules.k]
      answers[i] = (chosen, count)
    left, fetch = short, min(len(experiences), 8 * fetch)
  return answers


def _diverse(
  found: list[tuple[int, float]], index: experience_index.ExperienceIndex, rules: Rules
) -> list[tuple[int, float]]:
  """Maximal marginal relevance among what was found (best first).

  Relevance is scaled so that the best one has 1: BM25's scores have no scale of their own.
  """
  if not found:
    return []
  top = max(abs(found[0][1]), 1e-9)
  rows = [n for n, _ in found]
  relevance = np.array([score / top for _, score in found])
  nearest = np.zeros(len(found))
  left, chosen = list(range(len(found))), []
  while left and len(chosen) < rules.k:
    value = (1 - rules.diversity) * relevance - rules.diversity * nearest
    best = max(left, key=lambda i: (value[i], -i))
    left.remove(best)
    chosen.append(found[best])
    nearest = np.maximum(nearest, index.similarity(rows[best], rows))
  return chosen


def _fit(
  chosen: list[tuple[experience_lib.Experience, float]], rules: Rules,
  count_tokens: Callable[[str], int], tokens: int,
) -> Selection:
  """Renders, drops the last (least similar) ones whole until the budget holds, and orders."""
  render = experience_lib.get_format(rules.format)
  found = [Retrieved(e, float(score), render(e)) for e, score in chosen]
  dropped = 0
  if rules.max_tokens:
    sizes = [count_tokens(one.text) for one in found]
    if sizes and sizes[0] > rules.max_tokens:
      raise errors.UserError(
        f'The experience {found[0].experience.id} takes {sizes[0]} tokens as {rules.format}, more '
        f'than memory_tokens={rules.max_tokens}; raise memory_tokens to that, or choose a shorter '
        'experience_format.')
    while sum(sizes) > rules.max_tokens:
      sizes.pop()
      dropped += 1
    found = found[:len(sizes)]
  if rules.order == 'best_last':
    found.reverse()
  return Selection(tuple(found), dropped, tokens)
