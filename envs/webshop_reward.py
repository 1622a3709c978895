"""WebShop's goals and its reward (Yao et al., arXiv 2207.01206, section 3 and appendix).

  r = r_type * (matched attributes + matched options + [price <= limit])
      / (attributes + options + 1)

The nouns of the titles, which r_type compares, are found by HanTa's English tagger: the original's
model is not on PyPI.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from thefuzz import fuzz

from data.errors import UserError
from envs.webshop_catalogue import Product

MATCH = 85  # of 100; what is above it counts as the same
PRICE_LIMITS = tuple(10.0 * i for i in range(1, 100))
NO_LIMIT = 1_000_000.0
# Of colours, the first one of this list that occurs in a text stands for it.
_COLOUR_WORDS = '''
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown
burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac
copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold granite
grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard light
lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural
navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire
seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet
walnut wheat white wine yellow
'''
COLOURS = tuple(_COLOUR_WORDS.split())
_NOUN_TAGS = ('NN0', 'NN1', 'NN2', 'NP0')  # of the British National Corpus
_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Goal:
  """What is to be bought.

  Attributes:
    asin: of the product that the goal was made from.
    instruction: the sentence that the agent reads.
    attributes: what is asked for, besides the kind of product.
    options: values that have to be chosen.
    price_limit: dollars.
    human: a person wrote the instruction.
  """

  asin: str
  instruction: str
  attributes: tuple[str, ...]
  options: tuple[str, ...]
  price_limit: float
  human: bool = False

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, record: Mapping[str, Any]) -> Goal:
    lists = {name: tuple(record[name]) for name in ('attributes', 'options')}
    return cls(**{**record, **lists})


@dataclasses.dataclass(frozen=True)
class Reward:
  """The reward of a purchase and its parts.

  Attributes:
    total: 0 to 1.
    type_factor: 0, 0.1, 0.5 or 1.
    attributes: how many were matched.
    options: how many were matched.
    price: within the limit.
  """

  total: float
  type_factor: float
  attributes: int
  options: int
  price: bool


# Goals.


def _price_limit(price: float, rng: random.Random) -> tuple[float, str]:
  """A limit above the price, and how the instruction says it."""
  above = [limit for limit in PRICE_LIMITS if limit > price][:4]
  if len(above) < 2:
    return NO_LIMIT, ''
  limit = sorted(rng.sample(above, 2))[1]
  return limit, f', and price lower than {limit:.2f} dollars'


def synthetic_goals(product: Product, rng: random.Random) -> Iterator[Goal]:
  """One goal for each combination of the product's options.

  A product without an instruction or without attributes makes none.
  """
  if not product.instruction or not product.instruction_attributes:
    return
  limit, price_text = _price_limit(product.price, rng)
  names = sorted(product.options)
  for values in itertools.product(*(product.options[name] for name in names)):
    text = ', and '.join(f'{name}: {value}' for name, value in zip(names, values, strict=True))
    text = f' with {text}' if text else ''
    yield Goal(
      product.asin, f'{product.instruction}{text}{price_text}', product.instruction_attributes,
      values, limit)


def human_goals(product: Product, rng: random.Random) -> Iterator[Goal]:
  """The goals that people wrote; those without attributes are left out, as in the original."""
  for entry in product.human:
    if not entry['attributes']:
      continue
    limit, price_text = _price_limit(product.price, rng)
    yield Goal(
      product.asin, entry['instruction'].strip('.') + price_text, tuple(entry['attributes']),
      tuple(entry['options']), limit, human=True)


# The reward.


@functools.cache
def _tagger():
  try:
    from HanTa import HanoverTagger
  except ImportError:
    raise UserError('WebShop\'s reward needs a tagger; install it with: pip install HanTa'
                    ) from None
  return HanoverTagger.HanoverTagger('morphmodel_en.pgz')


@functools.lru_cache(maxsize=100_000)
def nouns(title: str) -> tuple[str, ...]:
  """The nouns of a title, lower case, in their order and as often as they occur."""
  words = _WORDS.findall(title)
  if not words:
    return ()
  return tuple(
    word.lower() for word, (_, _, tag) in zip(words, _tagger().tag_sent(words), strict=True)
    if tag in _NOUN_TAGS)


def type_factor(
  bought: Product, wanted: Product, find_nouns: Callable[[str], Sequence[str]] | None = None
) -> float:
  """r_type: how far the two are the same kind of product.

  Args:
    bought: what was bought.
    wanted: the product that the goal was made from.
    find_nouns: another tagger, for comparison; None is ours.
  """
  find_nouns = find_nouns or nouns
  parts = [{part.strip() for part in product.product_category.split('›')}
           for product in (bought, wanted)]
  same_category = len(parts[0] & parts[1]) >= 2
  asked = find_nouns(wanted.title)
  shared = set(find_nouns(bought.title)) & set(asked)
  overlap = len(shared) / len(asked) if asked else 0.2
  if overlap == 0.0:
    return 0.0
  if overlap < 0.1:
    return 0.1
  return 1.0 if bought.query == wanted.query or same_category or overlap > 0.2 else 0.5


def matched_attributes(product: Product, attributes: Sequence[str]) -> int:
  """How many are among the product's own, or in its title, features or description."""
  texts = (product.title.lower(), ' '.join(product.bullets).lower(), product.description.lower())
  return sum(
    any(fuzz.token_set_ratio(own, asked) > MATCH for own in product.attributes)
    or any(asked in text for text in texts)
    for asked in attributes)


def normalise_colour(option: str) -> str:
  """The first colour of COLOURS that occurs in an option's value, or the value."""
  return next((colour for colour in COLOURS if colour in option), option)


def matched_options(chosen: Sequence[str], asked: Sequence[str]) -> int:
  """How many of the asked values are among the chosen ones, colours normalised.

  The original hands over a synthetic goal's options as (name, value) pairs, whose colours are then
  not normalised while those of the chosen values are: buying 'golden oak' where that was asked
  counted as no match. Values are compared with values here, as it does for goals of people.
  """
  values = [normalise_colour(value) for value in chosen]
  return sum(
    any(fuzz.token_set_ratio(value, normalise_colour(option)) > MATCH for value in values)
    for option in asked)


def reward(
  bought: Product, wanted: Product, goal: Goal, chosen: Mapping[str, str]
) -> Reward:
  """The reward for buying a product with these options chosen (name -> value).

  Args:
    bought: what was bought.
    wanted: the product that the goal was made from.
    goal: what was asked for.
    chosen: option name -> value.
  """
  factor = type_factor(bought, wanted)
  attributes = matched_attributes(bought, goal.attributes)
  options = matched_options(list(chosen.values()), goal.options)
  price = bought.price <= goal.price_limit
  share = (attributes + options + price) / (len(goal.attributes) + len(goal.options) + 1)
  return Reward(factor * share, factor, attributes, options, price)
