"""The memory block: what retrieval found, as text for the prompt.

A kind of memory is one renderer: a function from what was retrieved to text. Hints are one bullet
each; three of them, with the header, are 60 to 100 tokens. Experiences are whole past episodes
(`agents.experience_memory` chooses them), the solved ones apart from the failed ones. Both can
stand in one block.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from data import errors
from data import text as text_lib
from envs.base import FAULTS, Suite, Task
from retrieval import hints as hints_lib
from retrieval import select as select_lib


@dataclasses.dataclass(frozen=True)
class Memory:
  """What one episode remembers.

  Attributes:
    kind: one of `KINDS`.
    retrieved: dicts of 'id', 'score' and 'text', in the order of the block; an experience's has
      'outcome' and 'provenance', too.
    retrieval_tokens: tokens that the retriever itself read for it.
    dropped: experiences that were left out because the block's budget was full.
  """

  kind: str = 'none'
  retrieved: tuple[dict[str, Any], ...] = ()
  retrieval_tokens: int = 0
  dropped: int = 0

  def block(self, layout: str = 'default') -> str:
    """The block's text for a layout of `agents.prompts`; '' where nothing was retrieved."""
    parts = []
    for kind in self.kind.split('+'):
      if found := [r for r in self.retrieved if is_experience(r) == (kind == 'experience')]:
        parts.append(RENDERERS[kind](found, layout))
    return '\n\n'.join(parts)

  def __add__(self, other: 'Memory') -> 'Memory':
    """Both in one block; hints stand before experiences."""
    kinds = [kind for kind in RENDERERS if kind in (*self.kind.split('+'), *other.kind.split('+'))]
    return Memory(
      '+'.join(kinds) or 'none', self.retrieved + other.retrieved,
      self.retrieval_tokens + other.retrieval_tokens, self.dropped + other.dropped)


def is_experience(retrieved: dict[str, Any]) -> bool:
  """Whether what was retrieved is an experience and no hint."""
  return bool(retrieved.get('outcome'))


NO_MEMORY = Memory()

# Paper A's block tells the agent how to treat its hints; the short header is for models that were
# trained on it, where every token of instruction is paid for in every episode.
_HINT_HEADERS = {
  'default': 'Hints:',
  'paper_a': (
    'Rules learnt from earlier attempts. Apply them silently, without naming them. Where a rule '
    'conflicts with what you observe, go by the observation.'),
  'paper_b': 'Hints:',
}
_SHORT_OUTCOMES = {'success': 'Solved before:', 'failure': 'Failed before:'}
_EXPERIENCE_HEADERS = {
  'default': _SHORT_OUTCOMES,
  'paper_a': _SHORT_OUTCOMES,
  'paper_b': {
    'success': 'Earlier attempts at similar tasks that succeeded:',
    'failure': 'Earlier attempts at similar tasks that failed:'},
}


def render_hints(found: Sequence[dict[str, Any]], layout: str) -> str:
  """Header and one bullet a hint."""
  return '\n'.join([_HINT_HEADERS[layout], *(f'- {" ".join(r["text"].split())}' for r in found)])


def render_experiences(found: Sequence[dict[str, Any]], layout: str) -> str:
  """The successes under their header, then the failures under theirs."""
  parts = []
  for outcome, header in _EXPERIENCE_HEADERS[layout].items():
    if texts := [r['text'] for r in found if r['outcome'] == outcome]:
      parts.append('\n\n'.join([f'{header}\n{texts[0]}', *texts[1:]]))
  return '\n\n'.join(parts)


RENDERERS: dict[str, Callable[[Sequence[dict[str, Any]], str], str]] = {
  'hints': render_hints, 'experience': render_experiences}
KINDS = ('none', *RENDERERS, '+'.join(RENDERERS))


def check_kind(kind: str) -> None:
  """Raises errors.UserError unless `kind` is one of `KINDS`."""
  if kind not in KINDS:
    raise errors.UserError(f'There is no memory {kind!r}; there are {", ".join(KINDS)}.')


def hints(texts: Sequence[str]) -> Memory:
  """A memory of given hints, not retrieved from a bank (expert episodes of the warm start)."""
  return Memory('hints', tuple(
    {'id': f'given-{i}', 'score': 0.0, 'text': text} for i, text in enumerate(texts)))


def load_index(
  bank: str | os.PathLike, method: str, vectors_path: str | os.PathLike | None = None
) -> select_lib.HintIndex:
  """Loads a hint bank and, for 'minilm', the sentence encoder.

  Args:
    bank: the JSON that `retrieval.hints` wrote.
    method: one of `retrieval.select.METHODS`.
    vectors_path: .npz that keeps the hints' vectors between runs.

  Raises:
    errors.UserError: no bank there, a broken one, an unknown method, or no encoder to be had.
  """
  if method not in select_lib.METHODS:
    raise errors.UserError(
      f'There is no hint retrieval {method!r}; there are {", ".join(select_lib.METHODS)}.')
  loaded = hints_lib.HintBank.load(bank)
  if method != 'minilm':
    return select_lib.HintIndex(loaded)
  # Imported here: only this method needs the encoder and its weights.
  from models import encoder, pretrained
  return select_lib.HintIndex(
    loaded, encoder.load_encoder(pretrained.fetch('minilm')), vectors_path=vectors_path)


def retrieve_hints(
  index: select_lib.HintIndex,
  suite: Suite,
  tasks: Sequence[Task],
  k: int,
  *,
  method: str = 'minilm',
  leave_one_out: bool = True,
  seed: int = 0,
) -> dict[str, Memory]:
  """Chooses the hints of every task of a run, once, from instruction and first observation.

  All queries are embedded in one batch, so the environments are reset here and again at play. A
  game that does not start is left out; playing it counts it (env_error).

  Args:
    index: the bank.
    suite: makes the environments that give the first observations.
    tasks: those to play.
    k: hints per task; a task gets fewer where its type has fewer.
    method: one of `retrieval.select.METHODS`.
    leave_one_out: leave out hints that only this task's own failure taught. Mandatory where the
      bank was made from the split that is played.
    seed: of the method 'random'.

  Returns:
    Task id -> memory; empty memories where the bank knows nothing of the type.
  """
  queries = []
  for task in tasks:
    start = _first_observation(suite, task)
    if start is not None:
      queries.append(select_lib.Query(
        text_lib.valid(task.instruction), start, task.task_type, task.id))
  selections = select_lib.select_many(
    queries, index, k, method=method, seed=seed,
    exclude_task_ids=[query.task_id if leave_one_out else None for query in queries])
  return {
    query.task_id: Memory(
      'hints', tuple(dataclasses.asdict(hint) for hint in selection.hints),
      selection.retrieval_tokens)
    for query, selection in zip(queries, selections)}


def _first_observation(suite: Suite, task: Task) -> str | None:
  """What the game says at its start, None for one that does not start."""
  environment = None
  try:
    environment = suite.make(task)
    return text_lib.valid(environment.reset())
  except errors.UserError:
    raise
  except FAULTS:
    return None
  finally:
    with contextlib.suppress(*FAULTS):
      if close := getattr(environment, 'close', None):
        close()
