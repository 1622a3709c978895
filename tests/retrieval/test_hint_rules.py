"""What the rules writer reads out of a trace, and out of real games of skills."""

import collections
import random

import pytest

from envs import household_games, household_skills
from retrieval import hint_rules
from tests.retrieval.episodes import EFFECT, LABELLED, REFUSED, episode


def _write(*episodes):
  counts = collections.Counter()
  return hint_rules.write_all(episodes, counts, max_hints=4), counts


@pytest.mark.parametrize('text, goal', [
  ('make a dotted mug.', hint_rules.Goal('mug', 'dotted')),
  ('Your task is to: put a dotted mug in shelf.', hint_rules.Goal('mug', 'dotted', 'shelf')),
  ('put a hot mug in coffeemachine.', hint_rules.Goal('mug', 'hot', 'coffeemachine')),
  ('heat some egg and put it in fridge.', hint_rules.Goal('egg', 'hot', 'fridge')),
  ('put some candle on toilet.', hint_rules.Goal('candle', '', 'toilet')),
  ('put a candle in toilet.', hint_rules.Goal('candle', '', 'toilet')),
  ('find two pen and put them in desk.', hint_rules.Goal('pen', '', 'desk', two=True)),
  ('put two pen in desk.', hint_rules.Goal('pen', '', 'desk', two=True)),
  ('look at cd under the desklamp.', hint_rules.Goal('cd', light='desklamp')),
  ('examine the cd with the desklamp.', hint_rules.Goal('cd', light='desklamp')),
  ('buy a red shirt, price lower than 20.', hint_rules.Goal()),
])
def test_goals(text, goal):
  assert hint_rules.parse_goal(text) == goal


def test_labels_effects_and_refusals():
  (label, effect), counts = _write(
    episode(LABELLED), episode(EFFECT, instruction='make a stiff mug.'))
  assert label[0] == hint_rules.rule_hint('dotted', 'sort', 'kiln', 'open')
  assert hint_rules.rule_hint('salty', 'fold', 'loom') in effect
  assert effect[0] == hint_rules.explore_hint('stiff')
  assert counts['superseded'] == 0
  must = [*EFFECT[:3], ('fold mug 1 with loom 1', 'Nothing happens. The loom 1 must be on.'),
          ('use loom 1', 'You turn on the loom 1.'), EFFECT[3]]
  (texts,), _ = _write(episode(must, instruction='make a salty mug.'))
  assert texts[0] == 'To make {object} salty, fold it with the loom after you use it.'


def test_a_fact_of_one_failure_supersedes_the_advice_of_another():
  (first, second), counts = _write(episode(REFUSED), episode(LABELLED, id='e1'))
  assert not any('dotted' in t for t in first)
  assert second[0] == hint_rules.rule_hint('dotted', 'sort', 'kiln', 'open')
  assert counts['superseded'] == 1
  # Another task type has a bank of its own.
  (alone, _), _ = _write(
    episode(REFUSED), episode(LABELLED, task_type='make_state_then_place'))
  assert alone[0] == hint_rules.explore_hint('dotted')
  assert not any('fan' in text for text in alone)


def test_official_games_are_told_where_they_broke_off():
  took = [('go to desk 1', 'You arrive at desk 1. On the desk 1, you see a mug 2.'),
          ('take mug 2 from desk 1', 'You pick up the mug 2 from the desk 1.')]
  heat = [('heat mug 2 with microwave 1', 'You heat the mug 2 using the microwave 1.')]
  hot = dict(instruction='put a hot mug in shelf.', task_type='pick_heat_then_place_in_recep')
  texts = lambda steps, **kw: _write(episode(steps, **kw))[0][0]
  assert texts(took, **hot) == [
    'Take {object} to the microwave to heat it before placing it in {container}.']
  assert texts(took + heat, **hot) == [
    'Once you hold {object} as asked, go to {container} and move it there.']
  assert texts(took[:1], **hot) == [
    'Take {object} as soon as you see it, before you go elsewhere.']
  assert texts([('go to drawer 1', 'You arrive at drawer 1. The drawer 1 is closed.')], **hot) == [
    'Open each drawer to look for {object} inside.']
  stuck = [('take mug 1 from shelf 1', 'Nothing happens')] * 4
  assert 'Do not repeat an action that changed nothing; try another one.' in texts(stuck, **hot)
  lamp = dict(instruction='look at mug under the desklamp.')
  assert texts(took, **lamp) == ['Hold {object}, go to the desklamp and use it.']


@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_every_fact_read_from_played_games_is_true(rate):
  options = household_games.SkillOptions(precondition_rate=rate)
  table = {r.state: r for r in household_skills.draw('loop', 0, precondition_rate=rate)}
  found = set()
  for number in range(48):
    data = household_games.skill_game('loop', 0, 'train', number, options)
    game, rng, steps = data.game(), random.Random(number), []
    game.reset()
    for _ in range(25):
      commands = game.admissible_commands
      if game.held is not None and rng.random() < 0.2:
        held = game.problem.thing_names[game.held]
        commands = [f'{rng.choice(household_skills.VERBS)} {held} with {name}'
                    for name in game.problem.receptacle_names]
      command = rng.choice(commands)
      steps.append((command, game.step(command)[0]))
    goal = hint_rules.parse_goal(data.instruction)
    assert goal.state == data.params['state_target'] and goal.object
    evidence = hint_rules.read_trace(episode(steps, instruction=data.instruction), goal)
    for state, fact in evidence.facts.items():
      rule = table[state]
      assert (fact.verb, fact.appliance) == (rule.verb, rule.appliance)
      # An effect alone does not show the precondition; a label or a refusal does.
      assert fact.precondition in ('', rule.precondition)
      found.add((state, fact.precondition == rule.precondition))
  assert {state for state, whole in found if whole} == set(table)
