"""ScienceWorld: 30 elementary-school experiments in 7,207 variations (arXiv 2203.07540).

The game is the official package's (`envs.scienceworld_server`); here are its splits, scores, limits
and the split into easy and hard tasks. A Java process has room for one game, so that every
environment that is alive at once has its own: hence `exclusive`.
"""

from __future__ import annotations

import itertools
import math
import random
import weakref
from collections.abc import Sequence
from typing import Any

from data.errors import UserError
from envs import scienceworld_server
from envs.base import Decision, EngineDied, Limits, StepResult, Task
from envs.scienceworld_server import Server

SPLITS = ('train', 'dev', 'test')
SIMPLIFICATIONS = (
  'teleportAction', 'selfWateringFlowerPots', 'openContainers', 'openDoors', 'noElectricalAction')
NOTHING = 'No known action matches that input.'
AMBIGUOUS = 'Ambiguous request:'
_ELECTRICAL = ('power-component', 'conductivity')

# task -> mean and longest official gold path over its first ten training variations ('easy'
# simplifications). The step limit is half as long again as the longest, in tens, at least 30.
GOLD_STEPS = {
  'boil': (39, 57),
  'change-the-state-of-matter-of': (28, 39),
  'chemistry-mix': (28, 58),
  'chemistry-mix-paint-secondary-color': (14, 33),
  'chemistry-mix-paint-tertiary-color': (22, 39),
  'find-animal': (11, 14),
  'find-living-thing': (11, 14),
  'find-non-living-thing': (6, 9),
  'find-plant': (12, 16),
  'freeze': (34, 63),
  'grow-fruit': (76, 91),
  'grow-plant': (68, 77),
  'identify-life-stages-1': (33, 41),
  'identify-life-stages-2': (14, 17),
  'inclined-plane-determine-angle': (97, 154),
  'inclined-plane-friction-named-surfaces': (88, 318),
  'inclined-plane-friction-unnamed-surfaces': (200, 229),
  'lifespan-longest-lived': (6, 8),
  'lifespan-longest-lived-then-shortest-lived': (7, 9),
  'lifespan-shortest-lived': (6, 8),
  'measure-melting-point-known-substance': (24, 31),
  'measure-melting-point-unknown-substance': (75, 94),
  'melt': (37, 53),
  'mendelian-genetics-known-plant': (129, 130),
  'mendelian-genetics-unknown-plant': (131, 132),
  'power-component': (12, 15),
  'power-component-renewable-vs-nonrenewable-energy': (21, 30),
  'test-conductivity': (29, 39),
  'test-conductivity-of-unknown-substances': (29, 39),
  'use-thermometer': (20, 22),
}
TASK_TYPES = tuple(GOLD_STEPS)

# arXiv 2603.18272 trains on 17 easy task types and tests on 13 hard ones. What we know of its lists
# is: hard chemistry-mix, mendelian-genetics, grow-plant, test-conductivity; easy find-plant,
# find-animal, boil, melt, freeze. The rest is OURS, by this rule: tasks of one family stay together
# (the families are those of the official numbering: changes of state, find, chemistry, grow,
# genetics, conductivity), and of the families that are not named the tasks with the longest gold
# paths (GOLD_STEPS, mean) are hard until there are 13.
_HARD_FAMILIES = ('chemistry-mix', 'mendelian-genetics', 'grow-', 'test-conductivity')
_EASY_FAMILIES = ('find-', 'boil', 'melt', 'freeze', 'change-the-state')
_NUM_HARD = 13


def _hard_types() -> tuple[str, ...]:
  hard = [name for name in TASK_TYPES if name.startswith(_HARD_FAMILIES)]
  others = [name for name in TASK_TYPES if not name.startswith(_HARD_FAMILIES + _EASY_FAMILIES)]
  others.sort(key=lambda name: -GOLD_STEPS[name][0])
  hard += others[:_NUM_HARD - len(hard)]
  return tuple(name for name in TASK_TYPES if name in hard)


HARD_TYPES = _hard_types()
EASY_TYPES = tuple(name for name in TASK_TYPES if name not in HARD_TYPES)

_TEMPLATES = {
  'activate OBJ': 'activate {object}',
  'close OBJ': 'close {object}',
  'connect OBJ to OBJ': 'connect {object} to {object}',
  'deactivate OBJ': 'deactivate {object}',
  'disconnect OBJ': 'disconnect {object}',
  'dunk OBJ in OBJ': 'dunk {container} in {liquid}',
  'eat OBJ': 'eat {object}',
  'flush OBJ': 'flush {object}',
  'focus on OBJ': 'focus on {object} (the one that the task is about; a wrong one fails the task)',
  'go OBJ': 'go to {room}',
  'inventory': 'inventory',
  'look around': 'look around',
  'look at OBJ': 'look at {object}',
  'look in OBJ': 'look in {container}',
  'mix OBJ': 'mix {container}',
  'move OBJ to OBJ': 'move {object} to {container}',
  'open OBJ': 'open {object}',
  'pick up OBJ': 'pick up {object}',
  'pour OBJ in OBJ': 'pour {liquid} in {container}',
  'put down OBJ': 'put down {object}',
  'read OBJ': 'read {object}',
  'task': 'task',
  'teleport OBJ': 'teleport to {room}',
  'use OBJ on OBJ': 'use {object} on {object}',
  'wait': 'wait (ten steps of time)',
  'wait1': 'wait1 (one step of time)',
}
_NUMBER = '{number} (the answer to an ambiguous request)'


def step_limit(task_type: str) -> int:
  """Environment steps of an episode; `GOLD_STEPS` says by what rule."""
  return max(30, 10 * math.ceil(1.5 * GOLD_STEPS[task_type][1] / 10))


def variations_of(split: str, count: int) -> range:
  """The official split of `count` variations: half, a quarter, and a quarter with the remainder."""
  quarter = count // 4
  if count < 5:
    ends = {1: (1, 1), 2: (1, 1), 3: (1, 2), 4: (2, 3)}[count]
  else:
    ends = 2 * quarter, 3 * quarter
  return {'train': range(ends[0]), 'dev': range(*ends),
          # A single variation is its own test, too.
          'test': range(ends[1] if count > 1 else 0, count)}[split]


class ScienceWorldEnvironment:
  """An `Environment`: one variation, in a Java process that it has to itself until it is closed."""

  def __init__(self, suite: ScienceWorldSuite, task: Task, success_score: int):
    self._suite, self._task, self._success_score = suite, task, success_score
    self._server: Server | None = None
    self._score, self._over = 0, False
    self._seen: set[str] = set()
    self._view: tuple[str, str] = '', ''
    # Waiting is part of many tasks: up to 40 times in a gold path.
    self.limits = Limits(steps=step_limit(task.task_type), repeats=50)

  def reset(self) -> str:
    self.close()
    self._server = self._suite.take_server()
    payload = self._task.payload
    self._server.load(payload['task'], payload['variation'], self._suite.simplifications)
    # As in the official environment, the first look is a step of the game.
    first = self._server.step(scienceworld_server.LOOK)
    self._score, self._over = 0, False
    self._seen, self._view = {first.answer}, first.view
    return first.answer

  def step(self, action: str) -> StepResult:
    if self._over or self._server is None:
      return StepResult('The episode is over.', 0.0, True, False, False, False)
    # One would only play the same variation again, the other would end the simulator's input.
    action = ' '.join(action.split())
    if action.lower() == 'reset task':
      return StepResult(NOTHING, 0.0, False, False, False, False)
    step = self._server.step(action)
    valid = not step.answer.startswith(NOTHING)
    changed = valid and (
      step.view != self._view or step.answer not in self._seen or action.startswith('wait'))
    self._seen.add(step.answer)
    self._view = step.view
    gained = max(0, step.score) - self._score
    self._score = max(0, step.score)
    won = self._score >= self._success_score
    self._over = won or step.over or step.score < 0
    return StepResult(step.answer, gained / 100, self._over, won, valid, changed)

  def admissible_commands(self) -> list[str]:
    """All that is possible now; it takes the simulator as long as some dozens of steps."""
    return [] if self._over or self._server is None else sorted(
      set(self._server.valid_actions()) - {'reset task'})

  def close(self) -> None:
    if self._server is not None:
      self._suite.give_back(self._server)
      self._server = None


class GoldExpert:
  """Plays the simulator's own gold path, whatever it observes.

  With `error_rate` it leaves out actions now and then, for banks that need failures.
  """

  def __init__(self, suite: ScienceWorldSuite, task: Task, error_rate: float, seed: int):
    rng = random.Random(f'expert {seed} {task.id}')
    path = suite.gold_path(task)
    self._path = iter([action for action in path if rng.random() >= error_rate])

  def act(self, observation: str) -> Decision:
    # A gold path has no reasons.
    return Decision(next(self._path, scienceworld_server.LOOK), '')


class ScienceWorldSuite:
  """The tasks in the official splits; the task types take turns.

  Attributes:
    name: 'scienceworld'.
    splits: train, dev, test.
    action_templates: the forms of actions that the simplifications leave.
    simplifications: as the simulator takes them.
  """

  name = 'scienceworld'
  splits = SPLITS
  own_process = exclusive = True

  def __init__(
    self,
    *,
    task_types: str | Sequence[str] = (),
    simplifications: str = 'easy',
    success_score: int = 100,
    variations: int = 0,
    test_variations: int = 0,
    num_tasks: int = 0,
    memory_mb: int = 512,
    timeout: float = 300.0,
  ):
    """Describes the tasks; Java is started when they are asked for.

    Args:
      task_types: 'easy' or 'hard' (the split of arXiv 2603.18272), or names of tasks; () for all.
      simplifications: 'easy' (all that the task allows), '' for none, or names of SIMPLIFICATIONS
        with commas between them.
      success_score: score, 1 to 100, from which a task counts as solved and the episode ends.
      variations: of each task in the training split, the first ones; 0 for all.
      test_variations: of each task in the other splits, likewise.
      num_tasks: of each split, the first ones; 0 for all.
      memory_mb: of the heap of each Java process.
      timeout: seconds in which the simulator has to answer; a gold path can take it a minute.

    Raises:
      UserError: an option has no meaning.
    """
    names = task_types.split(',') if isinstance(task_types, str) else task_types
    names = [name.strip() for name in names if name.strip()]
    groups = {'easy': EASY_TYPES, 'hard': HARD_TYPES}
    chosen = {t for name in names for t in groups.get(name, (name,))}
    if unknown := sorted(chosen - set(TASK_TYPES)):
      raise UserError(
        f'ScienceWorld has no task {", ".join(unknown)}; it has easy, hard, '
        f'{", ".join(TASK_TYPES)}.')
    self._task_types = [t for t in TASK_TYPES if t in chosen or not chosen]
    for name, value, least in (
        ('variations', variations, 0), ('test_variations', test_variations, 0),
        ('num_tasks', num_tasks, 0), ('memory_mb', memory_mb, 64)):
      if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f'{name} must be a whole number from {least} on, not {value!r}.')
    if not isinstance(success_score, int) or not 1 <= success_score <= 100:
      raise UserError(f'success_score must be a whole number from 1 to 100, not {success_score!r}.')
    parts = [part.strip() for part in simplifications.split(',') if part.strip()]
    if unknown := [p for p in parts if p not in SIMPLIFICATIONS and parts != ['easy']]:
      raise UserError(
        f'ScienceWorld has no simplification {", ".join(unknown)}; it has easy (alone), '
        f'{", ".join(SIMPLIFICATIONS)}.')
    electrical = [t for t in self._task_types if any(e in t for e in _ELECTRICAL)]
    if 'noElectricalAction' in parts and electrical:
      raise UserError(
        f'noElectricalAction takes away what {", ".join(electrical)} need; leave it out, or name '
        'other task_types.')
    self.simplifications = ','.join(parts)
    self._success_score, self._num_tasks = success_score, num_tasks
    self._variations = {
      'train': variations, 'dev': test_variations, 'test': test_variations}
    self._memory_mb, self._timeout = memory_mb, timeout
    left_out = set()
    if not {'easy', 'teleportAction'} & set(parts):
      left_out.add('teleport OBJ')
    if 'noElectricalAction' in parts or (parts == ['easy'] and not electrical):
      left_out |= {'connect OBJ to OBJ', 'disconnect OBJ'}
    self.action_templates = [
      *(text for form, text in _TEMPLATES.items() if form not in left_out), _NUMBER]
    self._tasks: dict[str, list[Task]] = {}
    self._idle: list[Server] = []
    self._finalizer = weakref.finalize(self, _stop_all, self._idle)

  def tasks(self, split: str) -> list[Task]:
    if split not in self.splits:
      raise UserError(f'The scienceworld suite has no split {split!r}; it has {self.splits}.')
    if split not in self._tasks:
      server = self.take_server()
      lists = []
      for task_type in self._task_types:
        numbers = variations_of(split, server.num_variations(task_type))
        lists.append([(task_type, n) for n in numbers[:self._variations[split] or None]])
      turns = [one for turn in itertools.zip_longest(*lists) for one in turn if one is not None]
      self._tasks[split] = [
        Task(f'{split}/{task_type}/{number}', self.name, split, task_type,
             server.description(task_type, number), {'task': task_type, 'variation': number})
        for task_type, number in turns[:self._num_tasks or None]]
      self.give_back(server)
    return list(self._tasks[split])

  def make(self, task: Task) -> ScienceWorldEnvironment:
    return ScienceWorldEnvironment(self, task, self._success_score)

  def expert(
    self, task: Task, known_rules: Sequence[Any] = (), *, error_rate: float = 0.0, seed: int = 0
  ) -> GoldExpert:
    return GoldExpert(self, task, error_rate, seed)

  def gold_path(self, task: Task) -> list[str]:
    """The simulator's own solution of a task.

    Raises:
      UserError: it did not find one in time.
    """
    server = self.take_server()
    payload = task.payload
    try:
      server.load(payload['task'], payload['variation'], self.simplifications, gold=True)
      path = server.gold_path()
    except EngineDied as error:
      raise UserError(
        f'{task.id}: there is no gold path, {error}; start the same command again, with more '
        f'seconds (env_options=timeout:{2 * self._timeout:g}) or memory (memory_mb).') from error
    self.give_back(server)
    return path

  def take_server(self) -> Server:
    """A simulator that nobody plays with."""
    while self._idle:
      server = self._idle.pop()
      if server.alive:
        return server
      server.stop()
    return Server(self._memory_mb, self._timeout)

  def give_back(self, server: Server) -> None:
    """The simulator of a game that is over; one that has died is not wanted."""
    if server.alive:
      self._idle.append(server)

  def close(self) -> None:
    """Ends the Java processes that nobody plays with."""
    _stop_all(self._idle)


def _stop_all(servers: list[Server]) -> None:
  while servers:
    servers.pop().stop()
