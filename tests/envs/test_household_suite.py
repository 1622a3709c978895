"""The suite: what an agent sees of a household task."""

import collections
import dataclasses
import subprocess
import sys

import pytest

import envs
from data.errors import UserError
from envs import household_files, household_official
from envs.household import NOTHING


def won(suite, task, max_steps=50, **options):
  environment = suite.make(task)
  observation = environment.reset()
  expert = suite.expert(task, **options)
  for _ in range(max_steps):
    result = environment.step(expert.act(observation).action)
    observation = result.observation
    if result.done:
      return result.won
  return False


def test_tasks_are_generated_and_played():
  suite = envs.get_suite('household', skills='loop', num_train=8, num_valid=4)
  assert suite.splits == ('train', 'valid_seen', 'valid_unseen')
  assert [len(suite.tasks(split)) for split in suite.splits] == [8, 4, 4]
  task = suite.tasks('valid_unseen')[1]
  assert task.env == 'household' and task.split == 'valid_unseen'
  assert task.task_type == 'make_state_then_place' and task.instruction.startswith('put a ')
  assert '{verb} {object} with {receptacle}' in suite.action_templates
  room = suite.make(task).reset()
  assert room.startswith('You are in the middle of a room.') and room.endswith('.')
  assert 'task' not in room and '-=' not in room
  assert all(won(suite, task, known_rules=suite.rules(task)) for task in suite.tasks('train'))


def test_results_tell_invalid_and_idle_actions_apart():
  suite = envs.get_suite('household', skills='loop', num_train=1)
  environment = suite.make(suite.tasks('train')[0])
  environment.reset()
  first = next(c for c in environment.admissible_commands() if c.startswith('go to'))
  result = environment.step('dance')
  assert (result.observation, result.valid, result.changed) == (NOTHING, False, False)
  result = environment.step(first)
  assert result.valid and result.changed and not result.done and result.reward == 0.0
  place = first.removeprefix('go to ')
  result = environment.step(f'examine {place}')
  assert result.valid and result.changed  # news
  result = environment.step(f'examine {place}')
  assert result.valid and not result.changed
  result = environment.step(first)
  assert not result.valid and not result.changed
  environment.reset()
  assert environment.step(first).changed


def test_task_types_and_sizes_are_options():
  suite = envs.get_suite(
    'household', skills='hard', task_types=['make_state'], num_train=5, num_appliances=8,
    num_surfaces=1,
  )  # fmt: skip
  for task in suite.tasks('train'):
    assert task.task_type == 'make_state' and len(suite.rules(task)) == 8
  official = envs.get_suite('household', num_train=12, task_types=['pick_two_obj_and_place'])
  assert {task.task_type for task in official.tasks('train')} == {'pick_two_obj_and_place'}


def test_written_games_are_read_again(tmp_path):
  command = [sys.executable, '-m', 'envs.household_generate', f'--out={tmp_path}', '--skills=loop']
  subprocess.run([*command, '--num_train=3', '--num_valid=2'], check=True, capture_output=True)
  suite = envs.get_suite('household', data=str(tmp_path))
  assert [len(suite.tasks(split)) for split in suite.splits] == [3, 2, 2]
  memory = envs.get_suite('household', skills='loop', num_train=3, num_valid=2)
  for split in suite.splits:
    made_by_id = {task.id: task for task in memory.tasks(split)}
    assert made_by_id.keys() == {task.id for task in suite.tasks(split)}
    for read in suite.tasks(split):
      made = made_by_id[read.id]
      assert read.instruction == made.instruction
      assert suite.make(read).reset() == memory.make(made).reset()
      assert suite.rules(read) == memory.rules(made)
      assert won(suite, read)


def write_games(root, counts, split='train'):
  """Writes so many games of each official type; all have one problem, which nobody plays."""
  game = household_official.official_game(0, split, 0)
  for task_type, count in counts.items():
    for index in range(count):
      household_files.write_game(root, dataclasses.replace(
        game, id=f'{split}/{task_type}-Mug-None-Shelf-{index}/trial_{index}'), [])


def test_the_first_games_on_disk_are_of_all_types(tmp_path, monkeypatch):
  types = household_official.TASK_TYPES
  write_games(tmp_path, {task_type: 2 + 3 * i for i, task_type in enumerate(types)})
  every = [t.id for t in envs.get_suite('household', data=str(tmp_path)).tasks('train')]
  assert len(every) == len(set(every)) == 57
  kinds = [id_.split('/')[1].partition('-')[0] for id_ in every]
  # The types take turns for as long as they last.
  assert kinds[:12] == sorted(types) * 2 and len(set(kinds[12:17])) == 5
  # Within a type the order is none that the files' names or numbers have.
  longest = [id_ for id_, kind in zip(every, kinds) if kind == types[-1]]
  assert longest != sorted(longest)

  opened = []
  load = household_files.load_game
  monkeypatch.setattr(
    household_files, 'load_game', lambda folder: opened.append(folder) or load(folder))
  first = envs.get_suite('household', data=str(tmp_path), num_train=8).tasks('train')
  assert [task.id for task in first] == every[:8] and len(opened) == 8
  some = envs.get_suite('household', data=str(tmp_path), num_train=5, task_types=types[1:3])
  turns = sorted(types[1:3])
  assert [task.task_type for task in some.tasks('train')] == [*turns, *turns, turns[0]]


def test_games_left_out_do_not_cost_their_type_its_turn(tmp_path):
  write_games(tmp_path, dict.fromkeys(household_official.TASK_TYPES, 3))
  kind = household_official.TASK_TYPES[0]
  folders = sorted((tmp_path / household_files.LAYOUT / 'train').glob(f'{kind}-*/*'))
  for folder in folders[:2]:
    path = folder / household_files.GAME_FILE
    path.write_text(path.read_text().replace('"solvable": true', '"solvable": false'))
  suite = envs.get_suite('household', data=str(tmp_path), num_train=6)
  assert {t.task_type for t in suite.tasks('train')} == set(household_official.TASK_TYPES)
  assert suite.skipped['unsolvable'] <= 2


def test_the_first_real_games_are_of_all_types(hintsight_data):
  suite = envs.get_suite('household', data=str(hintsight_data), num_train=300, num_valid=12)
  for split in ('valid_seen', 'train'):
    found = [task.task_type for task in suite.tasks(split)]
    assert found[:12] == sorted(household_official.TASK_TYPES) * 2


@pytest.mark.parametrize(
  'split, count',
  [('valid_seen', 140), ('train', 150), pytest.param('train', 3553, marks=pytest.mark.slow)],
)
def test_the_expert_wins_real_games(hintsight_data, split, count):
  suite = envs.get_suite('household', data=str(hintsight_data), num_train=count, num_valid=count)
  tasks = suite.tasks(split)
  assert len(tasks) == count
  wins = collections.defaultdict(list)
  for task in tasks:
    wins[task.task_type].append(won(suite, task))
  assert wins.keys() == set(household_official.TASK_TYPES)
  # Of every type, not only of all together.
  rates = {task_type: sum(of_type) / len(of_type) for task_type, of_type in wins.items()}
  assert min(rates.values()) >= 0.9, rates
  assert sum(map(sum, wins.values())) >= 0.95 * count, rates


def test_textworld_plays_a_suite():
  pytest.importorskip('alfworld', reason='the official engine is not installed')
  options = dict(num_train=1, num_receptacles=(6, 8), task_types=['pick_and_place_simple'])
  fast = envs.get_suite('household', **options)
  slow = envs.get_suite('household', engine='textworld', **options)
  task = slow.tasks('train')[0]
  assert task == fast.tasks('train')[0]
  one, other = fast.make(task), slow.make(task)
  assert one.reset() == other.reset()
  for command in (*one.admissible_commands()[:2], 'dance', 'look'):
    assert one.step(command) == other.step(command)
  assert one.admissible_commands() == other.admissible_commands()


def test_a_missing_textworld_is_one_sentence(monkeypatch):
  monkeypatch.setitem(sys.modules, 'textworld', None)
  suite = envs.get_suite('household', engine='textworld', num_train=1)
  with pytest.raises(UserError, match='pip install'):
    suite.make(suite.tasks('train')[0])


@pytest.mark.parametrize(
  'options, word',
  [
    ({'name': 'garden'}, 'garden'),
    ({'skill': 'loop'}, 'skills'),
    ({'skills': 'lop'}, 'lop'),
    ({'engine': 'slow'}, 'engine'),
    ({'engine': 'textworld', 'skills': 'loop'}, 'official'),
    ({'data': '/nowhere'}, '/nowhere'),
    ({'num_surfaces': (1, 2, 3), 'skills': 'loop'}, 'num_surfaces'),
    ({'num_train': -1}, 'num_train'),
    ({'precondition_rate': 2.0, 'skills': 'loop'}, 'precondition_rate'),
    ({'task_types': ['make_state']}, 'make_state'),
    ({'task_types': 'make_state'}, "not .'make_state'"),
    ({'task_types': 3}, 'task_types'),
    ({'task_types': ['make_state', 3], 'skills': 'loop'}, 'task_types'),
    ({'num_train': 'abc'}, "num_train must be .*'abc'"),
    ({'num_train': (1, 2)}, 'num_train must be'),
    ({'num_valid': 2.5}, 'num_valid must be'),
    ({'num_train': True}, 'num_train must be'),
    ({'seed': 'abc'}, 'seed must be'),
    ({'seed': (1, 2)}, 'seed must be'),
    ({'precondition_rate': 'high', 'skills': 'loop'}, 'precondition_rate must be'),
    ({'precondition_rate': float('nan'), 'skills': 'loop'}, 'precondition_rate'),
    ({'num_things': 'many', 'skills': 'loop'}, 'num_things must be'),
    ({'num_things': 2.5, 'skills': 'loop'}, 'num_things must be'),
    ({'num_things': (True, 3), 'skills': 'loop'}, 'num_things must be'),
    ({'num_things': (3, 2), 'skills': 'loop'}, 'num_things must be'),
    ({'num_receptacles': 'all'}, 'num_receptacles must be'),
    ({'skills': ['loop']}, 'skills must be'),
  ],
)
def test_bad_options_are_one_sentence(options, word):
  with pytest.raises(UserError, match=word):
    envs.get_suite(options.pop('name', 'household'), **options)


def test_one_task_type_may_be_a_string():
  suite = envs.get_suite('household', skills='loop', task_types='make_state', num_train=4)
  assert {task.task_type for task in suite.tasks('train')} == {'make_state'}


def test_an_unknown_split_is_one_sentence():
  with pytest.raises(UserError, match='test'):
    envs.get_suite('household').tasks('test')
