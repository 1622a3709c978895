"""Hints by rules for WebShop: what the trace of a failed shopping trip shows, one sentence each.

As in `hint_rules` the writer sees what the agent saw and nothing else: the instruction, its actions
and the pages. The placeholders are those of arXiv 2510.01375 for WebShop: {item}, {size}, {color},
{attribute}, {material}; an option of another name is {option}.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

from data.schema import Episode

_ACTION = re.compile(r'\s*(search|click)\s*\[(.+)\]\s*', re.IGNORECASE | re.DOTALL)
_ASKED = re.compile(r"([a-z][a-z ']*?): ")
_LIMIT = re.compile(r'price lower than ([\d.]+) dollars')
_PRICE = re.compile(r'^Price: \$([\d.]+)', re.MULTILINE)
_PLACEHOLDERS = ('size', 'color', 'material')
_CHOICE = re.compile(r'^\[\[(.+)\]\]$', re.MULTILINE)
_CHECKS = ('description', 'features')
_INVALID = 'Invalid action.'


@dataclasses.dataclass
class Trip:
  """What one trace shows.

  Attributes:
    asked: names of the options that the instruction gives.
    offered: those of them that the product that was open last lets choose.
    chosen: values that were chosen on it.
    searches: number of searches, and `words` of the longest one.
    opened: products that were opened.
    read: a page about the product was read.
    price: of the product that was open last, dollars.
    limit: of the instruction.
    bought: the trip ended with a purchase.
    invalid: actions that were not possible.
    empty: a search found nothing.
  """

  asked: list[str] = dataclasses.field(default_factory=list)
  offered: list[str] = dataclasses.field(default_factory=list)
  chosen: list[str] = dataclasses.field(default_factory=list)
  searches: int = 0
  words: int = 0
  opened: int = 0
  read: bool = False
  price: float = 0.0
  limit: float = float('inf')
  bought: bool = False
  invalid: int = 0
  empty: bool = False


def asked_options(instruction: str) -> list[str]:
  """Names of the options in an instruction: 'with color: black, and size: 9' gives color, size."""
  _, found, text = instruction.lower().rpartition(' with ')
  return [name.strip() for name in _ASKED.findall(text.replace('and ', ''))] if found else []


def read_trace(episode: Episode) -> Trip:
  """Collects what the trace shows."""
  trip = Trip(asked=asked_options(episode.instruction))
  if match := _LIMIT.search(episode.instruction):
    trip.limit = float(match[1])
  for step in episode.steps:
    if step.parsed == 'thought':
      continue
    match = _ACTION.fullmatch(step.action)
    if not match or step.observation.startswith(_INVALID):
      trip.invalid += 1
      continue
    name, argument = match[1].lower(), match[2].strip().lower()
    if name == 'search':
      trip.searches += 1
      trip.words = max(trip.words, len(argument.split()))
      trip.empty |= '(Total results: 0)' in step.observation
    trip.read |= argument in _CHECKS
    trip.bought |= argument == 'buy now'
    if price := _PRICE.search(step.observation):
      trip.opened += '[[' not in step.observation and argument not in ('< prev', *_CHECKS)
      trip.price = float(price[1])
      trip.chosen = _CHOICE.findall(step.observation)
      lines = step.observation.lower().splitlines()
      trip.offered = [option for option in trip.asked if option in lines]
  return trip


def _option(name: str) -> str:
  return f'{{{name}}}' if name in _PLACEHOLDERS else '{option}'


PRICE_HINT = 'Open only an {item} whose price is below the limit.'
FEATURES_HINT = (
  'Read the features of {item} to see whether it is {attribute} before you buy it.')
SEARCH_HINT = 'Search once, with {attribute}, the kind of {item} and its options as words.'
OPEN_HINT = 'Click the id of an {item} on the result page to open it.'
BRACKETS_HINT = 'Click only what stands in brackets on the page, word by word.'
REPEAT_HINT = 'Do not repeat an action that changed nothing; try another one.'
# How to search and to click, whatever is bought.
GENERAL_HINTS = (SEARCH_HINT, OPEN_HINT, BRACKETS_HINT, REPEAT_HINT)


def options_hint(names: Sequence[str]) -> str:
  """What to choose before the purchase, by the names of the options."""
  listed = ' and '.join(dict.fromkeys(map(_option, names)))
  return f'Click {listed} on the page of {{item}} before you click buy now.'


def reminders(instruction: str) -> dict[str, str]:
  """Care of a shopper (`envs.webshop_expert.CARES`) -> the hint that reminds of it."""
  found = {'features': FEATURES_HINT}
  if names := asked_options(instruction):
    found['options'] = options_hint(names)
  if _LIMIT.search(instruction):
    found['price'] = PRICE_HINT
  return found


def diagnose(episode: Episode) -> list[str]:
  """The hints of one failure, the ones nearest to the purchase first."""
  trip, hints = read_trace(episode), []
  if trip.bought and len(trip.chosen) < len(trip.offered):
    hints.append(options_hint(trip.offered))
  if trip.bought and len(trip.offered) < len(trip.asked):
    listed = ' and '.join(dict.fromkeys(
      _option(name) for name in trip.asked if name not in trip.offered))
    hints.append(
      f'Buy only an {{item}} that lets you choose {listed}; else go back to the results.')
  if trip.bought and trip.price > trip.limit:
    hints.append(PRICE_HINT)
  if trip.bought and not trip.read:
    hints.append(FEATURES_HINT)
  if not trip.bought and trip.opened:
    hints.append('When an {item} has what is asked, choose its options and click buy now.')
  if not trip.bought and trip.searches and not trip.opened:
    hints.append(OPEN_HINT)
  if not trip.searches:
    hints.append('Start with search[{attribute} {item}].')
  elif trip.empty or trip.words < 2 or trip.searches > 3:
    hints.append(SEARCH_HINT)
  if trip.invalid >= 2:
    hints.append(BRACKETS_HINT)
  if episode.termination == 'repetition':
    hints.append(REPEAT_HINT)
  return hints


def write_all(
  failures: Sequence[Episode], counts: collections.Counter, *, max_hints: int
) -> list[list[str]]:
  """Hints for every failure; arguments and result as of `hint_rules.write_all`."""
  written = []
  for episode in failures:
    hints = diagnose(episode)
    counts['hints_beyond_four'] += max(0, len(hints) - max_hints)
    written.append(hints[:max_hints])
  return written
