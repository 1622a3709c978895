"""The fast engine against the recorded expert and its own rules."""

import json
import random

import pytest

from data.errors import UserError
from envs import household, household_files, household_games
from envs.household import NOTHING, Game, Rule


def test_replays_the_recorded_expert(hintsight_data):
  layout = household_files.find_layout(hintsight_data)
  lines = (layout.parent / 'expert_train.jsonl').read_text().splitlines()
  assert len(lines) > 3000
  for line in lines[::25]:
    episode = json.loads(line)
    game = household_files.load_game(layout / episode['id']).game()
    assert game.reset() == episode['initial_obs']
    for number, (command, observation) in enumerate(episode['steps'], 1):
      won = episode['won'] and number == len(episode['steps'])
      assert game.step(command) == (observation, won), episode['id']


RULES = (
  Rule('glazed', 'fire', 'kiln', 'open'),
  Rule('woven', 'spin', 'loom', 'closed'),
  Rule('shiny', 'press', 'mill', 'on'),
  Rule('round', 'roll', 'drum'),
)


@pytest.fixture
def house():
  receptacles = (
    household_games.Receptacle('Kiln', openable=True),
    household_games.Receptacle('Loom', openable=True, opened=True),
    household_games.Receptacle('Mill', switchable=True),
    household_games.Receptacle('Drum'),
    household_games.Receptacle('Shelf'),
  )
  things = (household_games.Thing('Mug', 4), household_games.Thing('Cup', 4))
  goal = '(exists (?o - object) (and (objectType ?o MugType) (hasState ?o glazed)))'
  text = household_games.problem_text(
    'plan', household_games.House(receptacles, things), goal,
    [('Shelf', 'Mug'), ('Shelf', 'Cup')], {'Mug': ('pickupable',), 'Cup': ('pickupable',)},
    random.Random(0),
  )  # fmt: skip
  return Game(text, 'make a glazed mug.', RULES)


def play(game, *commands):
  return [game.step(command)[0] for command in commands]


def test_a_house_of_skills_explains_what_went_wrong(house):
  assert play(house, 'fire mug 1 with kiln 1')[0] == f'{NOTHING} You are not at the kiln 1.'
  play(house, 'go to kiln 1')
  assert play(
    house, 'press mug 1 with kiln 1', 'fire mug 1 with kiln 1', 'fire mug 9 with kiln 1',
    'fly mug 1 with kiln 1 with kiln 1',
  ) == [
    f'{NOTHING} The kiln 1 can only fire things.',
    f'{NOTHING} You are not holding the mug 1.',
    NOTHING,
    NOTHING,
  ]  # fmt: skip
  play(house, 'go to shelf 1', 'take mug 1 from shelf 1')
  assert play(
    house, 'fire mug 1 with shelf 1', 'move cup 1 to shelf 1', 'go to kiln 1',
    'fire mug 1 with kiln 1', 'examine mug 1', 'examine kiln 1',
  ) == [
    NOTHING,
    f'{NOTHING} You are not holding the cup 1.',
    'You arrive at kiln 1. The kiln 1 is closed.',
    f'{NOTHING} The kiln 1 must be open.',
    "There's nothing special about mug 1.",
    'The kiln 1 is closed. A label reads: fire things here while it is open to make them glazed.',
  ]  # fmt: skip
  assert not house.won
  play(house, 'open kiln 1')
  assert house.step('fire mug 1 with kiln 1') == (
    'You fire the mug 1 with the kiln 1. It is now glazed.', True)  # fmt: skip


def test_other_rules_really_work_and_preconditions_are_checked(house):
  play(house, 'go to shelf 1', 'take mug 1 from shelf 1')
  assert play(
    house, 'go to drum 1', 'roll mug 1 with drum 1', 'examine drum 1', 'go to loom 1',
    'spin mug 1 with loom 1', 'close loom 1', 'spin mug 1 with loom 1', 'go to mill 1',
    'press mug 1 with mill 1', 'use mill 1', 'press mug 1 with mill 1', 'use mill 1',
    'examine mug 1',
  ) == [
    'You arrive at drum 1. On the drum 1, you see nothing.',
    'You roll the mug 1 with the drum 1. It is now round.',
    'On the drum 1, you see nothing. A label reads: roll things here to make them round.',
    'You arrive at loom 1. The loom 1 is open. In it, you see nothing.',
    f'{NOTHING} The loom 1 must be closed.',
    'You close the loom 1.',
    'You spin the mug 1 with the loom 1. It is now woven.',
    'You arrive at mill 1. On the mill 1, you see nothing.',
    f'{NOTHING} The mill 1 must be on.',
    'You turn on the mill 1.',
    'You press the mug 1 with the mill 1. It is now shiny.',
    'You turn off the mill 1.',
    'This is a round and shiny and woven mug 1.',
  ]  # fmt: skip
  assert not house.won


def test_admissible_commands_are_those_that_do_something(house):
  rng = random.Random(1)
  for _ in range(200):
    admissible = house.admissible_commands
    assert admissible == sorted(set(admissible))
    observation, _ = house.step(rng.choice(admissible))
    assert not observation.startswith(NOTHING)


def test_reset_forgets_everything(house):
  first = house.reset()
  play(house, 'go to kiln 1', 'open kiln 1', 'go to shelf 1', 'take mug 1 from shelf 1')
  assert house.reset() == first
  assert play(house, 'inventory', 'go to kiln 1')[1] == (
    'You arrive at kiln 1. The kiln 1 is closed.')  # fmt: skip


def test_names_are_numbered_downwards_and_basins_are_named():
  ids = ['mug_bar_b', 'mug_bar_a', 'sink_bar_x_bar_sinkbasin', 'agent1']
  assert household.demangle(ids) == {
    'mug_bar_a': 'mug 2', 'mug_bar_b': 'mug 1', 'sink_bar_x_bar_sinkbasin': 'sinkbasin 1',
  }  # fmt: skip


@pytest.mark.parametrize(
  'text',
  ['', '(define', '(:init (atLocation a l)) (:goal (and))', '(:init'],
)
def test_no_problem_is_one_sentence(text):
  with pytest.raises(UserError):
    Game(text, 'nothing.')


def test_goals_that_the_game_does_not_know_are_named(house):
  text = household_games.skill_game('loop', 0, 'train', 0).problem
  with pytest.raises(UserError, match='unknown predicate: tasty'):
    Game(text.replace('hasState', 'tasty'), 'x.', RULES)
  with pytest.raises(UserError, match='cut off'):
    Game(text[: text.index('(:goal') + 40], 'x.', RULES)
