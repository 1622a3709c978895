"""What every environment looks like to an agent: tasks, environments, suites."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from data.errors import UserError

if TYPE_CHECKING:
  # A tokenizer comes with it, which few environments' processes need.
  from data.replies import Replies, Trie

SUITES = ('household', 'webshop', 'scienceworld')
# What a broken environment may raise: it ends its own episode and not the run. Planners that were
# programs call sys.exit.
FAULTS = (Exception, SystemExit)


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
class Limits:
  """What an environment allows an episode where the agent's own limits say nothing.

  Attributes:
    steps: environment steps.
    repeats: the same reply with the same answer; more where waiting is part of the game.
  """

  steps: int = 50
  repeats: int = 4


class EngineDied(RuntimeError):
  """The program behind an environment died or hangs; a worker that meets it is replaced."""


@dataclasses.dataclass(frozen=True)
class Decision:
  """A scripted expert's move: an action and the one sentence that explains it."""

  action: str
  thought: str


class Environment(Protocol):
  """One running task instance.

  It may have `limits` of its own (`Limits`) and a method `close`.
  """

  def reset(self) -> str:
    """Starts the episode and returns the first observation (without the goal)."""

  def step(self, action: str) -> StepResult:
    """Performs one action."""

  def admissible_commands(self) -> list[str]:
    """All commands that have an effect now, sorted."""

  def command_openings(self) -> list[str]:
    """Beginnings of commands that end in free text; an own environment may go without it."""


class ScriptedExpert(Protocol):
  """Plays one episode from observations alone."""

  def act(self, observation: str) -> Decision:
    """Takes the newest observation and returns the next move."""


class Suite(Protocol):
  """A family of tasks in splits.

  `own_process` may say that its environments can crash or leak, so that they run in workers unless
  told otherwise, and `exclusive` that a process has room for one of them (`envs.workers`).
  `parallel` may say how many can answer at once when they are asked in threads; 1 without it.
  """

  name: str
  splits: Sequence[str]
  action_templates: list[str]

  def tasks(self, split: str) -> list[Task]:
    """All tasks of a split, in a fixed order."""

  def make(self, task: Task) -> Environment:
    """The environment of a task, not yet reset."""

  def expert(self, task: Task, known_rules: Sequence[Any] = (), **options) -> ScriptedExpert:
    """A scripted expert for one episode of a task; an own suite may go without it."""

  def rules(self, task: Task) -> Sequence[Any]:
    """All that `expert` can be told of a task; an own suite may go without it."""


def openings_of(environment: Environment) -> list[str]:
  """Beginnings of the commands that end in free text; an environment may have none."""
  return getattr(environment, 'command_openings', list)()


def allowed_replies(environment: Environment, replies: Replies) -> Trie | None:
  """What an agent may reply now, as `replies.trie` gives it; built where the environment runs."""
  if elsewhere := getattr(environment, 'allowed_replies', None):
    return elsewhere(replies)
  return replies.trie(environment.admissible_commands(), openings_of(environment))


def rules_of(suite: Suite, task: Task) -> Sequence[Any]:
  """What a suite's expert can be told of a task; nothing where the suite has no rules."""
  return suite.rules(task) if hasattr(suite, 'rules') else ()


def limits_of(environment: Environment) -> Limits:
  """The limits of an environment, the usual ones where it has none."""
  return getattr(environment, 'limits', None) or Limits()


def suite_maker(name: str) -> Callable[..., Suite]:
  """What makes a suite: one of `SUITES`, or one's own as MODULE:NAME.

  Args:
    name: MODULE:NAME is a class or function in a module that Python can import from here.

  Raises:
    UserError: there is no such suite, module or name in it. What an import of one's own module
      raises itself is left as it is: its traceback leads to the mistake.
  """
  module_name, colon, attribute = name.partition(':')
  if name == 'household':
    # Suites import this module, and an optional package is wanted only by those who use it.
    from envs.household_suite import HouseholdSuite
    return HouseholdSuite
  if name == 'webshop':
    from envs.webshop import WebShopSuite
    return WebShopSuite
  if name == 'scienceworld':
    from envs.scienceworld import ScienceWorldSuite
    return ScienceWorldSuite
  if not colon or not module_name or not attribute:
    raise UserError(
      f'Unknown environment {name!r}; there is {", ".join(SUITES)}, or your own as MODULE:NAME.')
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if error.name and (module_name + '.').startswith(error.name + '.'):
      raise UserError(
        f'The environment {name!r} cannot be loaded: there is no module {error.name}; start the '
        'command in the folder above it, or put that folder on PYTHONPATH.') from None
    raise
  maker = getattr(module, attribute, None)
  if not callable(maker):
    known = [n for n, value in vars(module).items()
             if callable(value) and getattr(value, '__module__', '') == module.__name__]
    near = difflib.get_close_matches(attribute, known, 3) or known or ['nothing that can be called']
    raise UserError(
      f'The environment {name!r} cannot be loaded: module {module_name} has no class or function '
      f'{attribute}; it has {", ".join(near)}.')
  return maker


def option_names(maker: Callable[..., Suite]) -> list[str]:
  """The keywords that the maker of a suite takes."""
  return [p.name for p in inspect.signature(maker).parameters.values()
          if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def get_suite(name: str, data: str = 'generated', **options: Any) -> Suite:
  """Makes a suite.

  Args:
    name: one of `SUITES`, or MODULE:NAME for one's own (`suite_maker`).
    data: folder with the environment's data, or 'generated'.
    **options: keywords of the suite's class.

  Returns:
    The suite; its tasks are generated or read when they are asked for.

  Raises:
    UserError: an unknown suite or option (the sentence lists the near ones), a bad value, or an
      own suite that lacks a part of the protocol.
  """
  maker = suite_maker(name)
  known = option_names(maker)
  if 'data' in known:
    options = {'data': data, **options}
  elif data != 'generated':
    raise UserError(f'{name} takes no data, and data is {data}; leave it out.')
  for key in options:
    if key not in known:
      near = difflib.get_close_matches(key, known, 3) or known or ['it takes none']
      raise UserError(f'Unknown option {key!r} of {name}; near: {", ".join(near)}.')
  suite = maker(**options)
  if missing := [part for part in ('name', 'splits', 'action_templates', 'tasks', 'make')
                 if not hasattr(suite, part)]:
    raise UserError(
      f'{name} makes no suite: a {type(suite).__name__} has no {", ".join(missing)}; '
      'envs/base.py says what a suite is.')
  return suite
