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


def diagnose(episode: Episode) -> list[str]:
  """The hints of one failure, the ones nearest to the purchase first."""
  trip, hints = read_trace(episode), []
  if trip.bought and len(trip.chosen) < len(trip.offered):
    listed = ' and '.join(dict.fromkeys(_option(name) for name in trip.offered))
    hints.append(f'Click {listed} on the page of {{item}} before you click buy now.')
  if trip.bought and len(trip.offered) < len(trip.asked):
    listed = ' and '.join(dict.fromkeys(
      _option(name) for name in trip.asked if name not in trip.offered))
    hints.append(
      f'Buy only an {{item}} that lets you choose {listed}; else go back to the results.')
  if trip.bought and trip.price > trip.limit:
    hints.append('Open only an {item} whose price is below the limit.')
  if trip.bought and not trip.read:
    hints.append('Read the features of {item} to see whether it is {attribute} before you buy it.')
  if not trip.bought and trip.opened:
    hints.append('When an {item} has what is asked, choose its options and click buy now.')
  if not trip.bought and trip.searches and not trip.opened:
    hints.append('Click the id of an {item} on the result page to open it.')
  if not trip.searches:
    hints.append('Start with search[{attribute} {item}].')
  elif trip.empty or trip.words < 2 or trip.searches > 3:
    hints.append('Search once, with {attribute}, the kind of {item} and its options as words.')
  if trip.invalid >= 2:
    hints.append('Click only what stands in brackets on the page, word by word.')
  if episode.termination == 'repetition':
    hints.append('Do not repeat an action that changed nothing; try another one.')
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
