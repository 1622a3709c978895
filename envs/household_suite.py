"""The household suite: ALFWorld's games, generated games of its types, and generated skills."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

from data.errors import UserError
from envs import household_expert, household_files, household_games, household_official
from envs.base import Environment, StepResult, Task
from envs.household import BANNER, NOTHING, OFFICIAL, TASK_PREFIX, Rule
from envs.household_games import SPLITS, GameData, SkillOptions
from envs.household_official import OfficialOptions
from envs.household_skills import POOLS

_TEMPLATES = [
  'look',
  'inventory',
  'go to {receptacle}',
  'open {receptacle}',
  'close {receptacle}',
  'take {object} from {receptacle}',
  'move {object} to {receptacle}',
  'examine {object or receptacle}',
  'use {object}',
]
_OFFICIAL_TEMPLATES = [
  'heat {object} with {receptacle}',
  'clean {object} with {receptacle}',
  'cool {object} with {receptacle}',
  'slice {object} with {object}',
]
_SKILL_TEMPLATES = ['{verb} {object} with {receptacle}']
_DEFAULT_COUNTS = {'train': 1200, 'valid_seen': 140, 'valid_unseen': 140}


def room_of(observation: str) -> str:
  """The room description alone: a first observation without banner and goal."""
  return observation.removeprefix(BANNER).partition(TASK_PREFIX)[0].strip()


def _bounds(name: str, value: int | Sequence[int]) -> tuple[int, int]:
  """A size option as (least, most)."""
  bounds = (value, value) if isinstance(value, int) else tuple(value)
  if len(bounds) != 2 or not all(isinstance(bound, int) for bound in bounds):
    raise UserError(f'{name} must be a number or a range (least, most), not {value!r}.')
  return bounds


class HouseholdEnvironment:
  """An `Environment` on a game with TextWorld's answers (the fast engine or TextWorld)."""

  def __init__(self, game: Any):
    """Wraps a game.

    Args:
      game: has reset() -> str, step(str) -> (str, bool), admissible_commands, changed.
    """
    self._game = game
    self._seen: set[str] = set()

  def reset(self) -> str:
    room = room_of(self._game.reset())
    # 'Nothing happens.' alone is never news.
    self._seen = {room, NOTHING}
    return room

  def step(self, action: str) -> StepResult:
    observation, won = self._game.step(action)
    observation = observation.strip()
    changed = self._game.changed or observation not in self._seen
    self._seen.add(observation)
    valid = not observation.startswith(NOTHING)
    return StepResult(observation, float(won), won, won, valid, changed)

  def admissible_commands(self) -> list[str]:
    return self._game.admissible_commands


class HouseholdSuite:
  """Household tasks in splits.

  Attributes:
    name: 'household'.
    splits: the splits that exist.
    action_templates: one global list of action forms.
    skipped: games on disk that are not offered, counted by reason.
  """

  name = 'household'

  def __init__(
    self,
    data: str = 'generated',
    *,
    skills: str = 'official',
    seed: int = 0,
    task_types: Sequence[str] = (),
    num_train: int = 0,
    num_valid: int = 0,
    engine: str = 'fast',
    num_appliances: int | Sequence[int] = (4, 6),
    num_surfaces: int | Sequence[int] = 2,
    num_things: int | Sequence[int] = (2, 4),
    num_receptacles: int | Sequence[int] = (6, 30),
    precondition_rate: float = 0.0,
  ):
    """Describes the tasks; nothing is generated or read before it is asked for.

    Sizes are a number or a range (least, most).

    Args:
      data: folder with ALFWorld's layout, or 'generated'.
      skills: 'official' rules, or the pool 'warm', 'loop' or 'hard' of generated ones.
      seed: of generated rules and houses.
      task_types: only these families; () for all.
      num_train: training tasks; 0 for all there are (generated: 1,200).
      num_valid: tasks of each validation split; 0 for all there are (generated: 140).
      engine: 'fast' or 'textworld' (official rules only).
      num_appliances: appliances of a generated house of skills.
      num_surfaces: pieces of furniture of such a house.
      num_things: things in such a house.
      num_receptacles: receptacles of a generated official house.
      precondition_rate: share of generated rules with a precondition.

    Raises:
      UserError: an option has no meaning.
    """
    if skills != 'official' and skills not in POOLS:
      raise UserError(f"skills must be 'official', {', '.join(map(repr, POOLS))}, not {skills!r}.")
    if engine not in ('fast', 'textworld'):
      raise UserError(f"engine must be 'fast' or 'textworld', not {engine!r}.")
    if engine == 'textworld' and skills != 'official':
      raise UserError("engine='textworld' knows the official rules only; use engine='fast'.")
    if data != 'generated' and skills != 'official':
      raise UserError("Skills are generated: leave data='generated', or skills='official'.")
    self._seed, self._skills, self._engine = seed, skills, engine
    self._counts = {'train': num_train, 'valid_seen': num_valid, 'valid_unseen': num_valid}
    self._task_types = tuple(task_types)
    self._layout = None if data == 'generated' else household_files.find_layout(data)
    if min(num_train, num_valid) < 0:
      raise UserError(f'num_train and num_valid cannot be negative: {num_train}, {num_valid}.')
    self._options: Any = None
    if self._layout is None and skills == 'official':
      self._options = OfficialOptions(
        _bounds('num_receptacles', num_receptacles),
        self._task_types or household_official.TASK_TYPES,
      )
    elif self._layout is None:
      self._options = SkillOptions(
        _bounds('num_appliances', num_appliances),
        _bounds('num_surfaces', num_surfaces),
        _bounds('num_things', num_things),
        precondition_rate,
        self._task_types or household_games.SKILL_TASK_TYPES,
      )
    self.splits = tuple(
      split for split in SPLITS if self._layout is None or (self._layout / split).is_dir()
    )
    kind = _OFFICIAL_TEMPLATES if skills == 'official' else _SKILL_TEMPLATES
    self.action_templates = _TEMPLATES + kind
    self.skipped: collections.Counter[str] = collections.Counter()
    self._tasks: dict[str, list[Task]] = {}

  def games(self, split: str) -> list[GameData]:
    """The generated games of a split, or those read from disk."""
    if split not in self.splits:
      raise UserError(f'The household suite has no split {split!r}; it has {self.splits}.')
    if self._layout is not None:
      return self._read(split)
    count = self._counts[split] or _DEFAULT_COUNTS[split]
    if self._skills == 'official':
      make = household_official.official_game
      return [make(self._seed, split, index, self._options) for index in range(count)]
    return [
      household_games.skill_game(self._skills, self._seed, split, index, self._options)
      for index in range(count)
    ]

  def _read(self, split: str) -> list[GameData]:
    games: list[GameData] = []
    for path in sorted((self._layout / split).glob(f'*/*/{household_files.GAME_FILE}')):
      if self._counts[split] and len(games) == self._counts[split]:
        break
      task_type = path.parts[-3].partition('-')[0]
      if self._task_types and task_type not in self._task_types:
        continue
      # ALFWorld leaves these out, too.
      if 'movable' in path.parts[-3] or 'Sliced' in path.parts[-3]:
        self.skipped['movable or sliced'] += 1
        continue
      game = household_files.load_game(path.parent)
      if not game.solvable:
        self.skipped['unsolvable'] += 1
        continue
      games.append(game)
    if not games:
      raise UserError(f'{self._layout / split} holds no game of the task types asked for.')
    return games

  def tasks(self, split: str) -> list[Task]:
    if split not in self._tasks:
      self._tasks[split] = [self._task(split, game) for game in self.games(split)]
    return list(self._tasks[split])

  def _task(self, split: str, game: GameData) -> Task:
    if game.source:
      payload = {'folder': str(pathlib.Path(game.source).parent)}
    else:
      payload = {'problem': game.problem, 'rules': [rule.to_json() for rule in game.rules]}
      if game.rules == OFFICIAL:
        payload.pop('rules')
    return Task(game.id, self.name, split, game.task_type, game.instruction, payload)

  def game_data(self, task: Task) -> GameData:
    """The game behind a task."""
    if 'folder' in task.payload:
      return household_files.load_game(task.payload['folder'])
    rules = OFFICIAL
    if 'rules' in task.payload:
      rules = tuple(Rule(**row) for row in task.payload['rules'])
    return GameData(task.id, task.task_type, task.instruction, task.payload['problem'], rules)

  def make(self, task: Task) -> Environment:
    data = self.game_data(task)
    if self._engine == 'textworld':
      from envs import textworld  # optional package

      return HouseholdEnvironment(textworld.TextWorldGame(data))
    return HouseholdEnvironment(data.game())

  def rules(self, task: Task) -> tuple[Rule, ...]:
    """The rules that hold in the house of a task."""
    return self.game_data(task).rules

  def expert(
    self, task: Task, known_rules: Sequence[Rule] = (), **options: Any
  ) -> household_expert.Expert:
    return household_expert.Expert(task, known_rules, **options)
