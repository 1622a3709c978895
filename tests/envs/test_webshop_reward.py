"""WebShop's reward: every branch by hand, and what must hold for any purchase."""

import random

import hypothesis
import pytest
from hypothesis import strategies as st

from envs import webshop_generate, webshop_reward
from envs.webshop_reward import matched_attributes, matched_options, reward, type_factor
from tests.envs.webshop_products import goal, product

_TABLE = product(title='Oak Coffee Table', query='coffee tables')


@pytest.mark.parametrize('title, query, category, factor', [
  # The same search word, two shared parts of the category path, or nouns in common.
  ('Steel Table', 'coffee tables', 'Office › Desks', 1.0),
  ('Steel Table', 'desks', 'Home › Furniture › Desks', 1.0),
  ('Coffee Table', 'desks', 'Office › Desks', 1.0),
  # None of the title's nouns: whatever else is equal.
  ('Lamp', 'coffee tables', 'Home › Furniture › Tables', 0.0),
])
def test_kinds_of_products(title, query, category, factor):
  bought = product(title=title, query=query, product_category=category)
  assert type_factor(bought, _TABLE) == factor


def test_few_shared_nouns_count_half_or_a_tenth(monkeypatch):
  nouns = {'wanted': tuple('abcdefghijklmnopqrst'), 'half': ('a', 'b', 'c'), 'tenth': ('a',)}
  monkeypatch.setattr(webshop_reward, 'nouns', nouns.__getitem__)
  wanted = product(title='wanted')
  other = {'query': 'desks', 'product_category': 'Office › Desks'}
  # Three of twenty nouns are 0.15: neither above 0.2 nor below 0.1; one is 0.05.
  assert type_factor(product(title='half', **other), wanted) == 0.5
  assert type_factor(product(title='half'), wanted) == 1.0
  assert type_factor(product(title='tenth', **other), wanted) == 0.1
  assert type_factor(product(title='tenth'), wanted) == 0.1


def test_a_title_without_nouns_is_decided_by_search_word_and_category(monkeypatch):
  monkeypatch.setattr(webshop_reward, 'nouns', lambda title: ())
  assert type_factor(product(), product()) == 1.0
  assert type_factor(product(query='x', product_category='y'), product()) == 0.5


def test_nouns_of_titles():
  found = webshop_reward.nouns("Women's Long Sleeve Casual Blouse for Work, Black")
  assert {'sleeve', 'blouse', 'work'} <= set(found)
  assert not {'long', 'casual', 'for', ','} & set(found)
  assert webshop_reward.nouns('') == ()


@pytest.mark.parametrize('fields, matches', [
  ({'attributes': ('solid wood',)}, 1),
  ({'attributes': ('wood, solid and dark',)}, 1),  # the same words in another order
  ({'attributes': ('solid steel',)}, 0),
  ({'title': 'Table of SOLID WOOD'}, 1),
  ({'bullets': ('Legs', 'Solid wood top')}, 1),
  ({'description': 'It is of solid wood.'}, 1),
  ({'description': 'Solid. Wood.'}, 0),
])
def test_attributes(fields, matches):
  assert matched_attributes(product(**fields), ['solid wood']) == matches


@pytest.mark.parametrize('chosen, asked, matches', [
  (['navy blue'], ['sky blue'], 1),  # both are blue
  (['golden oak'], ['golden oak'], 1),
  (['red'], ['green'], 0),
  (['x-large'], ['large'], 1),  # its words are among the other's
  (['large'], ['medium'], 0),
  ([], ['large'], 0),
  (['large'], [], 0),
  (['large', 'black'], ['black', 'large'], 2),
])
def test_options(chosen, asked, matches):
  assert matched_options(chosen, asked) == matches


def test_the_whole_is_the_formula_s():
  table = product(attributes=('solid wood', 'space saving'), options={'color': ('black', 'white')})
  asked = goal(attributes=('solid wood', 'non slip'), options=('white',), price_limit=40.0)
  # One attribute of two, no option, too dear: 1 / (2 + 1 + 1).
  found = reward(table, table, asked, {'color': 'black'})
  assert (found.attributes, found.options, found.price) == (1, 0, False)
  assert found.total == pytest.approx(1 / 4)
  assert reward(table, table, asked, {'color': 'white'}).total == pytest.approx(2 / 4)
  cheap = goal(attributes=('solid wood',), options=('white',), price_limit=50.0)
  assert reward(table, table, cheap, {'color': 'white'}).total == 1.0  # 50 dollars are allowed
  lamp = product(asin='B2', title='Lamp', attributes=('solid wood',))
  assert reward(lamp, table, cheap, {}).total == 0.0


_PRODUCTS = webshop_generate.products(3, 60)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_purchase_is_between_0_and_1_and_the_goal_s_own_is_1(data):
  wanted = data.draw(st.sampled_from(_PRODUCTS))
  goals = list(webshop_reward.synthetic_goals(wanted, random.Random(data.draw(st.integers(0, 99)))))
  asked = data.draw(st.sampled_from(goals))
  own = dict(zip(sorted(wanted.options), asked.options))
  assert reward(wanted, wanted, asked, own).total == 1.0
  bought = data.draw(st.sampled_from(_PRODUCTS))
  chosen = {name: data.draw(st.sampled_from(values)) for name, values in bought.options.items()}
  assert 0.0 <= reward(bought, wanted, asked, chosen).total <= 1.0


def test_goals_of_a_product():
  table = product(
    instruction='Find me solid wood tables', instruction_attributes=('solid wood',),
    options={'size': ('small', 'large'), 'color': ('black',)},
    human=({'instruction': 'a table of wood.', 'attributes': ['wood'], 'options': ['black']},
           {'instruction': 'anything', 'attributes': [], 'options': []}))
  rng = random.Random(0)
  first, second = webshop_reward.synthetic_goals(table, rng)
  # Prices lie above the product's, two of the next four tens are drawn and the larger one is meant.
  assert first.price_limit in (70.0, 80.0, 90.0)
  assert first.instruction == (
    f'Find me solid wood tables with color: black, and size: small, and price lower than '
    f'{first.price_limit:.2f} dollars')
  assert (first.options, second.options) == (('black', 'small'), ('black', 'large'))
  (person,) = webshop_reward.human_goals(table, rng)
  assert person.instruction.startswith('a table of wood, and price lower than') and person.human
  assert person.options == ('black',)
  assert not list(webshop_reward.synthetic_goals(product(), rng))


def test_nothing_is_dearer_than_the_last_limit():
  (found,) = webshop_reward.synthetic_goals(
    product(price=985.0, instruction='Find me tables', instruction_attributes=('oak',)),
    random.Random(0))
  assert found.price_limit == webshop_reward.NO_LIMIT and 'price' not in found.instruction
