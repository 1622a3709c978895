"""Generated games: deterministic, disjoint between splits, winnable, the same on disk."""

import collections
import itertools
import json

import pytest

from data.errors import UserError
from envs import household_files, household_official, household_skills
from envs.base import Task
from envs.household import OFFICIAL
from envs.household_expert import Expert
from envs.household_games import SPLITS, SkillOptions, skill_game
from envs.household_generate import walkthrough
from envs.household_official import OfficialOptions, official_game

POOLS = tuple(household_skills.POOLS)


def play(data, known_rules=(), max_steps=50, **options):
  """Lets the expert play; returns the number of steps, 0 if it did not win."""
  game = data.game()
  observation = game.reset()
  task = Task(data.id, 'household', 'train', data.task_type, data.instruction, {})
  expert = Expert(task, known_rules, **options)
  for step in range(1, max_steps + 1):
    observation, won = game.step(expert.act(observation).action)
    if won:
      return step
  return 0


def test_pools_are_disjoint_and_no_word_is_used_twice():
  states = list(itertools.chain(*household_skills.POOLS.values()))
  assert [len(household_skills.POOLS[pool]) for pool in POOLS] == [24, 12, 12]
  words = [*states, *household_skills.VERBS, *household_skills.APPLIANCES]
  assert len(set(words)) == len(words) == 112
  official = {'hot', 'cool', 'cold', 'clean', 'sliced', 'open', 'closed', 'on', 'off'}
  official |= {'heat', 'slice', 'use', 'take', 'move', 'go', 'examine', 'look', 'inventory', 'help'}
  official |= {name.lower() for name in household_official.FITS}
  official |= {name.lower() for fits in household_official.FITS.values() for name in fits}
  assert not official & set(words)


@pytest.mark.parametrize('seed', range(3))
def test_warm_rules_change_and_never_give_the_others_away(seed):
  loop = household_skills.draw('loop', seed)
  hard = household_skills.draw('hard', seed)
  assert loop == household_skills.draw('loop', seed, 5)
  for table in (loop, hard):
    assert len({rule.appliance for rule in table}) == len(table)
  kept = {(rule.verb, rule.appliance) for rule in loop + hard}
  assert len(kept) == 24
  seen = collections.defaultdict(set)
  for episode in range(100):
    for rule in household_skills.draw('warm', seed, episode):
      assert (rule.verb, rule.appliance) not in kept
      seen[rule.state].add((rule.verb, rule.appliance))
  assert min(map(len, seen.values())) > 80


def test_preconditions_do_not_change_the_rules():
  plain = household_skills.draw('loop', 0)
  some = household_skills.draw('loop', 0, precondition_rate=1.0)
  assert all(rule.precondition in household_skills.PRECONDITIONS for rule in some)
  assert [(r.state, r.verb, r.appliance) for r in plain] == [
    (r.state, r.verb, r.appliance) for r in some]  # fmt: skip


@pytest.mark.parametrize('pool', [*POOLS, 'official'])
def test_houses_and_placements_of_splits_are_disjoint(pool):
  make = official_game if pool == 'official' else lambda *key: skill_game(pool, *key)
  games = {split: [make(0, split, index) for index in range(60)] for split in SPLITS}
  for signature in ('signature', 'placement'):
    found = {s: {getattr(g.house, signature)() for g in games[s]} for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
      assert not found[one] & found[other]
  assert len({game.id for split in SPLITS for game in games[split]}) == 180
  # The same key gives the same game, another seed another one.
  assert make(0, 'train', 7) == games['train'][7]
  assert make(1, 'train', 7).problem != games['train'][7].problem


@pytest.mark.parametrize('pool', POOLS)
def test_every_state_is_asked_equally_often(pool):
  states = household_skills.POOLS[pool]
  games = [skill_game(pool, 0, 'train', index) for index in range(4 * len(states))]
  asked = collections.Counter((g.task_type, g.params['state_target']) for g in games)
  assert set(asked.values()) == {2} and len(asked) == 2 * len(states)


@pytest.mark.parametrize('rate', [0.0, 1.0])
@pytest.mark.parametrize('pool', POOLS)
def test_the_expert_wins_and_rules_spare_it_the_search(pool, rate):
  options = SkillOptions(precondition_rate=rate)
  games = [skill_game(pool, 3, 'train', index, options) for index in range(30)]
  alone = [play(game) for game in games]
  told = [play(game, game.rules) for game in games]
  assert all(alone) and all(told)
  assert sum(told) < 0.7 * sum(alone)
  for game in games:
    present = game.house.signature().lower().split()
    assert all(rule.appliance in present for rule in game.rules)
    assert 4 <= len(game.rules) <= 6


def test_a_wrong_rule_does_not_stop_the_expert():
  game = skill_game('loop', 0, 'train', 0)
  state = game.params['state_target']
  absent = next(a for a in household_skills.APPLIANCES if a not in game.problem.lower())
  assert play(game, [household_skills.Rule(state, 'spin', absent)])


def test_an_erring_expert_fails_more_often():
  games = [skill_game('hard', 0, 'train', index) for index in range(30)]
  wins = [sum(play(g, max_steps=20, error_rate=rate) > 0 for g in games) for rate in (0.0, 0.5)]
  assert wins[0] == 30 and wins[1] < 20
  assert play(games[0], error_rate=0.5, seed=4) == play(games[0], error_rate=0.5, seed=4)


def test_official_tasks_are_winnable_and_not_won_at_once():
  games = [official_game(0, 'valid_unseen', index) for index in range(60)]
  assert len({game.task_type for game in games}) == 6
  for game in games:
    assert play(game) > 1, game.id
    assert 6 <= len(game.house.receptacles) <= 30


@pytest.mark.parametrize('size', [6, 30])
def test_official_houses_can_be_small_and_large(size):
  options = OfficialOptions(num_receptacles=(size, size))
  games = [official_game(0, 'train', index, options) for index in range(12)]
  assert sum(len(game.house.receptacles) == size for game in games) >= 6


@pytest.mark.parametrize('make', [official_game, lambda *key: skill_game('loop', *key)])
def test_a_game_on_disk_is_the_game_in_memory(tmp_path, make):
  data = make(0, 'train', 1)
  folder = household_files.write_game(tmp_path, data, walkthrough(data))
  read = household_files.load_game(folder)
  assert (read.id, read.task_type, read.instruction) == (
    data.id, data.task_type, data.instruction)  # fmt: skip
  assert (read.problem, read.rules) == (data.problem, data.rules)
  content = json.loads((folder / 'game.tw-pddl').read_text())
  assert ('rules' in content) == (data.rules != OFFICIAL)
  game = read.game()
  for command in content['walkthrough']:
    game.step(command)
  assert game.won
  trajectory = json.loads((folder / 'traj_data.json').read_text())
  assert trajectory['task_type'] == data.task_type


@pytest.mark.parametrize(
  'damage, word',
  [
    (lambda text: text[:1000], 'not complete JSON'),
    (lambda text: '[]', 'JSON object'),
    (lambda text: json.dumps({**json.loads(text), 'pddl_problem': ''}), 'pddl_problem'),
    (lambda text: json.dumps({**json.loads(text), 'grammar': None}), 'goal sentence'),
    (lambda text: json.dumps({**json.loads(text), 'rules': [{'verb': 'fry'}]}), 'rules'),
  ],
)
def test_a_damaged_game_is_named(tmp_path, damage, word):
  data = skill_game('loop', 0, 'train', 0)
  path = household_files.write_game(tmp_path, data, []) / 'game.tw-pddl'
  path.write_text(damage(path.read_text()))
  with pytest.raises(UserError, match=word) as error:
    household_files.load_game(path.parent)
  assert str(path) in str(error.value)


def test_a_damaged_problem_and_a_missing_file_are_named(tmp_path):
  data = official_game(0, 'train', 0)
  path = household_files.write_game(tmp_path, data, []) / 'game.tw-pddl'
  content = json.loads(path.read_text())
  content['pddl_problem'] = content['pddl_problem'][:2000]
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=r'game\.tw-pddl'):
    household_files.load_game(path.parent).game()
  path.unlink()
  with pytest.raises(UserError, match='is missing'):
    household_files.load_game(path.parent)


def test_settings_without_houses_are_refused():
  with pytest.raises(UserError, match='num_appliances'):
    SkillOptions(num_appliances=(5, 4))
  with pytest.raises(UserError, match='appliances'):
    skill_game('loop', 0, 'train', 0, SkillOptions(num_appliances=(13, 13)))
  with pytest.raises(UserError, match='pool'):
    household_skills.draw('cold', 0)
  with pytest.raises(UserError, match='num_receptacles'):
    OfficialOptions(num_receptacles=(2, 5))
  with pytest.raises(UserError, match='Official task types'):
    OfficialOptions(task_types=('fly',))
