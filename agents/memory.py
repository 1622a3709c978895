"""The memory block: what retrieval found, as text for the prompt.

A kind of memory is one renderer: a function from what was retrieved to text. Hints are one bullet
each; three of them, with the header, are 60 to 100 tokens.
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
  """What one episode remembers, chosen once at its start.

  Attributes:
    kind: a key of `RENDERERS`, or 'none'.
    retrieved: dicts of 'id', 'score' and 'text', best first.
    retrieval_tokens: tokens that the retriever itself read for this episode.
  """

  kind: str = 'none'
  retrieved: tuple[dict[str, Any], ...] = ()
  retrieval_tokens: int = 0

  def block(self, layout: str = 'default') -> str:
    """The block's text for a layout of `agents.prompts`; '' where nothing was retrieved."""
    if self.kind == 'none' or not self.retrieved:
      return ''
    return RENDERERS[self.kind]([r['text'] for r in self.retrieved], layout)


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


def render_hints(texts: Sequence[str], layout: str) -> str:
  """Header and one bullet a hint."""
  return '\n'.join([_HINT_HEADERS[layout], *(f'- {" ".join(text.split())}' for text in texts)])


RENDERERS: dict[str, Callable[[Sequence[str], str], str]] = {'hints': render_hints}


def check_kind(kind: str) -> None:
  """Raises errors.UserError unless `kind` is 'none' or has a renderer."""
  if kind != 'none' and kind not in RENDERERS:
    raise errors.UserError(
      f'There is no memory {kind!r}; there are none, {", ".join(RENDERERS)}.')


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
