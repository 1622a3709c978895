"""What a reply looks like: ReAct, StateAct (paper A) and plain actions (paper B).

A format tells the model how to reply, reads a reply, and writes the reply that an expert would have
given. It knows no tokenizer and no particular environment.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol

from data import errors
from envs.base import Decision

# The agent's own answer to a thought (ReAct, Yao et al. 2022, ALFWorld prompts).
THOUGHT_ANSWER = 'OK.'


@dataclasses.dataclass(frozen=True)
class ParsedReply:
  """What a format made of a reply.

  Attributes:
    kind: 'action' (goes to the environment), 'thought' (answered by the agent) or 'invalid'.
    action: the command, '' unless kind is 'action'.
    thought: the thought, '' where there is none.
    fields: further named parts of the reply, StateAct's state.
    problem: for an invalid reply, the observation that says what was wrong.
  """

  kind: str
  action: str = ''
  thought: str = ''
  fields: dict[str, str] = dataclasses.field(default_factory=dict)
  problem: str = ''


@dataclasses.dataclass(frozen=True)
class Turn:
  """One past environment step as the agent saw it."""

  action: str
  observation: str
  changed: bool = True


class Format(Protocol):
  """A reply format.

  Attributes:
    name: as in a config.
    typical_tokens: what a reply takes, roughly; only predictions of run time use it.
    max_tokens: what a reply may take, unless an agent says otherwise.
    openings: what a reply may begin with in place of a command; None where it is no single command,
      so that it cannot be restricted to admissible ones.
  """

  name: str
  typical_tokens: int
  max_tokens: int
  openings: Sequence[str] | None

  @property
  def instructions(self) -> str:
    """One or two sentences for the system prompt."""

  def parse(self, reply: str) -> ParsedReply:
    """Reads a reply; never raises, an unreadable one is 'invalid'."""

  def render(self, decision: Decision, goal: str, history: Sequence[Turn]) -> list[str]:
    """Writes the replies (model calls, in order) by which an agent takes this decision.

    Only what the agent itself saw goes in: `goal` and the public `history`.
    """


def _lines(reply: str) -> list[str]:
  return [line.strip() for line in reply.splitlines() if line.strip()]


def _one_command(reply: str) -> ParsedReply:
  """A reply that must be one command on one line; a leading '>' or 'action:' is no part of it."""
  lines = _lines(reply)
  if not lines:
    return ParsedReply('invalid', problem='Your reply was empty. Reply with one command.')
  if len(lines) > 1:
    return ParsedReply('invalid', problem='Your reply had several lines. Reply with one command.')
  action = re.sub(r'^(>|action:)\s*', '', lines[0], flags=re.IGNORECASE).strip()
  if not action:
    return ParsedReply('invalid', problem='Your reply held no command. Reply with one command.')
  return ParsedReply('action', action=action)


class Plain:
  """The reply is the action (paper B)."""

  name = 'plain'
  openings = ()
  typical_tokens = 8
  max_tokens = 32
  instructions = 'Reply with one command each turn.'

  def parse(self, reply: str) -> ParsedReply:
    return _one_command(reply)

  def render(self, decision: Decision, goal: str, history: Sequence[Turn]) -> list[str]:
    return [decision.action]


class ReAct:
  """A turn is `think: ...`, which is answered 'OK.' without the environment, or an action."""

  name = 'react'
  openings = ('think:',)
  typical_tokens = 12
  max_tokens = 64
  instructions = (
    'Reply with one command each turn, or with a line that starts with "think:" to reason first.')

  def parse(self, reply: str) -> ParsedReply:
    text = re.sub(r'^>\s*', '', reply.strip())
    if text.lower().startswith('think:'):
      thought = ' '.join(_lines(text[len('think:'):]))
      if not thought:
        return ParsedReply(
          'invalid', problem='Your thought was empty. Reply with one command or "think: ...".')
      return ParsedReply('thought', thought=thought)
    return _one_command(reply)

  def render(self, decision: Decision, goal: str, history: Sequence[Turn]) -> list[str]:
    thought = [f'think: {decision.thought}'] if decision.thought else []
    return [*thought, decision.action]


# In the order of the block; the action comes last, so that the state is there when it is chosen.
STATEACT_FIELDS = (
  'goal', 'locations visited', 'current location', 'current inventory', 'thought', 'action')


_NUMBERS = {4: 'four', 6: 'six'}


class StateAct:
  """Every turn is a block that restates the state before it acts (Rozanov & Rei 2024)."""

  name = 'stateact'
  openings = None
  typical_tokens = 64
  max_tokens = 192
  fields = STATEACT_FIELDS

  @property
  def instructions(self) -> str:
    listed = ', '.join(f'"{name}:"' for name in self.fields)
    return (f'Reply each turn with {_NUMBERS[len(self.fields)]} lines: {listed}. '
            'The action is one command.')

  def parse(self, reply: str) -> ParsedReply:
    fields = {}
    for line in _lines(reply):
      name, colon, value = line.lstrip('> ').partition(':')
      name = name.strip().lower()
      if colon and name in self.fields and name not in fields:
        fields[name] = value.strip()
    action = fields.pop('action', '')
    if not action:
      return ParsedReply(
        'invalid', thought=fields.get('thought', ''), fields=fields,
        problem='Your reply held no command. End it with a line "action: ...".')
    return ParsedReply('action', action=action, thought=fields.get('thought', ''), fields=fields)

  def render(self, decision: Decision, goal: str, history: Sequence[Turn]) -> list[str]:
    values = self._values(decision, goal, history)
    return ['\n'.join(f'{name}: {values[name]}' for name in self.fields)]

  def _values(
    self, decision: Decision, goal: str, history: Sequence[Turn]
  ) -> dict[str, str]:
    visited, inventory = _state(history)
    return {
      'goal': goal,
      'locations visited': ', '.join(dict.fromkeys(visited)) or 'none',
      'current location': visited[-1] if visited else 'middle of the room',
      'current inventory': ', '.join(inventory) or 'nothing',
      'thought': decision.thought or '-',
      'action': decision.action}


def _state(history: Sequence[Turn]) -> tuple[list[str], list[str]]:
  """Locations visited in order, and what is carried, read off the public history.

  Understands the movement and carrying commands of household text games (go to X, take X from Y,
  move or put X to Y); in other worlds both stay empty.
  """
  visited: list[str] = []
  inventory: list[str] = []
  for turn in history:
    if not turn.changed:
      continue
    if match := re.match(r'go to (.+)', turn.action):
      visited.append(match[1])
    elif match := re.match(r'take (.+?) from ', turn.action):
      inventory.append(match[1])
    elif match := re.match(r'(?:move|put) (.+?) (?:to|in/on|in|on) ', turn.action):
      if match[1] in inventory:
        inventory.remove(match[1])
  return visited, inventory


class ShopReAct(ReAct):
  """ReAct on WebShop, where paper A leaves the thoughts out; one that a model has is still read."""

  name = 'react_webshop'
  instructions = Plain.instructions

  def render(self, decision: Decision, goal: str, history: Sequence[Turn]) -> list[str]:
    return [decision.action]


class ShopStateAct(StateAct):
  """StateAct on WebShop: where the shopper is and what is chosen, without a thought (paper A)."""

  name = 'stateact_webshop'
  typical_tokens = 56
  fields = ('goal', 'current location', 'current selection', 'action')

  def _values(
    self, decision: Decision, goal: str, history: Sequence[Turn]
  ) -> dict[str, str]:
    location, selection = _shop_state(history)
    return {
      'goal': goal, 'current location': location,
      'current selection': ', '.join(selection) or 'none', 'action': decision.action}


_SHOP_PAGES = ('description', 'features', 'reviews', 'attributes')


def _shop_state(history: Sequence[Turn]) -> tuple[str, list[str]]:
  """The page that is open and the options that are chosen on it, read off the public history."""
  location, product, selection = 'search page', '', []
  for turn in history:
    match = re.fullmatch(r'\s*(search|click)\s*\[(.+)\]\s*', turn.action, re.IGNORECASE)
    if not match or not turn.changed:
      continue
    name, argument = match[1].lower(), match[2].strip().lower()
    if name == 'search':
      location, product, selection = 'results page', '', []
    elif argument == 'back to search':
      location, product, selection = 'search page', '', []
    elif argument in ('next >', '< prev') and location == 'results page':
      continue
    elif argument == '< prev' and location.startswith('product'):
      location, product, selection = 'results page', '', []
    elif argument == '< prev':
      location = f'product {product}'
    elif location == 'results page':
      location, product = f'product {argument}', argument
    elif argument in _SHOP_PAGES:
      location = f'{argument} of {product}'
    else:
      selection.append(argument)
  return location, selection


class ScienceStateAct(StateAct):
  """StateAct in ScienceWorld: rooms, and what is carried, as its answers tell."""

  name = 'stateact_scienceworld'

  def _values(
    self, decision: Decision, goal: str, history: Sequence[Turn]
  ) -> dict[str, str]:
    visited, inventory = _science_state(history)
    return {
      **super()._values(decision, goal, ()),
      'locations visited': ', '.join(dict.fromkeys(visited)) or 'none',
      'current location': visited[-1] if visited else 'where I started',
      'current inventory': ', '.join(inventory) or 'nothing'}


_ROOM = re.compile(
  r'(?:You (?:move|teleport) to the |This (?:room|\w+ location) is called the )([\w ]+)\.')
_MOVED = re.compile(r'You move the (.+) to the (.+)\.')


def _science_state(history: Sequence[Turn]) -> tuple[list[str], list[str]]:
  """Rooms in the order in which they were entered, and what is carried."""
  visited: list[str] = []
  inventory: list[str] = []
  for turn in history:
    if match := _ROOM.match(turn.observation):
      if visited[-1:] != [match[1]]:
        visited.append(match[1])
    elif match := _MOVED.match(turn.observation):
      if match[1] in inventory:
        inventory.remove(match[1])
      if match[2] == 'inventory':
        inventory.append(match[1])
  return visited, inventory


FORMATS: dict[str, type] = {
  cls.name: cls
  for cls in (Plain, ReAct, StateAct, ShopReAct, ShopStateAct, ScienceStateAct)}


def name_for(agent: str, env: str) -> str:
  """The name of an agent's format in an environment: its own form of it where there is one."""
  return own if (own := f'{agent}_{env}') in FORMATS else agent


def get_format(name: str) -> Format:
  """Returns the format of that name.

  Raises:
    errors.UserError: there is none; names those there are.
  """
  if name not in FORMATS:
    raise errors.UserError(f'There is no agent format {name!r}; there are {", ".join(FORMATS)}.')
  return FORMATS[name]()
