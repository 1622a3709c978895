"""The household suite: ALFWorld's games, generated games of its types, and generated skills."""

from __future__ import annotations

import collections
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
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


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _bounds(name: str, value: int | Sequence[int]) -> tuple[int, int]:
  """A size option as (least, most)."""
  bounds = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
  if len(bounds) != 2 or not all(map(_is_int, bounds)):
    raise UserError(f'{name} must be a number or a range (least, most), not {value!r}.')
  return bounds


def _check_count(name: str, value: Any) -> None:
  if not _is_int(value) or value < 0:
    raise UserError(f'{name} must be a whole number from 0 on (0 is all), not {value!r}.')


def _type_names(task_types: str | Sequence[str]) -> tuple[str, ...]:
  """The option task_types as a tuple; a string is one type."""
  if isinstance(task_types, str):
    return (task_types,)
  if not isinstance(task_types, (list, tuple)) or not all(
      isinstance(name, str) for name in task_types):
    raise UserError(f'task_types must be names of task types, not {task_types!r}.')
  return tuple(task_types)


def _shuffled(folder: pathlib.Path) -> bytes:
  """Sort key of a TRIAL folder: the SHA-256 of its task's id, split/TASK/TRIAL."""
  return hashlib.sha256('/'.join(folder.parts[-3:]).encode()).digest()


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
    own_process: TextWorld's planner is native code that can crash, and grows with every game.
  """

  name = 'household'

  def __init__(
    self,
    data: str = 'generated',
    *,
    skills: str = 'official',
    seed: int = 0,
    task_types: str | Sequence[str] = (),
    num_train: int = 0,
    num_valid: int = 0,
    engine: str = 'fast',
    num_appliances: int | Sequence[int] = (4, 6),
    num_surfaces: int | Sequence[int] = 2,
    num_things: int | Sequence[int] = (2, 4),
    num_thing_types: int = len(household_games.SKILL_THINGS),
    num_receptacles: int | Sequence[int] = (6, 30),
    precondition_rate: float = 0.0,
    expert_in_order: bool = False,
  ):
    """Describes the tasks; nothing is generated or read before it is asked for.

    Sizes are a number or a range (least, most).

    Args:
      data: folder with ALFWorld's layout, or 'generated'.
      skills: 'official' rules, or a pool of generated ones: 'warm', 'loop', 'hard', 'easy'.
      seed: of generated rules and houses.
      task_types: only these families, or this one; () for all.
      num_train: training tasks; 0 for all there are (generated: 1,200).
      num_valid: tasks of each validation split; 0 for all there are (generated: 140).
      engine: 'fast' or 'textworld' (official rules only).
      num_appliances: appliances of a generated house of skills.
      num_surfaces: pieces of furniture of such a house.
      num_things: things in such a house.
      num_thing_types: types of things in all such houses together.
      num_receptacles: receptacles of a generated official house.
      precondition_rate: share of generated rules with a precondition.
      expert_in_order: the expert goes through furniture and appliances as the room lists them.

    Raises:
      UserError: an option has no meaning.
    """
    if not isinstance(skills, str) or skills not in ('official', *POOLS):
      raise UserError(f"skills must be 'official', {', '.join(map(repr, POOLS))}, not {skills!r}.")
    if engine not in ('fast', 'textworld'):
      raise UserError(f"engine must be 'fast' or 'textworld', not {engine!r}.")
    if engine == 'textworld' and skills != 'official':
      raise UserError("engine='textworld' knows the official rules only; use engine='fast'.")
    if data != 'generated' and skills != 'official':
      raise UserError("Skills are generated: leave data='generated', or skills='official'.")
    if not _is_int(seed):
      raise UserError(f'seed must be a whole number, not {seed!r}.')
    _check_count('num_train', num_train)
    _check_count('num_valid', num_valid)
    _check_count('num_thing_types', num_thing_types)
    if isinstance(precondition_rate, bool) or not isinstance(precondition_rate, (int, float)):
      raise UserError(f'precondition_rate must be a number in 0..1, not {precondition_rate!r}.')
    if not isinstance(expert_in_order, bool):
      raise UserError(f'expert_in_order must be true or false, not {expert_in_order!r}.')
    self._seed, self._skills, self._engine = seed, skills, engine
    self._expert_in_order = expert_in_order
    self.own_process = engine == 'textworld'
    self._counts = {'train': num_train, 'valid_seen': num_valid, 'valid_unseen': num_valid}
    self._task_types = _type_names(task_types)
    self._layout = None if data == 'generated' else household_files.find_layout(data)
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
        num_thing_types,
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
    """The games of a split on disk, as many as were asked for; no more files than that are read.

    The task types take turns, each in the order of its ids' SHA-256: by name, the first thousand
    of ALFWorld's training games are of two of the six types.
    """
    folders: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
    for path in (self._layout / split).glob(f'*/*/{household_files.GAME_FILE}'):
      name = path.parts[-3]
      task_type = name.partition('-')[0]
      if self._task_types and task_type not in self._task_types:
        continue
      # ALFWorld leaves these out, too.
      if 'movable' in name or 'Sliced' in name:
        self.skipped['movable or sliced'] += 1
        continue
      folders[task_type].append(path.parent)
    waiting = collections.deque(
      self._solvable(sorted(folders[task_type], key=_shuffled)) for task_type in sorted(folders))
    games: list[GameData] = []
    while waiting and not (self._counts[split] and len(games) == self._counts[split]):
      game = next(waiting[0], None)
      if game is None:
        waiting.popleft()
        continue
      games.append(game)
      waiting.rotate(-1)
    if not games:
      raise UserError(f'{self._layout / split} holds no game of the task types asked for.')
    return games

  def _solvable(self, folders: Sequence[pathlib.Path]) -> Iterator[GameData]:
    """Reads one game after the other; the unsolvable ones are counted only."""
    for folder in folders:
      game = household_files.load_game(folder)
      if game.solvable:
        yield game
      else:
        self.skipped['unsolvable'] += 1

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
    return household_expert.Expert(
      task, known_rules, in_order=self._expert_in_order, **options)
