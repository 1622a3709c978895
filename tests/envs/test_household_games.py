"""Generated games: deterministic, disjoint between splits, winnable, the same on disk."""

import collections
import itertools
import json
import re

import hypothesis
import pytest
from hypothesis import strategies as st

import envs
from data.errors import UserError
from envs import household_files, household_games, household_official, household_skills
from envs.base import Task
from envs.household import OFFICIAL, Problem
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
  assert [len(household_skills.POOLS[pool]) for pool in POOLS] == [24, 12, 12, 32]
  words = [*states, *household_skills.VERBS, *household_skills.APPLIANCES]
  assert len(set(words)) == len(words) == 144
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
  easy = household_skills.draw('easy', seed)
  assert easy == household_skills.draw('easy', seed, 5)
  for table in (loop, hard, easy):
    assert len({rule.appliance for rule in table}) == len(table)
  kept = {(rule.verb, rule.appliance) for rule in loop + hard}
  assert len(kept) == 24
  assert not kept & {(rule.verb, rule.appliance) for rule in easy}
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
def test_the_same_key_gives_the_same_game(pool):
  make = official_game if pool == 'official' else lambda *key: skill_game(pool, *key)
  games = [make(0, split, index) for split in SPLITS for index in range(10)]
  assert len({game.id for game in games}) == len({game.problem for game in games}) == 30
  assert make(0, 'train', 7) == games[7]
  assert make(1, 'train', 7).problem != games[7].problem


def layouts(games):
  """Houses and placements as the problems' texts state them; no id is part of either.

  A house is which kinds of receptacles there are and how many of each; a placement is a house with
  the kinds of things that stand in each of its receptacles.
  """
  houses, placements = set(), set()
  for game in games:
    problem = Problem(game.problem)
    kinds = problem.receptacle_types
    inside = [sorted(problem.thing_types[i] for i in things) for things in problem.contents]
    houses.add(tuple(sorted(kinds)))
    placements.add(tuple(sorted(zip(kinds, map(tuple, inside)))))
  return houses, placements


def suite_of(skills, seed, size):
  """Forty games a split; houses of the least `size` are so small that they come again."""
  options = {'num_receptacles': (5 + size, 10 + size)}
  if skills != 'official':
    options = {'num_appliances': (1 + size, 2 + size), 'num_surfaces': (1, size)}
  return envs.get_suite(
    'household', skills=skills, seed=seed, num_train=40, num_valid=40, **options)


@hypothesis.given(
  skills=st.sampled_from([*POOLS, 'official']),
  seeds=st.tuples(*[st.integers(0, 2**31)] * 2),
  sizes=st.tuples(*[st.integers(1, 4)] * 2),
)
def test_houses_and_placements_of_splits_are_disjoint(skills, seeds, sizes):
  # Whatever the seeds and sizes: a student may be trained on one seed and evaluated on another.
  suites = [suite_of(skills, seed, size) for seed, size in zip(seeds, sizes)]
  found = [{split: layouts(suite.games(split)) for split in SPLITS} for suite in suites]
  for one, other in itertools.permutations(SPLITS, 2):
    for here, there in itertools.product(found, repeat=2):
      houses, placements = zip(here[one], there[other])
      assert houses[0].isdisjoint(houses[1])
      assert placements[0].isdisjoint(placements[1])


@pytest.mark.parametrize('skills', ['loop', 'official'])
def test_without_the_hash_of_houses_splits_would_overlap(monkeypatch, skills):
  monkeypatch.setattr(household_games, 'in_split', lambda receptacles, split: True)
  suites = [suite_of(skills, seed, 1) for seed in range(4)]
  (houses, _), (others, _) = (
    layouts([game for suite in suites for game in suite.games(split)])
    for split in ('train', 'valid_unseen'))
  assert len(houses & others) >= 3


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


def test_types_of_things_can_be_few_and_leave_the_rest_of_a_house_as_it_is():
  few = SkillOptions(num_things=(2, 3), thing_types=3)
  kinds = household_games.SKILL_THINGS[:3]
  games = [skill_game('easy', 0, 'train', index, few) for index in range(60)]
  assert {thing.type for game in games for thing in game.house.things} == set(kinds)
  every = SkillOptions(num_things=(2, 3))
  for index, game in enumerate(games[:10]):
    other = skill_game('easy', 0, 'train', index, every)
    assert other.house.receptacles == game.house.receptacles and other.rules == game.rules
  for bad in (dict(thing_types=0), dict(thing_types=99), dict(num_things=(2, 4), thing_types=3)):
    with pytest.raises(UserError, match=r'num_thing_types must|num_things can'):
      SkillOptions(**bad)


def test_an_expert_in_order_goes_through_the_room_as_it_is_listed():
  follows, searches = collections.Counter(), collections.Counter()
  for index in range(20):
    game = skill_game('easy', 0, 'train', index)
    task = Task(game.id, 'household', 'train', game.task_type, game.instruction, {})
    names = re.findall(r'\ba (\w+ \d+)', game.game().reset())
    listed = [name for name in names if name.split()[0] in household_skills.APPLIANCES]
    furniture = [name for name in names if name not in listed]
    for in_order in (False, True):
      environment, expert = game.game(), Expert(task, in_order=in_order)
      observation, won, tried, searched = environment.reset(), False, [], []
      while not won:
        action = expert.act(observation).action
        if (place := action.removeprefix('go to ')) in furniture and not tried:
          searched.append(place)
        if action.startswith('examine'):
          tried.append(action.removeprefix('examine '))
        observation, won = environment.step(action)
      follows[in_order] += tried == listed[:len(tried)]
      searches[in_order] += searched == furniture[:len(searched)]
  assert follows[True] == 20 > 10 > follows[False]
  assert searches[True] == 20 > searches[False]


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
