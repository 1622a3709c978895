"""Writes generated household games to disk, in ALFWorld's layout.

  python -m envs.household_generate --out=DIR --skills=loop --seed=0 --num_train=100 --num_valid=20

DIR is then what `data=DIR` of the suite, or ALFWorld itself (official rules), reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from tqdm import tqdm

from data.errors import UserError
from envs import household_files
from envs.base import Task
from envs.household_expert import Expert
from envs.household_games import GameData
from envs.household_suite import HouseholdSuite

_MAX_STEPS = 300

_OUT = flags.DEFINE_string('out', None, 'Folder to write to.')
_SKILLS = flags.DEFINE_enum(
  'skills', 'official', ['official', 'warm', 'loop', 'hard'], 'Official rules or a skill pool.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of rules and houses.')
_NUM_TRAIN = flags.DEFINE_integer('num_train', 100, 'Games of the split train.')
_NUM_VALID = flags.DEFINE_integer('num_valid', 20, 'Games of each validation split.')
_PRECONDITIONS = flags.DEFINE_float('precondition_rate', 0.0, 'Share of rules with a precondition.')


def walkthrough(data: GameData) -> list[str]:
  """The commands with which the scripted expert wins a game.

  Raises:
    UserError: it does not win.
  """
  game = data.game()
  observation = game.reset()
  task = Task(data.id, 'household', '', data.task_type, data.instruction, {})
  expert = Expert(task, data.rules)
  commands: list[str] = []
  while not game.won:
    if len(commands) == _MAX_STEPS:
      raise UserError(f'The expert does not win {data.id} in {_MAX_STEPS} steps.')
    commands.append(expert.act(observation).action)
    observation, _ = game.step(commands[-1])
  return commands


def main(argv: Sequence[str]) -> None:
  del argv
  suite = HouseholdSuite(
    skills=_SKILLS.value,
    seed=_SEED.value,
    num_train=_NUM_TRAIN.value,
    num_valid=_NUM_VALID.value,
    precondition_rate=_PRECONDITIONS.value,
  )
  try:
    for split in suite.splits:
      for data in tqdm(suite.games(split), desc=split, unit='game'):
        household_files.write_game(_OUT.value, data, walkthrough(data))
  except (PermissionError, FileExistsError, NotADirectoryError) as error:
    raise UserError(
      f'{_OUT.value} cannot be written ({error.strerror}); take another --out.') from None


if __name__ == '__main__':
  # As a program of its own this module is an entry, and entries look down on every room.
  from configs import cli
  cli.run(main, required=('out',))
