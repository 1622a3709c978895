"""Household games on disk, in ALFWorld's layout and file format.

ROOT/json_2.1.1/SPLIT/TASK/TRIAL/{game.tw-pddl,traj_data.json}: game.tw-pddl is JSON with the PDDL
domain, the grammar, the problem, and whether it can be won. The domain and the grammar of the
official game are ALFWorld's own files (`envs/alfred`), so that TextWorld plays generated games of
the official types.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from data.errors import UserError
from envs.household import OFFICIAL, TASK_PREFIX, Rule
from envs.household_games import GameData
from envs.household_skills import PRECONDITIONS

LAYOUT = 'json_2.1.1'
GAME_FILE = 'game.tw-pddl'
TRAJECTORY_FILE = 'traj_data.json'
_TASK = re.compile(re.escape(TASK_PREFIX) + r'(.*?)"')
_ALFRED = pathlib.Path(__file__).parent / 'alfred'


@functools.cache
def official_domain() -> str:
  """ALFWorld's PDDL domain."""
  return (_ALFRED / 'alfred.pddl').read_text()


@functools.cache
def _official_grammar() -> str:
  return (_ALFRED / 'alfred.twl2').read_text()


def grammar(instruction: str) -> str:
  """ALFWorld's grammar with the goal sentence filled in (without its final period)."""
  return _official_grammar().replace('UNKNOWN GOAL', instruction.removesuffix('.'))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise UserError(f'{path} is missing; is this a folder of an ALFWorld game?') from error
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise UserError(f'{path} is not complete JSON ({error}); unpack it again.') from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error}.') from error
  if not isinstance(content, dict):
    raise UserError(f'{path} must hold a JSON object.')
  return content


def load_game(folder: str | pathlib.Path) -> GameData:
  """Reads the game of a TRIAL folder.

  Raises:
    UserError: a file is missing or damaged; the sentence names it.
  """
  folder = pathlib.Path(folder)
  path = folder / GAME_FILE
  content = _read_json(path)
  problem = content.get('pddl_problem')
  if not isinstance(problem, str) or not problem.strip():
    raise UserError(f'{path} has no pddl_problem; unpack or generate it again.')
  task = _TASK.search(content.get('grammar') or '')
  if task is None:
    raise UserError(f'{path} has no grammar with a goal sentence; unpack or generate it again.')
  try:
    rules = tuple(Rule(**row) for row in content['rules']) if 'rules' in content else OFFICIAL
  except (TypeError, AttributeError) as error:
    raise UserError(f'{path} has unreadable rules: {error}.') from error
  if any(rule.precondition not in ('', *PRECONDITIONS) for rule in rules):
    raise UserError(f'{path} has a rule whose precondition is none of {PRECONDITIONS}.')
  parts = folder.resolve().parts[-3:]
  return GameData(
    id='/'.join(parts),
    task_type=parts[1].partition('-')[0],
    instruction=task[1],
    problem=problem,
    rules=rules,
    solvable=bool(content.get('solvable', True)),
    source=str(path),
  )


def write_game(
  root: str | pathlib.Path, data: GameData, walkthrough: Iterable[str]
) -> pathlib.Path:
  """Writes a game below ROOT/json_2.1.1.

  Args:
    root: folder of the layout.
    data: the game.
    walkthrough: commands that win it.

  Returns:
    The TRIAL folder.
  """
  folder = pathlib.Path(root) / LAYOUT / data.id
  folder.mkdir(parents=True, exist_ok=True)
  task = f'{TASK_PREFIX}{data.instruction}'
  content: dict[str, Any] = {
    'pddl_domain': official_domain(),
    'grammar': grammar(data.instruction),
    'pddl_problem': data.problem,
    'solvable': True,
    'walkthrough': list(walkthrough),
  }
  if data.rules != OFFICIAL:
    # No other engine knows these rules, so the file does not pretend to have their PDDL.
    content['pddl_domain'] = ''
    content['grammar'] = f'grammar :: """{{"task": [{{"rhs": "{task}"}}]}}""";\n'
    content['rules'] = [rule.to_json() for rule in data.rules]
  _, task_name, trial = data.id.split('/')
  trajectory = {
    'task_id': trial,
    'task_type': data.task_type,
    'pddl_params': dict(data.params),
    'scene': {'floor_plan': f'Generated{task_name.rpartition("-")[2]}'},
    'turk_annotations': {'anns': [{'task_desc': data.instruction}]},
  }
  (folder / TRAJECTORY_FILE).write_text(json.dumps(trajectory))
  (folder / GAME_FILE).write_text(json.dumps(content))
  return folder


def find_layout(path: str | pathlib.Path) -> pathlib.Path:
  """The folder json_2.1.1 at or below a path (also below its folder alfworld).

  Raises:
    UserError: there is none.
  """
  path = pathlib.Path(path)
  for folder in (path / 'alfworld' / LAYOUT, path / LAYOUT, path):
    if any((folder / split).is_dir() for split in ('train', 'valid_seen', 'valid_unseen')):
      return folder
  raise UserError(
    f'{path} holds no {LAYOUT}/train, valid_seen or valid_unseen; give the folder above {LAYOUT} '
    "or data='generated'."
  )
