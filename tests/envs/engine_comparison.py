"""Our engine and TextWorld side by side: the same commands, and the first answer that differs.

TextWorld's process grows by megabytes with every game that it loads, so `compare_folders` plays
each batch of games in new processes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import envs
from envs import household_files
from envs.household import Game
from envs.household_games import GameData
from envs.household_suite import HouseholdEnvironment
from envs.textworld import TextWorldGame

WORKERS = 2
GAMES_PER_PROCESS = 20
_MISTAKES = (
  '', ' ', 'LOOK', 'look around', 'go to', 'go to nowhere 1', 'go to  desk 1', 'go desk 1',
  'put x in y', 'use', 'use use', 'examine', 'take from', 'take a from b from c', 'move  to ',
  'heat with', ' with ', 'clean it with sinkbasin 1 with sinkbasin 1', 'open fridge 99',
  'go to café 1', 'inventory\x00', 'look\nlook', 'x' * 5000,
)  # fmt: skip
# Only blanks around these: both engines have to take them.
_BLANKS = ('  look', '\tinventory\n', 'help ')
_VERBS = ('heat', 'cool', 'clean', 'slice', 'open', 'close', 'take', 'move', 'examine', 'use')

Make = Callable[[GameData], Game]


@dataclasses.dataclass(frozen=True)
class Deviation:
  """The first answer of ours that is not the official one.

  Attributes:
    game: split/TASK/TRIAL.
    play: 'random' or 'walkthrough'.
    step: number of the command from 1 on; 0 for the start.
    command: what both engines were told.
    what: the part of the answer that differs.
    ours: our part.
    official: TextWorld's part.
  """

  game: str
  play: str
  step: int
  command: str
  what: str
  ours: str
  official: str

  def __str__(self) -> str:
    return (
      f'{self.game}, {self.play} step {self.step}, {self.command!r}: {self.what}\n'
      f'  ours:     {self.ours}\n  official: {self.official}'
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What came of one game: the steps compared, and a deviation if there was one."""

  game: str
  task_type: str
  random_steps: int
  walkthrough_steps: int
  deviations: tuple[Deviation, ...]


@functools.cache
def stratified_folders(root: pathlib.Path, num_train: int, num_valid: int) -> list[str]:
  """TRIAL folders of real games, in which the task types take turns; always the same ones."""
  suite = envs.get_suite('household', data=str(root), num_train=num_train, num_valid=num_valid)
  tasks = suite.tasks('train') + suite.tasks('valid_seen')
  return [task.payload['folder'] for task in tasks]


class _RandomCommands:
  """Mostly what is admissible, the rarer the likelier; one command in four is perhaps not."""

  def __init__(self, game: Game, seed: str, steps: int):
    self._names = game.problem.thing_names + game.problem.receptacle_names
    self._rng = random.Random(seed)
    self._left = steps
    # In the order in which they were first admissible; a dict, since a set has no order.
    self._once: dict[str, None] = {}

  def __call__(self, admissible: Sequence[str]) -> str | None:
    if not self._left:
      return None
    self._left -= 1
    rng, kind = self._rng, self._rng.random()
    self._once.update(dict.fromkeys(admissible))
    if kind < 0.06:
      return rng.choice(_MISTAKES)
    if kind < 0.08:
      return rng.choice(_BLANKS)
    if kind < 0.14:
      return f'{rng.choice(_VERBS)} {rng.choice(admissible).partition(" ")[2]}'
    if kind < 0.18:
      return f'{rng.choice(["examine", "use", "go to", "open"])} {rng.choice(self._names)}'
    if kind < 0.26:
      # What could be done before, and fails now for the one thing that has changed.
      gone = self._once.keys() - set(admissible)
      return rng.choice([c for c in self._once if c in gone] or admissible)
    rare = [c for c in admissible if not c.startswith(('go to', 'help', 'inventory'))]
    return rng.choice(rare if rare and rng.random() < 0.65 else admissible)


class Pair:
  """One game in both engines."""

  def __init__(self, data: GameData):
    """Loads a game with the official rules into TextWorld."""
    self.data = data
    self._official = TextWorldGame(data)

  def random(self, steps: int, make: Make = GameData.game) -> tuple[int, Deviation | None]:
    """Random commands, drawn by the game's id; returns steps compared and the first deviation."""
    commands = _RandomCommands(self.data.game(), self.data.id, steps)
    return self._play('random', make, commands)

  def walkthrough(
    self, commands: Sequence[str], make: Make = GameData.game
  ) -> tuple[int, Deviation | None]:
    """Commands that have to win in both engines; returns as `random` does."""
    left = iter(commands)
    steps, found = self._play('walkthrough', make, lambda _: next(left, None))
    if found is None and not self._official.state['won']:
      # Equal answers all the way, but a walkthrough that does not win has shown nothing.
      found = Deviation(
        self.data.id, 'walkthrough', steps, ' '.join(commands[-1:]),
        'the walkthrough does not win', 'won: False', 'won: False')
    return steps, found

  def _play(
    self, play: str, make: Make, choose: Callable[[Sequence[str]], str | None]
  ) -> tuple[int, Deviation | None]:
    official, ours = self._official, _Ours(make, self.data)
    step, command = 0, ''
    theirs = {
      'observation': official.reset(),
      'won': bool(official.state['won']),
      'admissible commands': official.admissible_commands,
    }
    answers = ours.answers(None, theirs)
    while answers == theirs:
      command = choose(official.admissible_commands)
      if command is None:
        return step, None
      step += 1
      valid = command.strip() in official.admissible_commands
      observation, won = official.step(command)
      theirs = {
        'observation': observation,
        'observation of the environment': observation.strip(),
        'won': won,
        'won of the environment': won,
        'done': bool(official.state['done']),
        'score': float(official.state['score']),
        'valid': valid,
        'changed': official.changed,
        'admissible commands': official.admissible_commands,
      }
      answers = ours.answers(command, theirs)
    what = next(what for what in theirs if answers[what] != theirs[what])
    found = (repr(answers[what]), repr(theirs[what]))
    return step, Deviation(self.data.id, play, step, command or '', what, *found)


class _Ours:
  """Our engine twice: bare, and in the environment that agents play."""

  def __init__(self, make: Make, data: GameData):
    self._make, self._data = make, data

  def answers(self, command: str | None, wanted: Iterable[str]) -> dict[str, Any]:
    """What ours says to a command (None: the start); an exception is an answer, too."""
    try:
      return self._start() if command is None else self._step(command)
    except Exception as error:
      return dict.fromkeys(wanted, error)

  def _start(self) -> dict[str, Any]:
    self._game = self._make(self._data)
    self._environment = HouseholdEnvironment(self._make(self._data))
    self._environment.reset()
    return {
      'observation': self._game.reset(),
      'won': self._game.won,
      'admissible commands': self._game.admissible_commands,
    }

  def _step(self, command: str) -> dict[str, Any]:
    observation, won = self._game.step(command)
    result = self._environment.step(command)
    return {
      'observation': observation,
      'observation of the environment': result.observation,
      'won': won,
      'won of the environment': result.won,
      'done': result.done,
      'score': result.reward,
      'valid': result.valid,
      'changed': self._game.changed,
      'admissible commands': self._game.admissible_commands,
    }


def compare_folder(folder: str, steps: int, make: Make = GameData.game) -> Comparison:
  """Random steps and the walkthrough of game.tw-pddl of one TRIAL folder."""
  try:
    data = household_files.load_game(folder)
    path = pathlib.Path(folder) / household_files.GAME_FILE
    commands = json.loads(path.read_text())['walkthrough']
    pair = Pair(data)
    random_steps, one = pair.random(steps, make)
    walkthrough_steps, other = pair.walkthrough(commands, make)
  except Exception as error:
    error.add_note(f'The game was {folder}.')
    raise
  deviations = tuple(deviation for deviation in (one, other) if deviation)
  return Comparison(data.id, data.task_type, random_steps, walkthrough_steps, deviations)


def compare_folders(
  folders: Sequence[str], steps: int, make: Make = GameData.game
) -> list[Comparison]:
  """`compare_folder` of each folder, in `WORKERS` processes at a time.

  A dead worker raises `BrokenProcessPool`. Processes are recycled by making a new executor for each
  batch: `max_tasks_per_child` of Python 3.11's executor stops for ever when a worker has done its
  share.
  """
  done: list[Comparison] = []
  batch = WORKERS * GAMES_PER_PROCESS
  for start in range(0, len(folders), batch):
    part = folders[start : start + batch]
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
      count = len(part)
      new = list(pool.map(compare_folder, part, [steps] * count, [make] * count))
    done += new
    deviating = sum(bool(comparison.deviations) for comparison in done)
    # At once and not at the end: many games take many minutes.
    print(f'{len(done)} of {len(folders)} games compared, {deviating} deviate', flush=True)
    print(report(new), end='\n' if report(new) else '', flush=True)
  return done


def report(comparisons: Sequence[Comparison]) -> str:
  """All deviations, as text."""
  return '\n'.join(str(d) for comparison in comparisons for d in comparison.deviations)
