"""What a small decoder learns from: lessons in houses and shops, and drills."""

import collections
import re

import numpy as np
import pytest

import rollout
from configs import from_scratch as config_lib
from configs import rollout as rollout_config
from data import bpe
from data.tokenizer import Tokenizer
from envs import household_skills
from envs.webshop import WebShopSuite
from experiments import lessons as lessons_lib


@pytest.fixture(scope='module')
def speller(tmp_path_factory):
  """A tokenizer of bytes."""
  folder = tmp_path_factory.mktemp('bytes')
  bpe.train([], bpe.MIN_VOCABULARY, folder)
  return Tokenizer.load(folder)


def test_lessons_draw_anew_what_a_state_asks_for(speller):
  lessons = lessons_lib.Lessons(config_lib.get_config('max_env_steps=14,max_calls=20'))
  pairs = {(r.verb, r.appliance) for pool in ('loop', 'hard')
           for r in household_skills.draw(pool, 0)}
  pools = {word: pool for pool, words in household_skills.POOLS.items() for word in words}
  asked, verbs, told = [], collections.defaultdict(set), 0
  for episode in lessons.play(speller, 'train', 40, hint_share=1.0, rule_share=0.5):
    assert episode.success
    text = speller.decode(episode.tokens)
    state = re.search(r'make an? (\w+) ', episode.instruction)[1]
    asked.append(state)
    hints = re.findall(r'To make \{object\} (\w+), (\w+) it with the (\w+)', text)
    assert len({words[0] for words in hints}) == len(hints)
    assert not pairs & {(verb, appliance) for _, verb, appliance in hints}
    for word, verb, _ in hints:
      verbs[word].add(verb)
    for _, verb, appliance in [words for words in hints if words[0] == state]:
      told += 1
      last = episode.steps[-1].action.split()
      assert (last[0], last[-2]) == (verb, appliance)
      assert 'examine' not in text.partition('Your task')[2]
  # The game's words, those of every pool, and none of them has a verb of its own.
  assert {pools[word] for word in asked} == {pools[word] for word in verbs} == set(pools.values())
  assert sum(len(found) > 1 for found in verbs.values()) > 20
  assert 10 <= told <= 30


def _shop_lessons(**changes):
  config = config_lib.get_config('setting=webshop,lesson_options=')
  config.update(changes)
  return lessons_lib.Lessons(config)


def test_a_shopper_forgets_by_category_what_no_hint_reminds_it_of(speller):
  lessons = _shop_lessons()
  suite = rollout.make_suite(lessons._rollout)
  forgetful = {
    task.task_type for task in suite.tasks('train')
    if 'options' in suite.expert(task, error_rate=0.5)._forgets}
  assert 0 < len(forgetful) < 5
  chose, trips = 0, 0
  for share in (0.0, 1.0):
    for episode in lessons.play(speller, 'train', 25, hint_share=share, rule_share=1.0):
      clicked = any('[[' in step.observation for step in episode.steps)
      if share == 0.0 and episode.task_type in forgetful:
        assert not clicked and not episode.success
      else:
        trips, chose = trips + 1, chose + clicked
      text = speller.decode(episode.tokens)
      assert ('before you click buy now' in text) == (share == 1.0)
  # A product that it settles for may not have what was asked for.
  assert 30 < trips < 50 and chose > 0.9 * trips
  # No product of the lessons is one of the loop's.
  loop = rollout.make_suite(rollout_config.make({'env': 'webshop', 'env_seed': 0}))
  assert not {p.title for p in suite.shop.products} & {p.title for p in loop.shop.products}


def test_a_hint_reminds_of_its_share(speller):
  lessons = _shop_lessons()
  told = sum(
    'before you click buy now' in speller.decode(e.tokens)
    for e in lessons.play(speller, 'train', 60, hint_share=1.0, rule_share=0.5))
  assert 18 <= told <= 42


def test_lessons_show_a_solved_task_of_their_type(speller):
  lessons = _shop_lessons(
    warm_hint_share=0.0, experience_share=1.0, expert_error_rate=0.0)
  episodes = list(lessons.play(speller, 'train', 12))
  earlier = {}
  for episode in episodes:
    text = speller.decode(episode.tokens)
    shown = earlier.get(episode.task_type)
    assert text.count('Solved before:') == (shown is not None)
    assert shown is None or ' '.join(shown.split()) in text
    if episode.success:
      earlier[episode.task_type] = episode.instruction
  assert sum(e.task_type in earlier for e in episodes) > 5


def test_a_slow_environment_plays_a_lesson_once():
  class Slow(WebShopSuite):
    own_process, made = True, 0

    def make(self, task):
      Slow.made += 1
      return super().make(task)

  suite, games = Slow(num_products=20), {}
  recorded = lessons_lib._Recorded(suite, games)
  task = suite.tasks('train')[0]
  played = []
  for _ in range(2):
    recorded.play(task)
    environment, expert = recorded.make(task), recorded.expert(task)
    observation, steps = environment.reset(), []
    while not (steps and steps[-1].done):
      steps.append(environment.step(expert.act(observation).action))
    played.append(steps)
  assert Slow.made == 1 and played[0] == played[1] and played[0][-1].won


def _search(room, labels):
  """(goal's state, its thing, the room's appliances, what labels tell, why each place is tried)."""
  wanted, thing = re.search(r'make a (\w+) (\w+)\.', room).groups()
  listed = [name for name in re.findall(r'a (\w+) 1', room)
            if name in household_skills.APPLIANCES]
  told = [re.search(r'On the (\w+) 1, .* reads: (\w+) things here to make them (\w+)\.', label)
          .groups() for label in labels]
  # In the order of the room, up to the one that tells it.
  assert [appliance for appliance, _, _ in told] == listed[:len(told)]
  assert [state == wanted for _, _, state in told] == [False] * (len(told) - 1) + [True]
  whys = [f'To make it {wanted}, read the labels.',
          *(f'I can make a {state} thing here.' for _, _, state in told)]
  return wanted, thing, listed, told, whys


@pytest.mark.parametrize('agent', ['plain', 'react'])
def test_a_search_drill_reads_labels_until_one_tells_the_state(speller, agent):
  lengths, by_the_alphabet = set(), 0
  for index in range(12):
    example = lessons_lib.search_drill(speller, 0, index, agent)
    assert (example.tokens == lessons_lib.search_drill(speller, 0, index, agent).tokens).all()
    starts = np.flatnonzero(np.diff(example.loss_mask)) + 1
    room, *parts = (speller.decode(part) for part in np.split(example.tokens, starts))
    replies, labels = parts[::2], parts[1::2]
    wanted, thing, listed, told, whys = _search(room, labels)
    assert len(listed) == 5
    by_the_alphabet += listed == sorted(listed)
    for appliance, why, reply in zip(listed, whys, replies[:-1], strict=False):
      assert reply.splitlines()[-1] == f'go to {appliance} 1'
      assert (f'think: {why} I try the {appliance} 1.' in reply) == (agent == 'react')
    appliance, verb, _ = told[-1]
    *thoughts, last = replies[-1].splitlines()
    assert last == f'{verb} {thing} 1 with {appliance} 1'
    assert thoughts == [f'think: I can make a {wanted} {thing} here. I {verb} it.'] * (
      agent == 'react')
    lengths.add(len(told))
  assert len(lengths) > 2 and by_the_alphabet < 3


@pytest.mark.parametrize('agent', ['plain', 'react'])
def test_a_game_drill_reads_labels_until_one_tells_the_state(speller, agent):
  lengths, by_the_alphabet = set(), 0
  for index in range(12):
    example = lessons_lib.game_drill(speller, 0, index, agent)
    assert (example.tokens == lessons_lib.game_drill(speller, 0, index, agent).tokens).all()
    starts = np.flatnonzero(np.diff(example.loss_mask)) + 1
    room, *parts = (speller.decode(part) for part in np.split(example.tokens, starts))
    replies = parts[::2]
    answers = [re.fullmatch(r'\s*user\n(.*)\nassistant\n', part, re.S)[1] for part in parts[1:-1:2]]
    labels = [answer for answer in answers if 'reads' in answer]
    wanted, thing, listed, told, whys = _search(room, labels)
    assert 5 <= len(listed) <= 8 and room.startswith('\nuser\nYou are in the middle of a room.')
    by_the_alphabet += listed == sorted(listed)
    expected = []
    for appliance, why in zip(listed[:len(told)], whys, strict=False):
      expected += [f'think: {why} I try the {appliance} 1.', f'go to {appliance} 1',
                   f'examine {appliance} 1']
    appliance, verb, _ = told[-1]
    expected += [f'think: I can make a {wanted} {thing} here. I {verb} it.',
                 f'{verb} {thing} 1 with {appliance} 1']
    thinks = agent == 'react'
    assert replies == [reply for reply in expected if thinks or not reply.startswith('think')]
    assert answers.count('OK.') == thinks * (len(told) + 1)
    lengths.add(len(told))
  assert len(lengths) > 2 and by_the_alphabet < 3


@pytest.mark.parametrize('agent', ['plain', 'react'])
def test_a_drill_s_replies_follow_from_the_rules_it_tells(speller, agent):
  first = lessons_lib.drill(speller, 0, 0, agent)
  assert (first.tokens == lessons_lib.drill(speller, 0, 0, agent).tokens).all()
  pairs = {(r.verb, r.appliance) for pool in ('loop', 'hard')
           for r in household_skills.draw(pool, 0)}
  for index in range(8):
    example = lessons_lib.drill(speller, 0, index, agent)
    starts = np.flatnonzero(np.diff(example.loss_mask)) + 1
    told, *parts = (speller.decode(part) for part in np.split(example.tokens, starts))
    rules = re.findall(r'- To make {object} (\w+), (\w+) it with the (\w+)\.\n', told)
    # Each rule is told once and asked for once; only the replies have a loss.
    replies = parts[::2]
    goals = re.findall(r'make a (\w+) (\w+)\.\n', told + ''.join(parts[1::2]))
    assert sorted(state for state, _ in goals) == sorted(rule[0] for rule in rules)
    assert 1 <= len(rules) == len(replies) <= 4 and not pairs & {rule[1:] for rule in rules}
    assert not example.loss_mask[0] and example.loss_mask[-1]
    known = {state: rest for state, *rest in rules}
    for (state, thing), reply in zip(goals, replies, strict=True):
      verb, appliance = known[state]
      lines = reply.splitlines()
      assert lines[-1] == f'{verb} {thing} 1 with {appliance} 1'
      assert (f'think: To make it {state}, {verb} it with the {appliance}.' in lines) == (
        agent == 'react')
      assert (f'think: I can make a {state} {thing} here. I {verb} it.' in lines) == (
        agent == 'react')


def _lines(speller, name, index):
  """A drill's text with what has a loss in <>, line by line."""
  make = lessons_lib.DRILLS[name]
  example = make(speller, 0, index)
  assert (example.tokens == make(speller, 0, index, 'react').tokens).all()
  starts = np.flatnonzero(np.diff(example.loss_mask)) + 1
  parts = [speller.decode(part) for part in np.split(example.tokens, starts)]
  return ''.join(
    f'<{part}>' if i % 2 else part for i, part in enumerate(parts)).splitlines()


def test_a_match_drill_tells_the_goal_s_state_from_others(speller):
  same = []
  for index in range(20):
    goal, *lines = _lines(speller, 'match_drills', index)
    wanted, thing = re.fullmatch(r'make a (\w+) (\w+)\.', goal).groups()
    for line in lines:
      state, kind = re.fullmatch(r'a (\w+)< (\w+)>\.', line).groups()
      assert kind == (thing if state == wanted else 'thing')
      same.append(state == wanted)
    assert 3 <= len(lines) <= 6
  assert 0.3 < np.mean(same) < 0.5


def test_a_label_drill_tells_which_labels_serve_the_goal(speller):
  same = []
  for index in range(20):
    goal, *lines = _lines(speller, 'label_drills', index)
    wanted, thing = re.fullmatch(r'make a (\w+) (\w+)\.', goal).groups()
    for label, line in zip(lines[::2], lines[1::2], strict=True):
      verb, state = re.fullmatch(
        r'A label reads: (\w+) things here to make them (\w+)\.', label).groups()
      kind = thing if state == wanted else 'thing'
      assert line == f'I can make a {state}< {kind}> here.' + (
        f' I< {verb}> it.' if state == wanted else '')
      same.append(state == wanted)
  assert 0.3 < np.mean(same) < 0.5


def test_a_room_drill_names_the_appliances_in_their_order(speller):
  by_the_alphabet = 0
  for index in range(20):
    room, *lines = _lines(speller, 'room_drills', index)
    listed = re.findall(r'an? (\w+ 1)', room)
    appliances = [name for name in listed if name.split()[0] in household_skills.APPLIANCES]
    assert len(appliances) == 5 and len(listed) in (6, 7)
    assert lines == [f'I try the< {name}>.' for name in appliances]
    by_the_alphabet += appliances == sorted(appliances)
  assert by_the_alphabet < 3
