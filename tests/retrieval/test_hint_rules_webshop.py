"""Hints from failed shopping trips: what each trace shows, and nothing that it does not."""

import collections
import re

import pytest

from envs.webshop import WebShopSuite
from retrieval import hint_rules_webshop, hint_writers
from tests.retrieval.episodes import episode

_GOAL = ('Find me dotted mugs with color: red, and size: large, and price lower than 30.00 dollars')
_PAGE = '[Back to Search]\n[< Prev]\ncolor\n{}\nsize\n{}\nMug\nPrice: $20.0\n[Buy Now]'
_RED, _PLAIN = _PAGE.format('[[red]]', '[large]'), _PAGE.format('[red]', '[large]')
_RESULTS = '[Back to Search]\nPage 1 (Total results: 50)\n[Next >]\n[B01]\nMug\n$20.0'
_BOUGHT = 'Thank you for shopping with us! Your score (min 0.0, max 1.0): 0.5000'


def _hints(steps, instruction=_GOAL, **fields):
  return hint_rules_webshop.diagnose(
    episode(steps, instruction=instruction, env='webshop', **fields))


def test_names_of_the_options_that_are_asked():
  assert hint_rules_webshop.asked_options(_GOAL) == ['color', 'size']
  assert hint_rules_webshop.asked_options('Find me mugs with lids with fit type: s') == ['fit type']
  assert hint_rules_webshop.asked_options('Find me mugs, and price lower than 3.00 dollars') == []


def test_options_that_were_not_chosen_come_first():
  hints = _hints([
    ('search[red dotted mug]', _RESULTS), ('click[b01]', _PLAIN), ('click[red]', _RED),
    ('click[buy now]', _BOUGHT)])
  assert hints[0] == 'Click {color} and {size} on the page of {item} before you click buy now.'
  assert 'Read the features' in hints[1]


def test_options_that_were_not_there_and_a_price_that_was_too_high():
  page = 'size\n[[large]]\nMug\nPrice: $45.0\n[Buy Now]'
  hints = _hints([
    ('search[red dotted mug]', _RESULTS), ('click[b01]', page.replace('[[large]]', '[large]')),
    ('click[large]', page), ('click[features]', 'Of clay'), ('click[< prev]', page),
    ('click[buy now]', _BOUGHT)])
  assert hints[:2] == [
    'Buy only an {item} that lets you choose {color}; else go back to the results.',
    'Open only an {item} whose price is below the limit.']
  assert not any('Read the features' in hint for hint in hints)


@pytest.mark.parametrize('steps, words', [
  ([('click[mug]', 'Invalid action.\nWebShop'), ('buy', 'Invalid action.\nWebShop')],
   ['Start with search', 'stands in brackets']),
  ([('search[mug]', _RESULTS), ('click[next >]', _RESULTS)], ['Click the id', 'Search once']),
  ([('search[red mug]', _RESULTS), ('click[b01]', _PLAIN)], ['click buy now']),
  ([('search[zzz y]', '[Back to Search]\nPage 1 (Total results: 0)')], ['Click the id', 'Search']),
])
def test_where_a_trip_broke_off(steps, words):
  hints = _hints(steps)
  for word in words:
    assert any(word in hint for hint in hints), hints


def test_the_writer_takes_the_rules_of_the_environment():
  writer = hint_writers.RulesWriter()
  failed = episode([('search[mug]', _RESULTS)], instruction=_GOAL, env='webshop')
  (hints,) = writer.write([failed])
  assert 0 < len(hints) <= hint_writers.MAX_HINTS
  system = hint_writers.hint_messages(failed, as_json=True)[0]['content']
  assert 'shopping agent' in system and 'household' not in system
  own = episode([('look', 'A door.')], env='my_doors:Suite')
  assert 'household' not in hint_writers.hint_messages(own, as_json=True)[0]['content']


def test_hints_of_played_trips_are_in_the_paper_s_bounds():
  suite, counts, failures = WebShopSuite(num_products=80), collections.Counter(), []
  for task in suite.tasks('train')[:20]:
    environment, steps = suite.make(task), []
    environment.reset()
    # A hasty shopper: the first result, no option.
    for action in ('search[a mug]', f'search[{task.instruction}]', 'click[{}]', 'click[buy now]'):
      if '{}' in action:
        action = next(c for c in environment.admissible_commands() if c.startswith('click[b0'))
      steps.append((action, environment.step(action).observation))
    failures.append(episode(steps, instruction=task.instruction, env='webshop'))
  written = hint_rules_webshop.write_all(failures, counts, max_hints=4)
  assert sum(map(bool, written)) == 20
  for hints in written:
    for hint in hints:
      assert len(hint) <= hint_writers.MAX_CHARACTERS
      assert not re.search(r'b\d{3}|\$\d', hint.lower())
