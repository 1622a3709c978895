"""Houses and games of the household environment: written as PDDL problems, stored and loaded.

A generated game is a PDDL problem of ALFWorld's domain in the official layout
ROOT/json_2.1.1/SPLIT/TASK/TRIAL/{game.tw-pddl,traj_data.json}; a game of skills carries its rules
under the key 'rules' of game.tw-pddl. The same (options, seed, split, index) always gives the same
game, on disk or in memory. Every house belongs to one split by a hash of its receptacles, so that
no house, and no placement, is shared between splits whatever their sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import UserError
from envs import household_skills
from envs.household import OFFICIAL, Game, Rule

SPLITS = ('train', 'valid_seen', 'valid_unseen')
SKILL_TASK_TYPES = ('make_state', 'make_state_then_place')
# Of eight hash buckets, the first six are training houses.
_BUCKETS = {'train': range(6), 'valid_seen': range(6, 7), 'valid_unseen': range(7, 8)}
_MAX_DRAWS = 2000

SURFACES = ('Shelf', 'Desk', 'Bed', 'Sofa', 'Cart', 'Dresser', 'Ottoman', 'SideTable')
SKILL_THINGS = (
  'Mug', 'Plate', 'Bowl', 'Cup', 'Vase', 'Book', 'Pen', 'Pencil', 'Candle', 'Box', 'Watch',
  'Pillow', 'Cloth', 'Fork', 'Spoon', 'Apple', 'Tomato', 'Potato', 'Egg', 'Bread', 'Statue',
  'Laptop', 'Kettle', 'Newspaper',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Receptacle:
  """A piece of furniture or an appliance; `type` in camel case ('SideTable')."""

  type: str
  openable: bool = False
  opened: bool = False
  switchable: bool = False


@dataclasses.dataclass(frozen=True)
class Thing:
  """A thing of a type that stands in receptacle number `place`."""

  type: str
  place: int


@dataclasses.dataclass(frozen=True)
class House:
  """Receptacles and what stands in them."""

  receptacles: tuple[Receptacle, ...]
  things: tuple[Thing, ...]

  def signature(self) -> str:
    """What makes two houses the same: the multiset of their receptacles."""
    return house_signature(self.receptacles)

  def placement(self) -> str:
    """House and placement: two games of equal placement look alike."""
    names = [receptacle.type for receptacle in self.receptacles]
    things = sorted(f'{thing.type}@{names[thing.place]}' for thing in self.things)
    return self.signature() + ' | ' + ' '.join(things)


@dataclasses.dataclass(frozen=True)
class GameData:
  """One game, wherever it came from.

  Attributes:
    id: split/TASK/TRIAL.
    task_type: its family.
    instruction: the goal sentence.
    problem: PDDL text.
    rules: table of rules.
    house: the house it was generated from; None for a game read from disk.
    params: `pddl_params` of traj_data.json.
    solvable: whether it can be won.
    source: the file it was read from, '' for a generated game.
  """

  id: str
  task_type: str
  instruction: str
  problem: str
  rules: tuple[Rule, ...] = OFFICIAL
  house: House | None = None
  params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  solvable: bool = True
  source: str = ''

  def game(self) -> Game:
    """The playable game.

    Raises:
      UserError: the problem is damaged; the sentence names its file.
    """
    try:
      return Game(self.problem, self.instruction, self.rules)
    except UserError as error:
      raise UserError(f'{self.source or self.id}: {error}') from error


def house_signature(receptacles: Sequence[Receptacle]) -> str:
  return ' '.join(sorted(receptacle.type for receptacle in receptacles))


def in_split(receptacles: Sequence[Receptacle], split: str) -> bool:
  """Whether a house with these receptacles belongs to the split."""
  digest = hashlib.sha256(house_signature(receptacles).encode()).digest()
  return digest[0] % 8 in _BUCKETS[split]


def draw_house(draw, rng: random.Random, split: str, what: str) -> tuple[Receptacle, ...]:
  """Draws receptacles until they belong to the split.

  Args:
    draw: function of the generator's state that returns a tuple of receptacles.
    rng: the generator.
    split: the split wanted.
    what: names the setting in the error.

  Raises:
    UserError: the setting allows too few different houses.
  """
  for _ in range(_MAX_DRAWS):
    receptacles = draw(rng)
    if in_split(receptacles, split):
      return receptacles
  raise UserError(f'No house of {what} falls into split {split!r}; allow more kinds of houses.')


def _coordinate(rng: random.Random, low: float, high: float) -> str:
  value = round(rng.uniform(low, high), 2)
  sign = 'minus' if value < 0 else 'plus'
  whole, _, part = f'{abs(value):05.2f}'.partition('.')
  return f'_{sign}_{whole}_dot_{part}'


def problem_text(
  name: str,
  house: House,
  goal: str,
  can_contain: Sequence[tuple[str, str]],
  properties: Mapping[str, Sequence[str]],
  rng: random.Random,
) -> str:
  """Writes a PDDL problem in ALFWorld's manner.

  Args:
    name: name of the problem.
    house: receptacles and things; every receptacle gets a place of its own.
    goal: the formula behind :goal.
    can_contain: pairs (receptacle type, thing type).
    properties: per type of thing, its unary predicates ('pickupable', 'heatable').
    rng: draws the coordinates that make the ids.

  Returns:
    The text.
  """
  used: set[str] = set()

  def unique(make) -> str:
    while True:
      id_ = make()
      if id_.lower() not in used:
        used.add(id_.lower())
        return id_

  def scene_id(type_: str) -> str:
    stem, tail = type_, ''
    if type_.endswith('Basin'):
      # ALFRED's basins are parts: Sink|...|SinkBasin, and are named sinkbasin.
      stem, tail = type_.removesuffix('Basin'), f'_bar_{type_}'
    at = '_bar_'.join(_coordinate(rng, low, high) for low, high in ((-4, 4), (0, 2), (-4, 4)))
    return f'{stem}_bar_{at}{tail}'

  def place_id() -> str:
    numbers = [rng.randint(-15, 15), rng.randint(-15, 15), rng.randint(0, 3)]
    numbers.append(rng.choice((30, 45, 60)))
    return 'loc_bar_' + '_bar_'.join(f'_minus_{-n}' if n < 0 else str(n) for n in numbers)

  receptacles = [unique(lambda r=r: scene_id(r.type)) for r in house.receptacles]
  things = [unique(lambda t=t: scene_id(t.type)) for t in house.things]
  places = [unique(place_id) for _ in range(len(receptacles) + 1)]
  thing_types = sorted({t.type for t in house.things} | {thing for _, thing in can_contain})
  receptacle_types = sorted(
    {r.type for r in house.receptacles} | {receptacle for receptacle, _ in can_contain}
  )
  objects = ['agent1 - agent']
  objects += [f'{type_}Type - otype' for type_ in thing_types]
  objects += [f'{type_}Type - rtype' for type_ in receptacle_types]
  objects += [f'{id_} - object' for id_ in sorted(things)]
  objects += [f'{id_} - receptacle' for id_ in sorted(receptacles)]
  objects += [f'{id_} - location' for id_ in places]
  facts = [f'receptacleType {id_} {r.type}Type' for id_, r in zip(receptacles, house.receptacles)]
  facts += [f'objectType {id_} {t.type}Type' for id_, t in zip(things, house.things)]
  facts += [f'canContain {r}Type {t}Type' for r, t in can_contain]
  for id_, thing in zip(things, house.things):
    facts += [f'{predicate} {id_}' for predicate in properties.get(thing.type, ())]
  for id_, receptacle in zip(receptacles, house.receptacles):
    facts += [f'openable {id_}'] * receptacle.openable
    facts += [f'opened {id_}'] * receptacle.opened
    facts += [f'switchable {id_}'] * receptacle.switchable
  facts.append(f'atLocation agent1 {places[-1]}')
  for id_, thing in zip(things, house.things):
    facts.append(f'inReceptacle {id_} {receptacles[thing.place]}')
    facts.append(f'objectAtLocation {id_} {places[thing.place]}')
  facts += [f'receptacleAtLocation {id_} {place}' for id_, place in zip(receptacles, places)]
  lines = [f'(define (problem {name})', '(:domain alfred)', '(:objects']
  lines += [f'  {line}' for line in objects]
  lines += [')', '(:init'] + [f'  ({fact})' for fact in facts] + [')']
  lines += [f'(:goal {goal})', ')']
  return '\n'.join(lines) + '\n'


@dataclasses.dataclass(frozen=True)
class SkillOptions:
  """What a house of skills looks like; ranges are (least, most).

  Attributes:
    num_appliances: appliances, each with a rule of its own; one does what the task asks.
    num_surfaces: pieces of furniture on which things lie.
    num_things: things, the asked one included, all of different types.
    thing_types: how many types of things there are in all houses together. With few of them the
      tasks of one skill resemble one another more than those of one thing.
    precondition_rate: share of rules with a precondition.
    task_types: families that take turns.
  """

  num_appliances: tuple[int, int] = (4, 6)
  num_surfaces: tuple[int, int] = (2, 2)
  num_things: tuple[int, int] = (2, 4)
  thing_types: int = len(SKILL_THINGS)
  precondition_rate: float = 0.0
  task_types: tuple[str, ...] = SKILL_TASK_TYPES

  def __post_init__(self):
    unknown = set(self.task_types) - set(SKILL_TASK_TYPES)
    if unknown or not self.task_types:
      raise UserError(
        f'Task types of skill houses are {", ".join(SKILL_TASK_TYPES)}, not {sorted(unknown)}.'
      )
    for name in ('num_appliances', 'num_surfaces', 'num_things'):
      low, high = getattr(self, name)
      if not 1 <= low <= high:
        raise UserError(f'{name} must be a range (least, most) from 1 on, not {low, high}.')
    if not 1 <= self.thing_types <= len(SKILL_THINGS):
      raise UserError(
        f'num_thing_types must lie in 1..{len(SKILL_THINGS)}, not {self.thing_types}.')
    if self.num_things[1] > self.thing_types:
      raise UserError(f'num_things can be {self.thing_types} at most.')
    if not 0 <= self.precondition_rate <= 1:
      raise UserError(f'precondition_rate must lie in 0..1, not {self.precondition_rate}.')


def skill_game(
  pool: str, seed: int, split: str, index: int, options: SkillOptions | None = None
) -> GameData:
  """Generates game number `index` of a split of a skill pool.

  States and task types take turns, so that every state is asked equally often.

  Args:
    pool: a key of `household_skills.POOLS`.
    seed: chooses the rules and the houses.
    split: 'train', 'valid_seen' or 'valid_unseen'.
    index: number of the game, from 0.
    options: what the houses look like.

  Raises:
    UserError: unknown pool, or a setting without houses.
  """
  options = options or SkillOptions()
  key = f'{seed} {split} {index}'
  rng = random.Random(f'house {pool} {key}')
  table = household_skills.draw(pool, seed, f'{split} {index}', options.precondition_rate)
  if options.num_appliances[1] > len(table):
    raise UserError(f'The pool {pool} has {len(table)} appliances; num_appliances asks for more.')
  task_type = options.task_types[index % len(options.task_types)]
  target = table[index // len(options.task_types) % len(table)]
  others = [rule for rule in table if rule is not target]

  def draw(rng: random.Random) -> tuple[Receptacle, ...]:
    rules = [target, *rng.sample(others, rng.randint(*options.num_appliances) - 1)]
    appliances = [
      Receptacle(
        rule.appliance.capitalize(),
        openable=rule.precondition in ('open', 'closed'),
        # Found in the state that the precondition forbids, so that it matters.
        opened=rule.precondition == 'closed',
        switchable=rule.precondition == 'on',
      )
      for rule in rules
    ]
    surfaces = [Receptacle(rng.choice(SURFACES)) for _ in range(rng.randint(*options.num_surfaces))]
    return (*appliances, *surfaces)

  receptacles = draw_house(draw, rng, split, f'skill pool {pool}')
  surfaces = [i for i, r in enumerate(receptacles) if r.type in SURFACES]
  count = rng.randint(*options.num_things)
  kinds = SKILL_THINGS[:options.thing_types]
  house = House(
    receptacles,
    tuple(Thing(type_, rng.choice(surfaces)) for type_ in rng.sample(kinds, count)),
  )
  thing = house.things[0].type
  present = {receptacle.type.lower() for receptacle in receptacles}
  rules = tuple(rule for rule in table if rule.appliance in present)
  goal = f'(objectType ?o {thing}Type) (hasState ?o {target.state})'
  parent = ''
  instruction = f'make a {target.state} {thing.lower()}.'
  if task_type == 'make_state_then_place':
    parent = receptacles[rng.choice(surfaces)].type
    goal += f' (receptacleType ?r {parent}Type) (inReceptacle ?o ?r)'
    goal = f'(exists (?r - receptacle) (exists (?o - object) (and {goal})))'
    instruction = f'put a {target.state} {thing.lower()} in {parent.lower()}.'
  else:
    goal = f'(exists (?o - object) (and {goal}))'
  name = f'{task_type}-{thing}-{target.state}-{parent or None}-{seed}'
  trial = f'trial_{pool}_{seed}_{index:05d}'
  params = {
    'mrecep_target': '',
    'object_sliced': False,
    'object_target': thing,
    'parent_target': parent,
    'state_target': target.state,
    'toggle_target': '',
  }
  can_contain = sorted({(receptacles[i].type, t.type) for i in surfaces for t in house.things})
  properties = {t.type: ('pickupable',) for t in house.things}
  text = problem_text(f'plan_{trial}', house, f'(and {goal})', can_contain, properties, rng)
  return GameData(f'{split}/{name}/{trial}', task_type, instruction, text, rules, house, params)
