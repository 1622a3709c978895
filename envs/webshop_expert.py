"""A scripted shopper: reads the goal, searches, checks products, chooses options, buys.

It knows only what an agent knows: the instruction and the pages. A product is judged by the share
of the instruction's words in its title, features and description, by its options and by its price;
the first one that has it all is bought, and where none has, the best one that was seen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from envs.base import Decision
from envs.webshop_search import analyse

_PRICE = re.compile(r',? and price lower than ([\d.]+) dollars\.?$')
# The last 'with': the wish itself may have one.
_OPTIONS = re.compile(r' with ((?:(?! with )[^:,])+: .+)$')
_FILLER = re.compile(
  r"^(find me|i am looking for|i'm looking for|i need|i want|i would like|please|show me|buy)"
  r'( to (buy|get|find))?( an?| some)?\s+', re.IGNORECASE)
_BUTTON = re.compile(r'\[\[?(.+?)\]?\]$')
_MONEY = re.compile(r'\$([\d.]+)')
_PAGES = ('Features', 'Description')  # what is read of a product, in this order
# What a shopper has to think of: to choose what was asked for, to keep to the limit, and to read
# what a product says about the rest of the wish.
CARES = ('options', 'price', 'features')


@dataclasses.dataclass(frozen=True)
class Wish:
  """An instruction, taken apart.

  Attributes:
    text: what is wanted, without options and price.
    options: name -> value.
    price_limit: dollars; None for none.
  """

  text: str
  options: dict[str, str]
  price_limit: float | None

  def _parts(self) -> tuple[str, list[str]]:
    """(what comes before 'with' and 'for', each of the phrases after them)."""
    head, *tails = re.split(r' (?:with|for) ', self.text)
    return head, [phrase for tail in tails for phrase in tail.split(', ')]

  @property
  def phrases(self) -> list[str]:
    """The attributes that can be told from the kind of product: what commas, with, for part."""
    head, tails = self._parts()
    return head.split(', ')[:-1] + tails

  @property
  def kind(self) -> str:
    """The kind of product, with the attribute that no comma parts from it."""
    return self._parts()[0].split(', ')[-1]


def read_instruction(instruction: str) -> Wish:
  """Takes an instruction apart; one without the forms of synthetic goals is all text."""
  limit = None
  if match := _PRICE.search(instruction):
    limit, instruction = float(match[1]), instruction[:match.start()]
  options = {}
  if match := _OPTIONS.search(instruction):
    for part in re.split(r', and (?=[^:,]+: )', match[1]):
      name, _, value = part.partition(': ')
      options[name.strip().lower()] = value.strip().lower()
    instruction = instruction[:match.start()]
  return Wish(_FILLER.sub('', instruction).strip(' .'), options, limit)


@dataclasses.dataclass
class _Candidate:
  """A product on the result page, and what is known of it."""

  asin: str
  title: str
  price: float
  rank: int
  text: str = ''
  offers: frozenset[str] = frozenset()
  score: float = 0.0


class Expert:
  """Plays one goal from observations alone."""

  def __init__(
    self, instruction: str, *, max_steps: int = 15, forgets: Collection[str] = ()
  ):
    """Reads the goal.

    Args:
      instruction: of the task.
      max_steps: the episode's limit, within which it has to buy.
      forgets: of CARES, what it does not think of.
    """
    self.wish = read_instruction(instruction)
    self._forgets = frozenset(forgets)
    self._words = set(analyse(self.wish.text))
    self._left = max_steps
    self._found: dict[str, _Candidate] = {}
    self._checked: list[_Candidate] = []
    self._open: _Candidate | None = None
    self._read: list[str] = []
    self._buying: _Candidate | None = None
    self._searches = 0

  def act(self, observation: str) -> Decision:
    self._left -= 1
    lines = [line for line in observation.splitlines() if line]
    buttons = [match[1] for line in lines if (match := _BUTTON.match(line))]
    if 'Buy Now' in buttons:
      return self._on_item(lines, buttons)
    if 'Next >' in buttons:
      return self._on_results(lines)
    if 'Back to Search' not in buttons:
      return self._search()
    return self._on_sub_page(lines)

  def _search(self) -> Decision:
    self._searches += 1
    # The options are part of what is searched; without them where that found nothing.
    words = self.wish.text
    if self._searches == 1:
      words = ' '.join([words, *self.wish.options.values()])
    return Decision(f'search[{words}]', 'I search for what is asked.')

  # Result pages.

  def _on_results(self, lines: list[str]) -> Decision:
    if not self._found:
      self._read_results(lines)
    if not self._found:
      if self._searches < 2:
        return Decision('click[back to search]', 'Nothing was found; I try fewer words.')
      return Decision('click[next >]', 'Nothing was found.')
    if self._buying is None:
      waiting = [c for c in self._found.values() if c not in self._checked]
      # To open, to choose and to buy has to fit into what is left.
      if waiting and self._left > self._cost(reopen=True) + 2:
        self._open, self._read = max(waiting, key=self._promise), []
        return Decision(
          f'click[{self._open.asin.lower()}]', f'{self._open.title[:60]} may be it.')
      self._decide()
    self._open = self._buying
    return Decision(
      f'click[{self._buying.asin.lower()}]', 'This one fits best of those that I saw.')

  def _read_results(self, lines: list[str]) -> None:
    """Notes the products of the first page: those of later pages are too often of another kind."""
    for index, line in enumerate(lines):
      match = _BUTTON.match(line)
      if not match or index + 2 >= len(lines) or not (money := _MONEY.match(lines[index + 2])):
        continue
      self._found[match[1]] = _Candidate(
        match[1], lines[index + 1], float(money[1]), len(self._found))

  def _fits_price(self, candidate: _Candidate) -> bool:
    return ('price' in self._forgets or self.wish.price_limit is None
            or candidate.price <= self.wish.price_limit)

  def _coverage(self, text: str) -> float:
    """Share of the wish in a text: its words, and its attributes as they are written."""
    words = len(self._words & set(analyse(text))) / max(1, len(self._words))
    phrases, lower = self.wish.phrases, text.lower()
    if not phrases:
      return words
    return 0.7 * words + 0.3 * sum(phrase in lower for phrase in phrases) / len(phrases)

  def _promise(self, candidate: _Candidate) -> float:
    return (self._fits_price(candidate) + 0.5 * self._coverage(candidate.title)
            - 0.1 * candidate.rank)

  # Product pages.

  def _cost(self, reopen: bool) -> int:
    """Steps to choose the options and to buy, and to open a product again before."""
    return len(self.wish.options) + 1 + 2 * reopen

  def _on_item(self, lines: list[str], buttons: list[str]) -> Decision:
    candidate = self._open
    if candidate is None:
      return Decision('click[buy now]', 'I buy what is open.')
    if not candidate.offers:
      candidate.offers = frozenset(button.lower() for button in buttons)
      candidate.text = '\n'.join(lines)
    if self._buying is None:
      missing = self._judge(candidate) < 1
      unread = [page for page in _PAGES if page not in self._read]
      if 'features' in self._forgets:
        missing = False
      if candidate.score >= 1.5 and missing and unread and (
          self._left > self._cost(reopen=False) + 2):
        self._read.append(unread[0])
        return Decision(f'click[{unread[0].lower()}]', 'I read what it says about the rest.')
      self._checked += [candidate] if candidate not in self._checked else []
      if not (candidate.score >= 2 and not missing):
        waiting = len(self._checked) < len(self._found)
        if waiting and self._left > self._cost(reopen=True) + 3:
          self._open = None
          return Decision('click[< prev]', 'I look at another one.')
        self._decide()
        if self._buying is not candidate and self._left > self._cost(reopen=True):
          return Decision('click[< prev]', 'Another one fitted better.')
      self._buying = candidate
    for name, value in ({} if 'options' in self._forgets else self.wish.options).items():
      chosen = any(line.lower() == f'[[{value}]]' for line in lines)
      if not chosen and value in candidate.offers:
        return Decision(f'click[{value}]', f'I choose the {name} {value}.')
    return Decision('click[buy now]', 'It has what is asked.')

  def _judge(self, candidate: _Candidate) -> float:
    """Sets the score: all options count one, a price that fits half, all of the wish one.

    Returns:
      The share of the wish in what was read of the product.
    """
    options = self.wish.options.values()
    offered = sum(value in candidate.offers for value in options)
    share = offered / len(options) if options else 1.0
    coverage = self._coverage(candidate.text)
    candidate.score = (
      (share if share == 1 else share / 2) + 0.5 * self._fits_price(candidate) + coverage)
    return coverage

  def _decide(self) -> None:
    """Takes the best one; of those that are equally good, one that is called what is wanted."""
    kind = set(analyse(self.wish.kind))

    def worth(candidate: _Candidate) -> tuple[float, int]:
      named = len(kind & set(analyse(candidate.title))) / max(1, len(kind))
      return candidate.score + 0.2 * named, -candidate.rank

    self._buying = max(self._checked or self._found.values(), key=worth)

  def _on_sub_page(self, lines: list[str]) -> Decision:
    if self._open is not None:
      self._open.text += '\n' + '\n'.join(lines)
    return Decision('click[< prev]', 'Back to the product.')
