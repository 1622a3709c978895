"""WebShop as a text environment: pages, actions, goals in splits (arXiv 2207.01206).

Without Java, Lucene, a web server or downloads: a generated catalogue is the default, the official
files are read from a folder. A person can shop in it, too:

  python -m envs.webshop --serve [--data=FOLDER]
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any

from data.errors import UserError
from envs import webshop_catalogue, webshop_expert, webshop_generate, webshop_reward, webshop_search
from envs.base import Environment, Limits, StepResult, Task
from envs.webshop_catalogue import Product
from envs.webshop_reward import Goal

PAGE_SIZE = 10
BACK, PREVIOUS, NEXT, BUY = 'Back to Search', '< Prev', 'Next >', 'Buy Now'
SUB_PAGES = ('Description', 'Features', 'Reviews', 'Attributes')
NOTHING = 'Invalid action.'
SPLITS = ('train', 'valid', 'test')
# Percent of the products, by the hash of their ids.
_SHARES = {'train': 80, 'valid': 10, 'test': 10}
# The original's order of goals: the first 500 are its test, the next 1,000 its validation.
_GOAL_SEED, _TEST_GOALS, _VALID_GOALS = 233, 500, 1000
CATEGORIES = ('beauty', 'electronics', 'fashion', 'food', 'furniture')
_OFFICIAL_CATEGORIES = {'grocery': 'food', 'garden': 'furniture'}
_ACTION = re.compile(r'(.+?)\[(.+)\]', re.DOTALL)
_DEFAULT_PRODUCTS = 1000


@dataclasses.dataclass(frozen=True)
class Element:
  """One piece of a page: 'text', 'button', 'product' (a link) or 'option' (a button)."""

  kind: str
  text: str
  option: str = ''  # the option's name
  chosen: bool = False


@dataclasses.dataclass
class Session:
  """Where a shopper is.

  Attributes:
    page: 'search', 'results', 'item', or a name of SUB_PAGES.
    keywords: of the last search.
    number: of the result page, from 1 on.
    asin: of the product that is open; '' for none.
    options: name -> value, what is chosen on it.
    results: places of the products found.
  """

  page: str = 'search'
  keywords: str = ''
  number: int = 1
  asin: str = ''
  options: dict[str, str] = dataclasses.field(default_factory=dict)
  results: list[int] = dataclasses.field(default_factory=list)


class Shop:
  """A catalogue that can be searched: what all sessions share."""

  def __init__(
    self, products: Sequence[Product], index: webshop_search.SearchIndex,
    show_attributes: bool = False,
  ):
    self.products, self._index, self._show_attributes = products, index, show_attributes

  @functools.cached_property
  def places(self) -> dict[str, int]:
    """asin -> place in the catalogue."""
    return {product.asin: place for place, product in enumerate(self.products)}

  def product(self, asin: str) -> Product:
    return self.products[self.places[asin]]

  def search(self, keywords: str) -> list[int]:
    return self._index.search(keywords)

  def elements(self, session: Session) -> list[Element]:
    """The page that the shopper sees, in the original's order."""
    button = functools.partial(Element, 'button')
    text = functools.partial(Element, 'text')
    if session.page == 'search':
      return [text('WebShop'), button('Search')]
    if session.page == 'results':
      found = [button(BACK), text(f'Page {session.number} (Total results: {len(session.results)})')]
      found += [button(PREVIOUS)] * (session.number > 1) + [button(NEXT)]
      start = (session.number - 1) * PAGE_SIZE
      for place in session.results[start:start + PAGE_SIZE]:
        product = self.products[place]
        found += [
          Element('product', product.asin), text(product.title), text(product.price_tag)]
      return found
    product, found = self.product(session.asin), [button(BACK), button(PREVIOUS)]
    if session.page == 'item':
      for name, values in product.options.items():
        found.append(text(name))
        found += [Element('option', value, name, session.options.get(name) == value)
                  for value in values]
      found += [text(product.title), text(f'Price: {product.price_tag}'), text('Rating: N.A.')]
      found += [button(name) for name in SUB_PAGES[:3 + self._show_attributes]]
      found.append(button(BUY))
    elif session.page == 'Description':
      found.append(text(product.description))
    elif session.page == 'Features':
      found += map(text, product.bullets)
    elif session.page == 'Attributes':
      found += [*map(text, product.attributes), text(product.category), text(product.query),
                text(product.product_category)]
    return found

  def click(self, session: Session, element: Element) -> None:
    """What a click does, but for Buy Now."""
    name = element.text
    if element.kind == 'product':
      session.page, session.asin = 'item', name
    elif element.kind == 'option':
      session.options[element.option] = name
    elif name == BACK:
      session.page, session.keywords, session.number = 'search', '', 1
      session.asin, session.options, session.results = '', {}, []
    elif session.page == 'results':
      session.number += 1 if name == NEXT else -1
    elif name == PREVIOUS and session.page == 'item':
      # As in the original, what was chosen is forgotten.
      session.page, session.asin, session.options = 'results', '', {}
    elif name == PREVIOUS:
      session.page = 'item'
    else:
      session.page = name


def render(elements: Sequence[Element]) -> str:
  """A page as text, one element a line, what can be clicked in brackets."""
  lines = []
  for element in elements:
    if element.kind == 'text':
      # A line break in a text would look like another element.
      line = ' '.join(element.text.split())
      lines += [line] if line else []
    else:
      lines.append(f'[[{element.text}]]' if element.chosen else f'[{element.text}]')
  return '\n'.join(lines)


def parse_action(action: str) -> tuple[str, str]:
  """('search' or 'click', argument in lower case); ('', '') for anything else."""
  match = _ACTION.fullmatch(action.strip())
  name = match[1].strip().lower() if match else ''
  return (name, match[2].strip().lower()) if name in ('search', 'click') else ('', '')


class WebShopEnvironment:
  """An `Environment`: one goal in a shop."""

  limits = Limits(steps=15)

  def __init__(self, shop: Shop, goal: Goal):
    self._shop, self._goal = shop, goal
    self._session, self._seen = Session(), set()
    self.reward: webshop_reward.Reward | None = None

  @property
  def session(self) -> Session:
    return self._session

  def reset(self) -> str:
    self._session, self.reward = Session(), None
    observation = self._page()
    self._seen = {observation}
    return observation

  def elements(self) -> list[Element]:
    """The page that is open."""
    return self._shop.elements(self._session)

  def _page(self) -> str:
    return render(self.elements())

  def _clickable(self) -> dict[str, Element]:
    # Of two options with one value the later one is meant, as in the original.
    return {element.text.lower(): element for element in self.elements()
            if element.kind != 'text' and element.text != 'Search'}

  def step(self, action: str) -> StepResult:
    if self.reward is not None:
      return StepResult('The episode is over.', 0.0, True, False, False, False)
    name, argument = parse_action(action)
    before = dataclasses.replace(self._session, options=dict(self._session.options))
    if name == 'search':
      self._session = Session('results', argument, results=self._shop.search(argument))
    elif name == 'click' and (element := self._clickable().get(argument)):
      if element.text == BUY and element.kind == 'button':
        return self._buy()
      self._shop.click(self._session, element)
    else:
      return StepResult(f'{NOTHING}\n{self._page()}', 0.0, False, False, False, False)
    observation = self._page()
    changed = self._session != before or observation not in self._seen
    self._seen.add(observation)
    return StepResult(observation, 0.0, False, False, True, changed)

  def _buy(self) -> StepResult:
    shop, session = self._shop, self._session
    self.reward = webshop_reward.reward(
      shop.product(session.asin), shop.product(self._goal.asin), self._goal, session.options)
    won = self.reward.total == 1.0
    return StepResult(
      f'Thank you for shopping with us! Your score (min 0.0, max 1.0): {self.reward.total:.4f}',
      self.reward.total, True, won, True, True)

  def admissible_commands(self) -> list[str]:
    """What can be clicked; a search is free text and always possible."""
    return sorted(f'click[{name}]' for name in self._clickable())

  def command_openings(self) -> list[str]:
    """A search."""
    return ['search[']


class WebShopSuite:
  """Goals in splits; no product of one split is the goal of another, but for split_by='goal'.

  Attributes:
    name: 'webshop'.
    splits: train, valid, test.
    action_templates: the two forms.
    skipped: products that were left out, by reason.
  """

  name = 'webshop'
  splits = SPLITS
  action_templates = ['search[{keywords}]', 'click[{button, product or option}]']

  def __init__(
    self,
    data: str = 'generated',
    *,
    goals: str = 'synthetic',
    split_by: str = 'product',
    goals_per_product: int = 1,
    categories: str | Sequence[str] = (),
    show_attributes: bool = False,
    seed: int = 0,
    num_products: int = 0,
  ):
    """Describes the goals; nothing is generated or read before it is asked for.

    Args:
      data: folder with WebShop's files, or 'generated'.
      goals: 'synthetic' instructions, those of a 'human', or 'all'.
      split_by: 'product'; or 'goal', the order of the original, in which test goals ask for
        products of training goals.
      goals_per_product: synthetic goals of one product (its options make up to thousands); 0 all.
      categories: only goals that read like these, of CATEGORIES; () for all.
      show_attributes: a product has an Attributes page, which tells what the reward compares.
      seed: of the generated catalogue and of price limits.
      num_products: of the generated catalogue, 0 for 1,000; or how many of the folder's first
        ones, 0 for all.

    Raises:
      UserError: an option has no meaning.
    """
    for name, value, allowed in (
        ('goals', goals, ('synthetic', 'human', 'all')),
        ('split_by', split_by, ('product', 'goal'))):
      if value not in allowed:
        raise UserError(f'{name} must be {" or ".join(allowed)}, not {value!r}.')
    for name, value in (('goals_per_product', goals_per_product), ('num_products', num_products),
                        ('seed', seed)):
      if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f'{name} must be a whole number from 0 on, not {value!r}.')
    self._categories = (categories,) if isinstance(categories, str) else tuple(categories)
    if unknown := set(self._categories) - set(CATEGORIES):
      raise UserError(
        f'There is no category {", ".join(sorted(unknown))}; there are {", ".join(CATEGORIES)}.')
    if goals == 'human' and data == 'generated':
      raise UserError('Nobody wrote goals for the generated catalogue; take goals=synthetic.')
    self._data, self._goal_kind, self._split_by = data, goals, split_by
    self._goals_per_product, self._show_attributes = goals_per_product, show_attributes
    self._seed, self._num_products = seed, num_products
    self.skipped: collections.Counter[str] = collections.Counter()
    self._tasks: dict[str, list[Task]] = {}

  @functools.cached_property
  def shop(self) -> Shop:
    if self._data == 'generated':
      count = self._num_products or _DEFAULT_PRODUCTS
      products, folder = webshop_generate.products(self._seed, count), None
    else:
      products, self.skipped, folder = webshop_catalogue.load_products(self._data)
      if self._num_products:
        products, folder = products[:self._num_products], None
    return Shop(products, webshop_search.open_index(products, folder), self._show_attributes)

  @functools.cached_property
  def classifier(self) -> CategoryClassifier:
    return CategoryClassifier(self.shop)

  def tasks(self, split: str) -> list[Task]:
    if split not in self.splits:
      raise UserError(f'The webshop suite has no split {split!r}; it has {self.splits}.')
    if split not in self._tasks:
      goals = self._by_goal(split) if self._split_by == 'goal' else self._by_product(split)
      tasks = [
        Task(f'{split}/{goal.asin}/{number}', self.name, split,
             self.classifier.category(goal.instruction), goal.instruction,
             {'goal': goal.to_json()}) for number, goal in goals]
      found = [task for task in tasks
               if not self._categories or task.task_type in self._categories]
      if not found:
        raise UserError(
          f'The catalogue has no {self._goal_kind} goals for the split {split}'
          f'{" in these categories" if tasks else ""}; take other goals or another catalogue.')
      self._tasks[split] = found
    return list(self._tasks[split])

  def _goals(self, product: Product) -> list[tuple[str, Goal]]:
    """(number within the product, goal); the same ones whatever else is in the catalogue."""
    rng = random.Random(f'goals {self._seed} {product.asin}')
    found = []
    if self._goal_kind != 'human':
      synthetic = list(enumerate(webshop_reward.synthetic_goals(product, rng)))
      if self._goals_per_product and len(synthetic) > self._goals_per_product:
        synthetic = sorted(rng.sample(synthetic, self._goals_per_product))
      found += [(f's{number}', goal) for number, goal in synthetic]
    if self._goal_kind != 'synthetic':
      human = enumerate(webshop_reward.human_goals(product, rng))
      found += [(f'h{number}', goal) for number, goal in human]
    return found

  def _by_product(self, split: str) -> list[tuple[str, Goal]]:
    # In an order of their own: the official files are sorted by nothing that matters.
    chosen = [product for product in self.shop.products if split_of(product.asin) == split]
    return [goal for product in sorted(chosen, key=lambda p: _hash(p.asin))
            for goal in self._goals(product)]

  @functools.cached_property
  def _goals_in_order(self) -> list[tuple[str, Goal]]:
    """All goals in the original's order, for split_by='goal'."""
    goals = [goal for product in self.shop.products for goal in self._goals(product)]
    least = _TEST_GOALS + _VALID_GOALS + 1
    if len(goals) < least:
      raise UserError(
        f"split_by=goal is the original's protocol: it needs {least} goals, and {self._data} has "
        f'{len(goals)} {self._goal_kind} ones; take the full catalogue, or split_by=product.')
    random.Random(_GOAL_SEED).shuffle(goals)
    return goals

  def _by_goal(self, split: str) -> list[tuple[str, Goal]]:
    goals, ends = self._goals_in_order, (_TEST_GOALS, _TEST_GOALS + _VALID_GOALS)
    return {'test': goals[:ends[0]], 'valid': goals[ends[0]:ends[1]],
            'train': goals[ends[1]:]}[split]

  def make(self, task: Task) -> Environment:
    return WebShopEnvironment(self.shop, Goal.from_json(task.payload['goal']))

  def expert(
    self, task: Task, known_rules: Sequence[Any] = (), *, max_steps: int = 15,
    error_rate: float = 0.0, seed: int = 0
  ) -> webshop_expert.Expert:
    """The scripted shopper.

    Args:
      task: the task.
      known_rules: of `webshop_expert.CARES`, what it is reminded of.
      max_steps: the episode's limit.
      error_rate: probability of each care that it is forgotten in all goals of a category, unless
        it is reminded of it: what goes wrong is then a matter of what is bought, not of chance.
      seed: of what is forgotten where.
    """
    forgets = [
      care for care in webshop_expert.CARES if care not in known_rules
      and random.Random(f'forgets {seed} {task.task_type} {care}').random() < error_rate]
    return webshop_expert.Expert(task.instruction, max_steps=max_steps, forgets=forgets)


def _hash(asin: str) -> int:
  return int.from_bytes(hashlib.sha256(asin.encode()).digest()[:8])


def split_of(asin: str) -> str:
  """The split of a product's goals, by the hash of its id."""
  place = _hash(asin) % 100
  for split, share in _SHARES.items():
    if place < share:
      return split
    place -= share
  raise AssertionError('The shares are of 100.')


def category_of(product: Product) -> str:
  """One of CATEGORIES; the official files call two of them by other names."""
  return _OFFICIAL_CATEGORIES.get(product.category, product.category)


class CategoryClassifier:
  """Infers what kind of thing an instruction asks for, from the instruction alone.

  The category of the best search results among training products, each with a weight that falls
  with its rank.
  """

  _NEIGHBOURS = 10

  def __init__(self, shop: Shop):
    self._shop = shop

  def category(self, instruction: str) -> str:
    places = [place for place in self._shop.search(instruction)
              if split_of(self._shop.products[place].asin) == 'train']
    votes: collections.Counter[str] = collections.Counter()
    for rank, place in enumerate(places[:self._NEIGHBOURS]):
      votes[category_of(self._shop.products[place])] += 1 / (1 + rank)
    # An instruction that shares no word with any product still needs a kind.
    return max(votes, key=votes.__getitem__) if votes else CATEGORIES[0]


def main(_) -> None:
  from absl import flags

  from envs import webshop_site

  if not flags.FLAGS.serve:
    raise UserError('Give --serve to open the shop in a browser.')
  suite = WebShopSuite(flags.FLAGS.data, show_attributes=flags.FLAGS.show_attributes)
  webshop_site.serve(suite, flags.FLAGS.split, flags.FLAGS.port)


if __name__ == '__main__':
  from absl import flags

  from configs import cli

  flags.DEFINE_bool('serve', False, 'Open the shop as pages for a browser, on this machine only.')
  flags.DEFINE_string('data', 'generated', "Folder with WebShop's files, or 'generated'.")
  flags.DEFINE_string('split', 'test', 'Whose goals are shopped for: train, valid or test.')
  flags.DEFINE_bool('show_attributes', False, 'Products have a page with what the reward compares.')
  flags.DEFINE_integer('port', 3000, 'Of the pages.')
  cli.run(main, required=())
