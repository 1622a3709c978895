"""WebShop's pages, actions and goals; the scripted shopper; the pages for a person."""

import json
import random
import threading

import hypothesis
import pytest
from hypothesis import strategies as st

import envs
from data.errors import UserError
from envs import webshop, webshop_expert, webshop_search, webshop_site
from envs.webshop import Shop, WebShopEnvironment, WebShopSuite
from tests.envs.webshop_products import goal, product
from tests.experiments import browser

_TABLES = [
  product(asin=f'B{i:09d}', title=f'Oak Table {i}', prices=(10.0 + i,), price=10.0 + i,
          options={'color': ('black', 'white'), 'size': ('small', 'large')},
          bullets=('Solid wood', 'Four legs'), description='Made by hand.',
          attributes=('solid wood',)) for i in range(25)]


@pytest.fixture
def environment():
  shop = Shop(_TABLES, webshop_search.SearchIndex.build(_TABLES))
  found = WebShopEnvironment(shop, goal(
    asin=_TABLES[3].asin, attributes=('solid wood',), options=('white', 'large'),
    price_limit=20.0))
  found.reset()
  return found


def test_from_the_search_page_to_the_purchase(environment):
  assert environment.reset() == 'WebShop\n[Search]'
  assert environment.admissible_commands() == [] and environment.command_openings() == ['search[']
  lines = environment.step('search[oak table]').observation.split('\n')
  assert lines[:6] == [
    '[Back to Search]', 'Page 1 (Total results: 25)', '[Next >]', '[B000000000]', 'Oak Table 0',
    '$10.0']
  assert sum(line.startswith('[B0') for line in lines) == 10
  result = environment.step('click[b000000003]')
  assert result.valid and not result.done
  assert result.observation == '\n'.join([
    '[Back to Search]', '[< Prev]', 'color', '[black]', '[white]', 'size', '[small]', '[large]',
    'Oak Table 3', 'Price: $13.0', 'Rating: N.A.', '[Description]', '[Features]', '[Reviews]',
    '[Buy Now]'])
  assert environment.step('click[features]').observation == (
    '[Back to Search]\n[< Prev]\nSolid wood\nFour legs')
  environment.step('click[< prev]')
  assert environment.step('click[description]').observation.endswith('Made by hand.')
  environment.step('click[< Prev]')
  assert '[[white]]' in environment.step('click[White]').observation
  environment.step('click[large]')
  result = environment.step('click[Buy Now]')
  assert (result.done, result.won, result.reward) == (True, True, 1.0)
  assert 'Your score (min 0.0, max 1.0): 1.0000' in result.observation
  assert not environment.step('click[back to search]').valid  # It is over.


def test_a_purchase_without_the_options_is_worth_its_share(environment):
  environment.step('search[oak table]')
  environment.step('click[b000000003]')
  result = environment.step('click[buy now]')
  assert result.done and not result.won and result.reward == pytest.approx(2 / 4)


def test_pages_of_results(environment):
  environment.step('search[oak]')
  assert 'Page 2' in environment.step('click[next >]').observation
  third = environment.step('click[next >]').observation
  assert third.count('[B0') == 5 and '[< Prev]' in third
  # As in the original there is always a next page; it is empty.
  assert environment.step('click[next >]').observation.count('[B0') == 0
  assert 'Page 3' in environment.step('click[< prev]').observation


def test_going_back_forgets_what_was_chosen(environment):
  environment.step('search[oak]')
  environment.step('click[b000000001]')
  environment.step('click[white]')
  assert 'Page 1' in environment.step('click[< prev]').observation
  assert '[[' not in environment.step('click[b000000001]').observation
  assert environment.step('click[back to search]').observation == 'WebShop\n[Search]'


@pytest.mark.parametrize('action', [
  'click[search]', 'click[nothing]', 'click[buy now]', 'search[]', 'buy now', 'click', '',
  'click[b000000001]', 'think[search[x]', 'search', '[x]', 'click[]'])
def test_what_is_not_possible_changes_nothing_and_says_so(environment, action):
  before = environment.session
  result = environment.step(action)
  assert result.observation == 'Invalid action.\nWebShop\n[Search]'
  assert (result.valid, result.changed, result.done, result.reward) == (False, False, False, 0.0)
  assert environment.session == before


def test_an_option_that_the_product_does_not_have(environment):
  environment.step('search[oak]')
  environment.step('click[b000000001]')
  result = environment.step('click[purple]')
  assert not result.valid and result.observation.startswith('Invalid action.')


def test_a_product_in_any_alphabet_is_found_and_bought():
  shoe = product(
    asin='B0É0000001', title='Crème brûlée 靴 İstanbul', prices=(5.0,), price=5.0,
    options={'größe': ('größe 7', '大きい')}, bullets=('für Mädchen 🙂',), attributes=('süß',))
  shop = Shop([*_TABLES, shoe], webshop_search.SearchIndex.build([*_TABLES, shoe]))
  found = WebShopEnvironment(
    shop, goal(asin=shoe.asin, attributes=('süß',), options=('大きい',), price_limit=20.0))
  found.reset()
  assert '[B0É0000001]\nCrème brûlée 靴 İstanbul' in found.step('search[CRÈME 靴]').observation
  commands = ('click[B0É0000001]', 'click[大きい]', 'click[features]', 'click[< prev]')
  assert all(found.step(command).valid for command in commands)
  assert found.step('click[buy now]').won


def test_a_search_without_results(environment):
  result = environment.step('search[zebra]')
  assert result.valid and 'Total results: 0' in result.observation


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_walk_offers_what_it_shows(seed):
  rng = random.Random(seed)
  shop = Shop(_TABLES, webshop_search.SearchIndex.build(_TABLES), show_attributes=True)
  environment = WebShopEnvironment(shop, goal(asin=_TABLES[0].asin))
  observation = environment.reset()
  for _ in range(25):
    commands = environment.admissible_commands()
    shown = {line.strip('[]').lower() for line in observation.split('\n') if line.startswith('[')}
    assert {f'click[{name}]' for name in shown - {'search'}} == set(commands)
    action = rng.choice([*commands, 'search[oak]', 'search[table 7]', 'nonsense'])
    result = environment.step(action)
    assert result.valid is (action != 'nonsense') and 0 <= result.reward <= 1
    assert result.valid or not result.changed
    observation = result.observation.removeprefix('Invalid action.\n')
    if result.done:
      assert action == 'click[buy now]'
      break


def test_goals_are_split_by_product_and_the_same_in_a_larger_catalogue():
  suite, larger = envs.get_suite('webshop'), envs.get_suite('webshop', num_products=1200)
  asins = {split: {t.payload['goal']['asin'] for t in suite.tasks(split)} for split in suite.splits}
  assert sum(map(len, asins.values())) == 1000 == len(set().union(*asins.values()))
  assert 750 < len(asins['train']) < 850 and min(map(len, asins.values())) > 60
  ids = {task.id for task in larger.tasks('test')}
  assert {task.id for task in suite.tasks('test')} < ids
  assert {t.task_type for t in suite.tasks('train')} == set(webshop.CATEGORIES)
  food = envs.get_suite('webshop', categories='food').tasks('test')
  assert food and {t.task_type for t in food} == {'food'}


def test_a_task_survives_json_and_its_goal_is_the_same():
  suite = WebShopSuite(num_products=50)
  task = suite.tasks('train')[0]
  assert webshop.Goal.from_json(task.payload['goal']).to_json() == task.payload['goal']
  assert suite.make(task).reset() == 'WebShop\n[Search]'


@pytest.mark.parametrize('options, sentence', [
  ({'goals': 'mine'}, 'goals must be synthetic or human or all'),
  ({'goals': 'human'}, 'Nobody wrote goals'),
  ({'split_by': 'goal', 'num_products': 100}, 'needs 1501 goals'),
  ({'num_products': -1}, 'num_products must be a whole number'),
  ({'categories': 'toys'}, 'no category toys'),
])
def test_options_without_meaning(options, sentence):
  with pytest.raises(UserError, match=sentence):
    WebShopSuite(**options).tasks('train')


def test_instructions_are_taken_apart():
  wish = webshop_expert.read_instruction(
    'Find me slim fit, machine wash shirts with button closure with color: a, b, and size: 3: x, '
    'and price lower than 30.00 dollars')
  assert wish.price_limit == 30.0 and wish.options['size'] == '3: x'
  assert wish.text == 'slim fit, machine wash shirts with button closure'
  assert wish.phrases == ['slim fit', 'button closure']
  assert webshop_expert.read_instruction('i need a chair.').text == 'chair'


def _share_won(suite, tasks, max_steps):
  won = 0
  for task in tasks:
    environment, expert = suite.make(task), suite.expert(task, max_steps=max_steps)
    observation, result = environment.reset(), None
    for _ in range(max_steps):
      result = environment.step(expert.act(observation).action)
      observation = result.observation
      assert result.valid
      if result.done:
        break
    assert result.done  # It always buys in time.
    won += result.won
  return won / len(tasks)


def test_the_expert_buys_what_is_asked():
  suite = WebShopSuite()
  assert _share_won(suite, suite.tasks('test'), 15) >= 0.9


@pytest.mark.slow
def test_the_expert_on_the_real_products(hintsight_data):
  suite = WebShopSuite(str(hintsight_data / 'webshop'))
  tasks = [task for split in suite.splits for task in suite.tasks(split)]
  assert len(tasks) > 400
  assert _share_won(suite, tasks, 100) >= 0.85


def test_categories_of_real_goals_are_inferred(hintsight_data):
  suite = WebShopSuite(str(hintsight_data / 'webshop'))
  # Only goals whose product the classifier has not seen.
  tasks = suite.tasks('test') + suite.tasks('valid')
  right = [task.task_type == webshop.category_of(suite.shop.product(task.payload['goal']['asin']))
           for task in tasks]
  assert sum(right) / len(right) >= 0.95


# The pages for a person.


def test_the_pages_play_the_same_environment():
  suite = WebShopSuite(num_products=60)
  client = webshop_site.make_app(suite, 'train').test_client()
  start = client.get('/')
  assert start.status_code == 302
  url = start.headers['Location']
  task = suite.tasks('train')[0]
  assert task.instruction.split(' with ')[0] in client.get(url).get_data(as_text=True)
  page = client.post(url, data={'keywords': '<script>alert(1)</script>'}).get_data(as_text=True)
  assert '<script>' not in page
  assert 'not possible here' in client.post(
    url, data={'action': 'click[nothing]'}).get_data(as_text=True)
  assert client.get('/of-another-day').status_code == 302
  assert client.post(url, data={'keywords': 'x' * 20_000}).status_code == 413


@pytest.mark.skipif(browser.PATH is None, reason='Chromium is not installed')
def test_a_browser_buys_a_product(tmp_path):
  from werkzeug import serving

  suite = WebShopSuite(num_products=60)
  server = serving.make_server('127.0.0.1', 0, webshop_site.make_app(suite, 'train'))
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  task = suite.tasks('train')[0]
  expert, environment = suite.expert(task), suite.make(task)
  observation = environment.reset()
  try:
    with browser.Browser(tmp_path / 'profile') as page:
      page.open(f'http://127.0.0.1:{server.port}/')
      while environment.reward is None:
        action = expert.act(observation).action
        observation = environment.step(action).observation
        name, argument = webshop.parse_action(action)
        if name == 'search':
          page.follow(
            f'document.querySelector("input[name=keywords]").value = {json.dumps(argument)};'
            'document.querySelector("form").requestSubmit()')
        else:
          page.follow(
            '[...document.querySelectorAll("button")].find('
            f'b => b.textContent.toLowerCase() == {json.dumps(argument)}).click()')
      shown = page.run('document.querySelector("#score strong").textContent')
      assert shown == f'{environment.reward.total:.4f}' and not page.console
  finally:
    server.shutdown()
    thread.join()
