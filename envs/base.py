"""What every environment looks like to an agent: tasks, environments, suites."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data.errors import UserError

SUITES = ('household',)


@dataclasses.dataclass(frozen=True)
class Task:
  """One instance of a task.

  Attributes:
    id: unique name of the instance, stable between runs (split/TASK/TRIAL).
    env: name of the suite that made it.
    split: name of the split it belongs to.
    task_type: family of the task; retrieval and prompts are keyed by it.
    instruction: the goal as a sentence, nothing else.
    payload: what the suite needs to make the environment; JSON types only.
  """

  id: str
  env: str
  split: str
  task_type: str
  instruction: str
  payload: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class StepResult:
  """What one action brought.

  Attributes:
    observation: the environment's answer.
    reward: score of the step, 0..1.
    done: the episode is over.
    won: the goal is reached.
    valid: the action was understood and had its effect.
    changed: the world moved, or the observation is new in this episode; False is a no-op.
  """

  observation: str
  reward: float
  done: bool
  won: bool
  valid: bool
  changed: bool


@dataclasses.dataclass(frozen=True)
class Decision:
  """A scripted expert's move: an action and the one sentence that explains it."""

  action: str
  thought: str


class Environment(Protocol):
  """One running task instance."""

  def reset(self) -> str:
    """Starts the episode and returns the first observation (without the goal)."""

  def step(self, action: str) -> StepResult:
    """Performs one action."""

  def admissible_commands(self) -> list[str]:
    """All commands that have an effect now, sorted."""


class ScriptedExpert(Protocol):
  """Plays one episode from observations alone."""

  def act(self, observation: str) -> Decision:
    """Takes the newest observation and returns the next move."""


class Suite(Protocol):
  """A family of tasks in splits."""

  name: str
  splits: Sequence[str]
  action_templates: list[str]

  def tasks(self, split: str) -> list[Task]:
    """All tasks of a split, in a fixed order."""

  def make(self, task: Task) -> Environment:
    """The environment of a task, not yet reset."""

  def expert(self, task: Task, known_rules: Sequence[Any] = (), **options) -> ScriptedExpert:
    """A scripted expert for one episode of a task."""


def get_suite(name: str, data: str = 'generated', **options: Any) -> Suite:
  """Makes a suite.

  Args:
    name: one of `SUITES`.
    data: folder with the environment's data, or 'generated'.
    **options: keywords of the suite's class.

  Returns:
    The suite; its tasks are generated or read when they are asked for.

  Raises:
    UserError: an unknown suite or option (the sentence lists the near ones), or a bad value.
  """
  if name not in SUITES:
    raise UserError(f'Unknown environment {name!r}; there is {", ".join(SUITES)}.')
  # Suites import this module, and an optional package is wanted only by those who use it.
  from envs.household_suite import HouseholdSuite

  known = list(inspect.signature(HouseholdSuite).parameters)[1:]
  for key in options:
    if key not in known:
      near = difflib.get_close_matches(key, known, 3) or known
      raise UserError(f'Unknown option {key!r} of {name}; near: {", ".join(near)}.')
  return HouseholdSuite(data, **options)
