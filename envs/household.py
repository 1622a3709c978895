"""The household text game: ALFWorld's rule system in plain Python, driven by a table of rules.

The game is the one that ALFWorld (Shridhar et al., arXiv 2010.03768, section 3) plays through
TextWorld and a PDDL planner. With the official table `OFFICIAL` every observation, the goal check
and the admissible commands equal TextWorld's, quirks included: they follow from
ALFWorld's `alfred.pddl` (effects) and `alfred.twl2` (texts). Other tables give other games: a rule
says that a thing gets a state by a verb at an appliance, perhaps under a precondition. Such a game
explains itself (labels, reasons why nothing happened); the official one never does.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from data.errors import UserError
from envs import household_goal

NOTHING = 'Nothing happens.'
BANNER = '-= Welcome to TextWorld, ALFRED! =-'
TASK_PREFIX = 'Your task is to: '
HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


@dataclasses.dataclass(frozen=True)
class Rule:
  """A thing gets `state` by `verb` at `appliance`.

  Attributes:
    state: the state it gets, an adjective.
    verb: the command's verb.
    appliance: type of the receptacle (or tool) that does it, lower case.
    precondition: what the appliance must be: '', 'open', 'closed' or 'on'.
    needs: predicate that the thing must have, '' for anything ('heatable').
    removes: state that the thing loses.
    manner: 'held' (the thing is held, the appliance stands here), 'tool' (the thing lies here, the
      appliance is held) or 'self' (the thing stands here and is its own appliance).
  """

  state: str
  verb: str
  appliance: str
  precondition: str = ''
  needs: str = ''
  removes: str = ''
  manner: str = 'held'

  def to_json(self) -> dict[str, str]:
    """The fields that differ from their defaults."""
    row = dataclasses.asdict(self)
    return {f.name: row[f.name] for f in dataclasses.fields(self) if row[f.name] != f.default}


OFFICIAL = (
  Rule('clean', 'clean', 'sinkbasin', needs='cleanable'),
  Rule('clean', 'clean', 'sink', needs='cleanable'),
  Rule('hot', 'heat', 'microwave', needs='heatable', removes='cool'),
  Rule('cool', 'cool', 'fridge', needs='coolable', removes='hot'),
  Rule('sliced', 'slice', 'knife', needs='sliceable', manner='tool'),
  Rule('sliced', 'slice', 'butterknife', needs='sliceable', manner='tool'),
  Rule('toggled', 'use', '', needs='toggleable', manner='self'),
)

# The sentence in which the official game reports a rule's success.
_DONE = {
  'held': 'You {verb} the {thing} using the {appliance}.',
  'tool': 'You {verb}d the {thing} with the {appliance}.',
  'self': 'You turn on the {thing}.',
}
_PROPERTIES = ('pickupable', 'cleanable', 'heatable', 'coolable', 'toggleable', 'sliceable')
_FACT = re.compile(r'\(\s*([\w=-]+)((?:\s+[\w.-]+)*)\s*\)')
_USING = re.compile(r'([a-z]+) (.+) with (.+)')


def _join(items: Sequence[str]) -> str:
  """'x, y, and z', or 'nothing'; two items keep the comma too, as in ALFWorld."""
  if len(items) < 2:
    return items[0] if items else 'nothing'
  return ', '.join(items[:-1]) + ', and ' + items[-1]


def listing(names: Sequence[str]) -> str:
  """'a x 1, and a y 1': what one sees."""
  return _join([f'a {name}' for name in names])


def first_look(names: Sequence[str]) -> str:
  """What one sees from the middle of a room with such furniture."""
  return (
    f'You are in the middle of a room. Looking quickly around you, you see {listing(names)}.')


def demangle(ids: Sequence[str]) -> dict[str, str]:
  """Readable names of sorted PDDL ids: numbered downwards within each type, as ALFWorld does."""
  stems = {}
  for id_ in ids:
    stem, bar, _ = id_.partition('_bar_')
    if bar:
      stems[id_] = stem + 'basin' if 'basin' in id_ else stem
  left = collections.Counter(stems.values())
  names = {}
  for id_ in sorted(stems):
    stem = stems[id_]
    names[id_] = f'{stem} {left[stem]}'
    left[stem] -= 1
  return names


class Problem:
  """The unchanging part of a game, read from the text of a PDDL problem.

  Things and receptacles are numbered in the order of their sorted ids, which is the order in which
  the game lists them.
  """

  def __init__(self, text: str):
    text = text.lower()
    start, end = text.find('(:init'), text.find('(:goal')
    if start < 0 or end < start:
      raise UserError('The household problem has no (:init ...) followed by a (:goal ...).')
    facts = collections.defaultdict(list)
    for name, arguments in _FACT.findall(text, start + len('(:init'), end):
      facts[name].append(arguments.split())
    for name in ('receptacletype', 'receptacleatlocation', 'atlocation'):
      if not facts[name]:
        raise UserError(f'The household problem states no {name}.')
    try:
      self._read(facts)
    except (KeyError, IndexError) as error:
      raise UserError(f'The household problem is inconsistent at {error}.') from error
    self.goal = household_goal.Goal(text[end:], self)

  def _read(self, facts: Mapping[str, list[list[str]]]) -> None:
    """Fills the tables; raises KeyError where a fact names what is not there."""
    ids = {argument for rows in facts.values() for row in rows for argument in row}
    names = demangle(sorted(ids))
    self.receptacles = sorted({row[0] for row in facts['receptacletype']})
    things = {row[0] for row in facts['objecttype']}
    things.update(row[0] for row in facts['objectatlocation'])
    things.update(row[0] for row in facts['inreceptacle'])
    # A few real problems state a property of a thing that stands nowhere (a cracked egg).
    things.update(row[0] for name in _PROPERTIES for row in facts[name])
    self.things = sorted(things)
    receptacle_of = {id_: i for i, id_ in enumerate(self.receptacles)}
    thing_of = {id_: i for i, id_ in enumerate(self.things)}
    self.receptacle_names = [names.get(id_, id_) for id_ in self.receptacles]
    self.thing_names = [names.get(id_, id_) for id_ in self.things]
    self.receptacle_by_name = {name: i for i, name in enumerate(self.receptacle_names)}
    self.thing_by_name = {name: i for i, name in enumerate(self.thing_names)}
    self.receptacle_types = [''] * len(self.receptacles)
    for receptacle, type_ in facts['receptacletype']:
      self.receptacle_types[receptacle_of[receptacle]] = type_.removesuffix('type')
    self.thing_types = [''] * len(self.things)
    for thing, type_ in facts['objecttype']:
      self.thing_types[thing_of[thing]] = type_.removesuffix('type')
    self.location_of = [''] * len(self.receptacles)
    self.receptacles_at = collections.defaultdict(list)
    for receptacle, location in facts['receptacleatlocation']:
      self.location_of[receptacle_of[receptacle]] = location
      self.receptacles_at[location].append(receptacle_of[receptacle])
    for here in self.receptacles_at.values():
      here.sort()
    self.can_contain = {
      (receptacle.removesuffix('type'), thing.removesuffix('type'))
      for receptacle, thing in facts['cancontain']
    }
    self.start = facts['atlocation'][0][1]
    self.openable = {receptacle_of[row[0]] for row in facts['openable']}
    self.opened = {receptacle_of[row[0]] for row in facts['opened']}
    self.switchable = {receptacle_of[row[0]] for row in facts['switchable']}
    self.running = {receptacle_of[row[0]] for row in facts['running']}
    self.contents = [set() for _ in self.receptacles]
    for thing, receptacle in facts['inreceptacle']:
      self.contents[receptacle_of[receptacle]].add(thing_of[thing])
    self.thing_locations = {(thing_of[o], place) for o, place in facts['objectatlocation']}
    self.held = thing_of[facts['holds'][0][1]] if facts['holds'] else None
    self.has = {name: {thing_of[row[0]] for row in facts[name]} for name in _PROPERTIES}
    self.inner = collections.defaultdict(list)
    for inner, outer in facts['inreceptacleobject']:
      self.inner[thing_of[outer]].append(thing_of[inner])
    self.vessels = {thing_of[row[0]] for row in facts['isreceptacleobject']}
    self.states = collections.defaultdict(set)
    for predicate, state in household_goal.STATE_PREDICATES.items():
      for row in facts[predicate]:
        self.states[thing_of[row[0]]].add(state)
    for thing, state in facts['hasstate']:
      self.states[thing_of[thing]].add(state)


LABEL = 'A label reads:'


def label(rule: Rule) -> str:
  """What an appliance's label says of a rule."""
  while_ = f' while it is {rule.precondition}' if rule.precondition else ''
  return f'{LABEL} {rule.verb} things here{while_} to make them {rule.state}.'


class Game:
  """One household game.

  Attributes:
    rules: the table of rules.
    changed: whether the newest command moved the world.
    won: whether the goal holds now.
  """

  def __init__(
    self,
    problem_text: str | Problem,
    task_description: str,
    rules: Sequence[Rule] = OFFICIAL,
  ):
    """Reads a game.

    Args:
      problem_text: a PDDL problem of ALFWorld's domain, or one already parsed.
      task_description: the goal sentence, as it follows 'Your task is to: '.
      rules: the table of rules that hold in this house.

    Raises:
      UserError: the text is no household problem.
    """
    self.problem = problem_text if isinstance(problem_text, Problem) else Problem(problem_text)
    self.task_description = task_description
    self.rules = tuple(rules)
    self._explains = self.rules != OFFICIAL
    self._held_rules = collections.defaultdict(list)
    self._tool_rules = {}
    self._self_rules = {}
    for rule in self.rules:
      if rule.manner == 'held':
        self._held_rules[rule.appliance].append(rule)
      elif rule.manner == 'tool':
        self._tool_rules[rule.verb, rule.appliance] = rule
      else:
        self._self_rules[rule.verb] = rule
    self._handlers = {
      'go': self._go,
      'open': self._open,
      'close': self._close,
      'take': self._take,
      'move': self._move,
      'examine': self._examine,
      'use': self._use,
    }
    self._plain = {'look': self._look, 'inventory': self._inventory, 'help': lambda: HELP}
    self.reset()

  def reset(self) -> str:
    """Puts everything back and returns banner, room description and goal."""
    problem = self.problem
    self.location = problem.start
    self.held = problem.held
    self.contents = [set(inside) for inside in problem.contents]
    self.opened = set(problem.opened)
    self.running = set(problem.running)
    self.thing_locations = set(problem.thing_locations)
    # What was taken out of a receptacle: TextWorld keeps these facts, and `look` lists from them.
    self._taken_out = set()
    self.states = collections.defaultdict(set)
    for thing, states in problem.states.items():
      self.states[thing] = set(states)
    self.changed = False
    self.won = problem.goal.holds(self)
    room = self._look(first=True)
    return f'{BANNER}\n\n{room}\n\n{TASK_PREFIX}{self.task_description}'

  def step(self, command: str) -> tuple[str, bool]:
    """Performs a command; returns the observation and whether the goal holds afterwards."""
    command = command.strip()
    self.changed = False
    plain = self._plain.get(command)
    if plain is not None:
      return plain(), self.won
    verb, _, rest = command.partition(' ')
    handler = self._handlers.get(verb)
    observation = handler(rest) if handler is not None else self._apply(command)
    if self.changed:
      self.won = self.problem.goal.holds(self)
    return observation, self.won

  def _accessible(self, receptacle: int) -> bool:
    return receptacle not in self.problem.openable or receptacle in self.opened

  def _here(self, name: str) -> int | None:
    """The receptacle of this name if the agent stands at it."""
    receptacle = self.problem.receptacle_by_name.get(name)
    if receptacle is None or self.problem.location_of[receptacle] != self.location:
      return None
    return receptacle

  def _describe(self, receptacle: int) -> str:
    name = self.problem.receptacle_names[receptacle]
    if receptacle in self.problem.openable and receptacle not in self.opened:
      return f'The {name} is closed.'
    names = self.problem.thing_names
    inside = listing([names[thing] for thing in sorted(self.contents[receptacle])])
    if receptacle in self.problem.openable:
      return f'The {name} is open. In it, you see {inside}.'
    return f'On the {name}, you see {inside}.'

  def _look(self, first: bool = False) -> str:
    problem = self.problem
    here = problem.receptacles_at.get(self.location, ())
    if not here:
      # The rule lists what stands where the agent is; only the first look is not bound to a place.
      return first_look(problem.receptacle_names if first else ())
    facing = _join([problem.receptacle_names[receptacle] for receptacle in here])
    floor = [
      problem.thing_names[thing]
      for thing, place in sorted(self.thing_locations)
      if place == self.location
      for receptacle in here
      if (thing, receptacle) in self._taken_out
    ]
    return f'You are facing the {facing}. Next to it, you see {listing(floor)}.'

  def _inventory(self) -> str:
    if self.held is None:
      return 'You are not carrying anything.'
    return f'You are carrying: a {self.problem.thing_names[self.held]}.'

  def _go(self, rest: str) -> str:
    if not rest.startswith('to '):
      return NOTHING
    receptacle = self.problem.receptacle_by_name.get(rest[3:])
    if receptacle is None or self.problem.location_of[receptacle] == self.location:
      return NOTHING
    self.location = self.problem.location_of[receptacle]
    self.changed = True
    name = self.problem.receptacle_names[receptacle]
    return f'You arrive at {name}. {self._describe(receptacle)}'

  def _open(self, name: str) -> str:
    receptacle = self._here(name)
    if receptacle is None or receptacle not in self.problem.openable or receptacle in self.opened:
      return NOTHING
    self.opened.add(receptacle)
    self.changed = True
    return f'You open the {name}. {self._describe(receptacle)}'

  def _close(self, name: str) -> str:
    receptacle = self._here(name)
    if receptacle not in self.opened or receptacle not in self.problem.openable:
      return NOTHING
    self.opened.discard(receptacle)
    self.changed = True
    return f'You close the {name}.'

  def _take(self, rest: str) -> str:
    thing_name, _, name = rest.partition(' from ')
    thing = self.problem.thing_by_name.get(thing_name)
    receptacle = self._here(name)
    if (
      thing is None
      or receptacle is None
      or self.held is not None
      or thing not in self.contents[receptacle]
      or thing not in self.problem.has['pickupable']
      or not self._accessible(receptacle)
    ):
      return NOTHING
    self.contents[receptacle].discard(thing)
    self._taken_out.add((thing, receptacle))
    self.thing_locations.discard((thing, self.location))
    self.held = thing
    self.changed = True
    return f'You pick up the {thing_name} from the {name}.'

  def _fits(self, thing: int, receptacle: int) -> bool:
    types = self.problem.receptacle_types[receptacle], self.problem.thing_types[thing]
    return types in self.problem.can_contain and self._accessible(receptacle)

  def _move(self, rest: str) -> str:
    thing_name, _, name = rest.partition(' to ')
    thing = self.problem.thing_by_name.get(thing_name)
    receptacle = self._here(name)
    if thing is None or receptacle is None:
      return NOTHING
    if thing != self.held:
      return self._explain(f'You are not holding the {thing_name}.')
    if not self._fits(thing, receptacle):
      return NOTHING
    self.contents[receptacle].add(thing)
    self._taken_out.discard((thing, receptacle))
    self.thing_locations.add((thing, self.location))
    self.held = None
    self.changed = True
    return f'You move the {thing_name} to the {name}.'

  def _examine(self, name: str) -> str:
    receptacle = self._here(name)
    if receptacle is not None:
      rules = self._held_rules.get(self.problem.receptacle_types[receptacle], ())
      labels = [label(rule) for rule in rules] if self._explains else []
      return ' '.join([self._describe(receptacle), *labels])
    thing = self.problem.thing_by_name.get(name)
    if thing is None or thing != self.held:
      return NOTHING
    return self._describe_thing(thing)

  def _describe_thing(self, thing: int) -> str:
    name = self.problem.thing_names[thing]
    states = self.states.get(thing, frozenset())
    if thing in self.problem.vessels:
      inner = listing([self.problem.thing_names[i] for i in sorted(self.problem.inner[thing])])
      return f'This is a normal {name}. In it, you see {inner}.'
    if self._explains:
      if states:
        return f'This is a {" and ".join(sorted(states))} {name}.'
      return f"There's nothing special about {name}."
    # The official texts join the states in this order, and alone say 'cold' for 'cool'.
    words = [word for word in ('hot', 'cool') if word in states][:1]
    words += [word for word in ('clean',) if word in states]
    if words and 'sliced' in states:
      return f'This is a {" and ".join(words)} sliced {name}.'
    if words:
      return f'This is a {"cold" if words == ["cool"] else " and ".join(words)} {name}.'
    if 'toggled' in states and thing in self.problem.has['toggleable']:
      return f'This {name} is on.'
    if 'sliced' in states and thing in self.problem.has['sliceable']:
      return f'This is a sliced {name}.'
    return f"There's nothing special about {name}."

  def _use(self, name: str) -> str:
    receptacle = self._here(name)
    if receptacle in self.problem.switchable:
      self.running ^= {receptacle}
      self.changed = True
      return f'You turn {"on" if receptacle in self.running else "off"} the {name}.'
    thing = self.problem.thing_by_name.get(name)
    rule = self._self_rules.get('use')
    if rule is None or thing is None or not self._usable(rule, thing):
      return NOTHING
    return self._bring_about(rule, thing, name)

  def _usable(self, rule: Rule, thing: int) -> bool:
    here = self.problem.receptacles_at.get(self.location, ())
    return thing in self.problem.has[rule.needs] and any(thing in self.contents[r] for r in here)

  def _apply(self, command: str) -> str:
    """A command of the form VERB THING with APPLIANCE."""
    match = _USING.fullmatch(command)
    if match is None:
      return NOTHING
    verb, thing_name, name = match.groups()
    problem = self.problem
    thing = problem.thing_by_name.get(thing_name)
    if thing is None:
      return NOTHING
    tool = problem.thing_by_name.get(name)
    if tool is not None and tool == self.held:
      rule = self._tool_rules.get((verb, problem.thing_types[tool]))
      if rule is not None and self._sliceable(rule, thing):
        return self._bring_about(rule, thing, name)
      return NOTHING
    receptacle = problem.receptacle_by_name.get(name)
    if receptacle is None:
      return NOTHING
    if problem.location_of[receptacle] != self.location:
      return self._explain(f'You are not at the {name}.')
    rules = self._held_rules.get(problem.receptacle_types[receptacle])
    if not rules:
      return NOTHING
    rule = next((rule for rule in rules if rule.verb == verb), None)
    if rule is None:
      verbs = ' or '.join(rule.verb for rule in rules)
      return self._explain(f'The {name} can only {verbs} things.')
    if thing != self.held:
      return self._explain(f'You are not holding the {thing_name}.')
    if rule.needs and thing not in problem.has[rule.needs]:
      return NOTHING
    if not self._ready(rule, receptacle):
      return self._explain(f'The {name} must be {rule.precondition}.')
    return self._bring_about(rule, thing, name)

  def _sliceable(self, rule: Rule, thing: int) -> bool:
    return thing in self.problem.has[rule.needs] and (thing, self.location) in self.thing_locations

  def _ready(self, rule: Rule, receptacle: int) -> bool:
    """Whether the appliance is as the rule wants it."""
    if rule.precondition == 'open':
      return self._accessible(receptacle)
    if rule.precondition == 'closed':
      return receptacle in self.problem.openable and receptacle not in self.opened
    if rule.precondition == 'on':
      return receptacle in self.running
    return True

  def _bring_about(self, rule: Rule, thing: int, appliance: str) -> str:
    before = frozenset(self.states[thing])
    self.states[thing].add(rule.state)
    self.states[thing].discard(rule.removes)
    self.changed = before != self.states[thing]
    name = self.problem.thing_names[thing]
    if self._explains:
      return f'You {rule.verb} the {name} with the {appliance}. It is now {rule.state}.'
    return _DONE[rule.manner].format(verb=rule.verb, thing=name, appliance=appliance)

  def _explain(self, reason: str) -> str:
    return f'{NOTHING} {reason}' if self._explains else NOTHING

  @property
  def admissible_commands(self) -> list[str]:
    """All commands that do something now, sorted, without doubles."""
    problem = self.problem
    commands = {'help', 'inventory', 'look'}
    for receptacle, name in enumerate(problem.receptacle_names):
      if problem.location_of[receptacle] != self.location:
        commands.add(f'go to {name}')
    for receptacle in problem.receptacles_at.get(self.location, ()):
      commands.update(self._admissible_at(receptacle))
    if self.held is not None:
      held = problem.thing_names[self.held]
      commands.add(f'examine {held}')
      for (verb, tool), rule in self._tool_rules.items():
        if problem.thing_types[self.held] == tool:
          commands.update(
            f'{verb} {problem.thing_names[thing]} with {held}'
            for thing in problem.has[rule.needs]
            if self._sliceable(rule, thing)
          )
    return sorted(commands)

  def _admissible_at(self, receptacle: int) -> list[str]:
    problem = self.problem
    name = problem.receptacle_names[receptacle]
    commands = [f'examine {name}']
    if receptacle in problem.openable:
      commands.append(f'{"close" if receptacle in self.opened else "open"} {name}')
    if receptacle in problem.switchable:
      commands.append(f'use {name}')
    for rule in self._self_rules.values():
      commands.extend(
        f'{rule.verb} {problem.thing_names[thing]}'
        for thing in self.contents[receptacle]
        if thing in problem.has[rule.needs]
      )
    if self.held is None:
      if self._accessible(receptacle):
        commands.extend(
          f'take {problem.thing_names[thing]} from {name}'
          for thing in self.contents[receptacle]
          if thing in problem.has['pickupable']
        )
      return commands
    held = problem.thing_names[self.held]
    if self._fits(self.held, receptacle):
      commands.append(f'move {held} to {name}')
    for rule in self._held_rules.get(problem.receptacle_types[receptacle], ()):
      able = not rule.needs or self.held in problem.has[rule.needs]
      if able and self._ready(rule, receptacle):
        commands.append(f'{rule.verb} {held} with {name}')
    return commands
