"""A scripted expert for household games that sees only what an agent sees.

It reads the room description, remembers what it saw where, explores until it has what it needs,
and gives a one-sentence thought with every action. For skills it knows the rules it is given; for
the others it goes from appliance to appliance and reads their labels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from envs.base import Decision, Task
from envs.household import NOTHING, Rule
from envs.household_skills import APPLIANCES, VERBS

_NAME = re.compile(r'\ba ([a-z]+ \d+)')
_LABEL = re.compile(r'reads: (\w+) things here(?: while it is (\w+))? to make them (\w+)\.')
# The goal sentences of the templates: official (ALFWorld's goal library) and skills.
_GOALS = (
  ('make', re.compile(r'make a (?P<state>\w+) (?P<thing>\w+)')),
  ('light', re.compile(r'look at (?P<thing>\w+) under the (?P<lamp>\w+)')),
  ('light', re.compile(r'examine the (?P<thing>\w+) with the (?P<lamp>\w+)')),
  ('two', re.compile(r'put two (?P<thing>\w+) in (?P<goal>\w+)')),
  ('two', re.compile(r'find two (?P<thing>\w+) and put them in (?P<goal>\w+)')),
  ('state', re.compile(r'(?P<verb>\w+) some (?P<thing>\w+) and put it in (?P<goal>\w+)')),
  ('place', re.compile(r'put some (?P<thing>\w+) on (?P<goal>\w+)')),
  ('state', re.compile(r'put a (?P<state>\w+) (?P<thing>\w+) in (?P<goal>\w+)')),
  ('place', re.compile(r'put a (?P<thing>\w+) in (?P<goal>\w+)')),
)  # fmt: skip
_OFFICIAL_VERB = {'clean': 'clean', 'hot': 'heat', 'cool': 'cool'}
_OFFICIAL_APPLIANCE = {'clean': 'sinkbasin', 'heat': 'microwave', 'cool': 'fridge'}
# Kinds of receptacles by how often they hide things: open surfaces need no opening and hold most.
_OPEN_FIRST = (
  'diningtable', 'countertop', 'sidetable', 'coffeetable', 'desk', 'dresser', 'shelf', 'sofa',
  'bed', 'armchair', 'ottoman', 'cart', 'sinkbasin', 'bathtubbasin', 'toilet', 'garbagecan',
  'stoveburner', 'coffeemachine', 'toaster', 'tvstand', 'towelholder', 'handtowelholder',
  'toiletpaperhanger', 'laundryhamper',
)  # fmt: skip
_IN_FRIDGE = (
  'apple', 'egg', 'lettuce', 'potato', 'tomato', 'bread', 'cup', 'bowl', 'plate', 'mug',
  'winebottle', 'pot', 'pan',
)  # fmt: skip


def parse_goal(instruction: str) -> tuple[str, dict[str, str]]:
  """The kind of a goal sentence ('make', 'state', 'place', 'two', 'light') and its words."""
  for kind, pattern in _GOALS:
    match = pattern.match(instruction)
    if match:
      return kind, match.groupdict()
  return '', {}


# What is said of a state begins as what was read of it: the goal's "make a STATE THING", a hint's
# "To make it STATE, VERB it". A small decoder goes on as the text did where it finds that.


def plan_thought(rule: Rule) -> str:
  """Why the expert goes to a rule's appliance."""
  return f'To make it {rule.state}, {rule.verb} it with the {rule.appliance}.'


def search_thought(state: str, place: str, read: Rule | None = None) -> str:
  """Why it goes to an appliance whose label it has not read; `read` is the label before it."""
  if read:
    return f'I can make a {read.state} thing here. I try the {place}.'
  return f'To make it {state}, read the labels. I try the {place}.'


def use_thought(rule: Rule, kind: str) -> str:
  """Why it does what it does with a thing of a kind where it is."""
  return f'I can make a {rule.state} {kind} here. I {rule.verb} it.'


class Expert:
  """Plays one episode of a household task.

  `error_rate` makes it err on purpose (wrong verb, wrong place, not reading), for banks that need
  failures.
  """

  def __init__(
    self,
    task: Task,
    known_rules: Sequence[Rule] = (),
    *,
    error_rate: float = 0.0,
    in_order: bool = False,
    seed: int = 0,
  ):
    """Prepares an episode.

    Args:
      task: the task; only its instruction is read.
      known_rules: rules that it may use without having read a label.
      error_rate: probability of an error per decision, 0..1.
      in_order: furniture is searched and appliances are tried as the room lists them, and not the
        likely ones first and a random one of several. The next one of a list is easier to learn.
      seed: order of exploration and errors.
    """
    self._rng = random.Random(f'expert {seed} {task.id}')
    self._known = tuple(known_rules)
    self._error_rate = error_rate
    self._in_order = in_order
    self._kind, self._goal = parse_goal(task.instruction)
    self._receptacles: list[str] = []
    self._seen: dict[str, set[str]] = {}
    self._closed: set[str] = set()
    self._at = ''
    self._held = ''
    self._labels: dict[str, Rule] = {}
    self._pending: Decision | None = None
    self._plan: Iterator[Decision] | None = None
    self._last = ''

  def act(self, observation: str) -> Decision:
    """Takes the newest observation and returns the next move."""
    if self._plan is None:
      self._receptacles = _NAME.findall(observation)
      self._plan = self._play()
    else:
      self._note(observation)
    if self._pending is None:
      self._pending = next(self._plan, Decision('look', 'I look around.'))
    decision = self._mistake(self._pending)
    if decision is None:
      decision, self._pending = self._pending, None
    self._last = decision.action
    return decision

  def _note(self, observation: str) -> None:
    """Remembers what the answer to the last action showed."""
    if observation.startswith(NOTHING):
      return
    verb, _, rest = self._last.partition(' ')
    if verb == 'go':
      self._at = rest.removeprefix('to ')
    elif verb == 'take':
      thing, _, place = rest.partition(' from ')
      self._held = thing
      self._seen.get(place, set()).discard(thing)
    elif verb == 'move':
      thing, _, place = rest.partition(' to ')
      self._held = ''
      self._seen.setdefault(place, set()).add(thing)
    place = rest.removeprefix('to ')
    if verb in ('go', 'open', 'close', 'examine') and place in self._receptacles:
      if verb == 'close' or f'The {place} is closed.' in observation:
        self._closed.add(place)
      elif 'you see' in observation:
        self._closed.discard(place)
        self._seen[place] = set(_NAME.findall(observation.partition('you see')[2]))
      label = _LABEL.search(observation)
      if label:
        kind = place.split()[0]
        self._labels[kind] = Rule(label[3], label[1], kind, label[2] or '')

  def _mistake(self, decision: Decision) -> Decision | None:
    """Now and then something else than what is due; the due move stays pending."""
    if self._error_rate <= 0 or self._rng.random() >= self._error_rate:
      return None
    words = decision.action.split()
    if 'with' in words and self._held:
      verb = self._rng.choice([v for v in VERBS if v != words[0]])
      return Decision(' '.join([verb, *words[1:]]), f'I {verb} it.')
    if words[0] == 'examine' and self._held:
      verb = self._rng.choice(VERBS)
      action = f'{verb} {self._held} with {self._at}'
      return Decision(action, f'I guess that I have to {verb} it here.')
    elsewhere = [r for r in self._receptacles if r != self._at and r not in decision.action]
    if words[0] == 'go' and elsewhere:
      place = self._rng.choice(elsewhere)
      return Decision(f'go to {place}', f'I look at the {place}.')
    return None

  # The plans below are generators: each yields the next move and goes on when it was made.

  def _play(self) -> Iterator[Decision]:
    goal = self._goal
    if self._kind == 'light':
      yield from self._light(goal['thing'], goal['lamp'])
    elif self._kind == 'two':
      yield from self._two(goal['thing'], goal['goal'])
    elif self._kind:
      yield from self._fetch(goal['thing'])
      state = goal.get('state')
      verb = goal.get('verb') or _OFFICIAL_VERB.get(state or '')
      if verb:
        yield from self._treat(verb)
      elif state:
        yield from self._make(state)
      if goal.get('goal'):
        yield from self._bring(goal['goal'], state)

  def _go(self, place: str, thought: str) -> Iterator[Decision]:
    if self._at != place:
      yield Decision(f'go to {place}', thought)

  def _find(self, kind: str, avoid: str = '') -> tuple[str, str] | None:
    """A thing of this kind that was seen, and its place; never one at a place of kind `avoid`."""
    places = sorted(self._seen, key=lambda place: place != self._at)
    for place in places:
      if avoid and place.split()[0] == avoid:
        continue
      for thing in sorted(self._seen[place]):
        if thing.split()[0] == kind:
          return thing, place
    return None

  def _search_order(self, kind: str) -> list[str]:
    """All receptacles, appliances last: as the room lists them, or the likely kinds first."""
    order = list(self._receptacles)
    if self._in_order:
      return sorted(order, key=lambda place: place.split()[0] in APPLIANCES)
    self._rng.shuffle(order)

    def rank(place: str) -> tuple[int, int]:
      type_ = place.split()[0]
      if type_ in APPLIANCES:
        return 3, 0
      if type_ in _OPEN_FIRST:
        return 0, _OPEN_FIRST.index(type_)
      if type_ == 'fridge' and kind in _IN_FRIDGE:
        return 0, 2
      return 1, 0

    return sorted(order, key=rank)

  def _explore(self, kind: str, avoid: str = '') -> Iterator[Decision]:
    """Goes on until a thing of this kind has been seen."""
    for place in self._search_order(kind):
      if self._find(kind, avoid):
        return
      if place in self._seen:
        continue
      yield from self._go(place, f'I need a {kind}. I look at the {place}.')
      # From a place at the same location there is no way to go: it is in reach already.
      if self._at != place:
        yield Decision(f'examine {place}', f'I look at the {place}.')
      if place in self._closed:
        yield Decision(f'open {place}', f'The {place} is closed. I open it.')

  def _fetch(self, kind: str, avoid: str = '') -> Iterator[Decision]:
    """Finds a thing of this kind and takes it."""
    yield from self._explore(kind, avoid)
    found = self._find(kind, avoid)
    if not found:
      return
    thing, place = found
    yield from self._go(place, f'The {thing} is at the {place}.')
    if place in self._closed:
      yield Decision(f'open {place}', f'The {place} is closed. I open it.')
    yield Decision(f'take {thing} from {place}', f'I found the {thing}. I take it.')

  def _nearest(self, kind: str) -> str:
    """A receptacle of this kind, the present one if it is one."""
    places = [place for place in self._receptacles if place.split()[0] == kind]
    if self._at in places:
      return self._at
    return min(places, key=lambda place: int(place.split()[1]), default='')

  def _bring(self, kind: str, state: str | None = None) -> Iterator[Decision]:
    place = self._nearest(kind)
    if not place or not self._held:
      return
    what = f'It is {state} now. ' if state else ''
    yield from self._go(place, f'{what}I bring it to the {place}.')
    if place in self._closed:
      yield Decision(f'open {place}', f'The {place} is closed. I open it.')
    yield Decision(f'move {self._held} to {place}', f'I put the {self._held} there.')

  def _treat(self, verb: str) -> Iterator[Decision]:
    """Official: clean, heat or cool what is held."""
    place = self._nearest(_OFFICIAL_APPLIANCE[verb])
    if not place or not self._held:
      return
    yield from self._go(place, f'I have to {verb} the {self._held}. I go to the {place}.')
    yield Decision(f'{verb} {self._held} with {place}', f'I {verb} the {self._held} here.')

  def _two(self, kind: str, goal: str) -> Iterator[Decision]:
    # Both must stand in the same receptacle; what already stands in it counts.
    target = self._nearest(goal)
    for _ in range(2):
      yield from self._fetch(kind, avoid=goal)
      if not self._held or not target:
        return
      yield from self._go(target, f'I bring it to the {target}.')
      if target in self._closed:
        yield Decision(f'open {target}', f'The {target} is closed. I open it.')
      yield Decision(f'move {self._held} to {target}', f'I put the {self._held} there.')

  def _light(self, kind: str, lamp: str) -> Iterator[Decision]:
    yield from self._fetch(kind)
    yield from self._explore(lamp)
    found = self._find(lamp)
    if found:
      yield from self._go(found[1], f'The {found[0]} is at the {found[1]}.')
      yield Decision(f'use {found[0]}', f'I turn on the {found[0]}.')

  def _make(self, state: str) -> Iterator[Decision]:
    """Skills: brings what is held into the state."""
    rule = self._rule_for(state)
    if rule:
      place = self._nearest(rule.appliance)
      yield from self._go(place, plan_thought(rule))
      yield from self._perform(rule, place)
      return
    places = [place for place in self._receptacles if place.split()[0] in APPLIANCES]
    if not self._in_order:
      self._rng.shuffle(places)
    read = None
    for place in places:
      yield from self._go(place, search_thought(state, place, read))
      yield Decision(f'examine {place}', '')
      read = self._labels.get(place.split()[0])
      if read and read.state == state:
        yield from self._perform(read, place)
        return

  def _rule_for(self, state: str) -> Rule | None:
    kinds = {place.split()[0] for place in self._receptacles}
    rules = [*self._known, *self._labels.values()]
    return next((r for r in rules if r.state == state and r.appliance in kinds), None)

  def _perform(self, rule: Rule, place: str) -> Iterator[Decision]:
    if rule.precondition == 'open' and place in self._closed:
      yield Decision(f'open {place}', f'The {place} must be open.')
    elif rule.precondition == 'closed' and place not in self._closed:
      yield Decision(f'close {place}', f'The {place} must be closed.')
    elif rule.precondition == 'on':
      yield Decision(f'use {place}', f'The {place} must be on.')
    thought = use_thought(rule, self._held.partition(' ')[0])
    yield Decision(f'{rule.verb} {self._held} with {place}', thought)
