"""Experiences in an agent's memory: retrieved once or at every step, beside hints, and growing.

  static   the K experiences of a task are chosen before it starts, all tasks in one batch;
  dynamic  they are chosen anew before every call, by task and history so far; the prompt is
           rendered again only where that changed what was found.
"""

import dataclasses
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from agents import episode as episode_lib
from agents import memory as memory_lib
from agents import prompts
from data import errors, trajectory
from data.tokenizer import Tokenizer
from envs.base import Suite, Task
from retrieval import experience as experience_lib
from retrieval import experience_index, experience_select


def memory_of(selection: experience_select.Selection) -> memory_lib.Memory:
  """A selection as what an episode remembers and records."""
  return memory_lib.Memory(
    'experience',
    tuple({'id': r.experience.id, 'score': r.score, 'text': r.text,
           'outcome': r.experience.outcome,
           'provenance': r.experience.provenance
           + (' (failed on purpose)' if r.experience.on_purpose else '')}
          for r in selection.experiences),
    selection.retrieval_tokens, selection.dropped)


def query_of(task: Task, history: str = '') -> experience_select.Query:
  return experience_select.Query(task.id, task.task_type, task.instruction, history)


def prompt_of(tokenizer: Tokenizer, spec: episode_lib.AgentSpec, suite: Suite) -> str:
  """The `experience.prompt_fingerprint` of episodes that this agent plays."""
  prompt = prompts.render(
    tokenizer, system=prompts.system_for(spec.format, spec.style, suite.action_templates), task='',
    layout=spec.layout)
  system = trajectory.KIND['system']
  return experience_lib.prompt_fingerprint(
    spec.format, [t for t, kind in zip(prompt.tokens, prompt.kinds) if kind == system])


class ExperienceMemory:
  """A bank, how it is asked, and for whom.

  Attributes:
    index: of the bank.
    rules: of the selection.
  """

  def __init__(
    self, index: experience_index.ExperienceIndex, rules: experience_select.Rules,
    tokenizer: Tokenizer, hints: Mapping[str, memory_lib.Memory] | None = None,
  ):
    """Prepares retrieval.

    Args:
      index: of the bank.
      rules: of the selection.
      tokenizer: of the model that reads the block; it counts the budget.
      hints: task id -> hints that stand in the same block, where there are any.
    """
    self.index, self.rules = index, rules
    self._tokenizer = tokenizer
    self._hints = hints or {}

  def _count(self, text: str) -> int:
    return len(self._tokenizer.encode(text))

  def choose(self, tasks: Sequence[Task]) -> dict[str, memory_lib.Memory]:
    """Static: task id -> memory, all queries in one batch."""
    found = experience_select.select_many(
      [query_of(task) for task in tasks], self.index, self.rules, self._count)
    return {
      task.id: self._hints.get(task.id, memory_lib.NO_MEMORY) + memory_of(selection)
      for task, selection in zip(tasks, found)}

  def choose_other(self, task: Task) -> memory_lib.Memory:
    """Experiences of other kinds of tasks: what a mismatched index would give."""
    return memory_of(
      experience_select.select_other(query_of(task), self.index, self.rules, self._count))

  def recall(self, runs: Sequence[episode_lib.EpisodeRun]) -> list[memory_lib.Memory]:
    """Dynamic: the memories of episodes before their next call, in one batch."""
    queries = []
    for run in runs:
      turns = [
        experience_lib.Turn(s.reply, s.action, s.observation, s.changed) for s in run.steps]
      task = prompts.task_text(run.task.instruction, run.first_observation)
      queries.append(query_of(run.task, experience_lib.flat_text(task, turns)))
    found = experience_select.select_many(queries, self.index, self.rules, self._count)
    memories = []
    for run, selection in zip(runs, found):
      memory = memory_of(selection)
      if run.task.id in self._hints:
        # They were chosen once; choosing them cost nothing here.
        hints = dataclasses.replace(self._hints[run.task.id], retrieval_tokens=0)
        memory = hints + memory
      memories.append(memory)
    return memories

  def add(self, episodes: Sequence[trajectory.Episode], source: str) -> int:
    """Takes episodes into bank and index; returns how many were new."""
    new = self.index.bank.add_episodes(episodes, self._tokenizer, source)
    self.index.add(new)
    return len(new)


def load(
  folder: str | pathlib.Path, method: str, query: str, *, keep: bool = True,
  encoder: Any = None, **options: Any,
) -> experience_index.ExperienceIndex:
  """A bank with its index, which is kept in the bank's folder.

  Args:
    folder: of `python -m retrieval.experience`; '' is a bank without any experience yet.
    method, query: as `experience_index.ExperienceIndex` takes them.
    keep: whether the index is read from and written to the folder; a bank that grows with a run
      must not change the folder it came from.
    encoder: one that is loaded already.
    **options: of `retrieval.index.IndexOptions`.

  Raises:
    errors.UserError: no bank, or an index that does not fit.
  """
  experience_index.check(method, query)
  bank = experience_lib.ExperienceBank.load(folder) if folder else experience_lib.ExperienceBank()
  if not keep:
    return experience_index.ExperienceIndex(bank, method, query, encoder, **options)
  place = pathlib.Path(folder) / f'index-{method}-{query}'
  try:
    return experience_index.ExperienceIndex.open(place, bank, method, query, encoder, **options)
  except OSError as error:
    raise errors.UserError(
      f'The index {place} cannot be written ({error.strerror}); free some space, or copy the bank '
      'to a folder of your own.') from None


def task_order(tasks: Sequence[Task], seed: int) -> list[Task]:
  """The tasks in an order that the seed alone determines, for a bank that grows."""
  order = list(tasks)
  random.Random(f'order {seed}').shuffle(order)
  return order


def rules_of(config: Any) -> experience_select.Rules:
  """The selection that a config's keys describe."""
  return experience_select.Rules(
    k=config.experience_k, outcomes=config.outcomes, same_type=config.same_type,
    diversity=config.diversity, order=config.block_order, format=config.experience_format,
    max_tokens=config.memory_tokens, seed=config.seed)
