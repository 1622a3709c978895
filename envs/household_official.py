"""Generated houses and tasks of ALFWorld's six official types, with the official rules.

Types of things and receptacles, what fits where, and what can be heated, cooled, cleaned or sliced
are ALFRED's (Shridhar et al., arXiv 1912.01734; its `constants.py`); rooms and their furniture are
modelled on its four kinds of scenes. TextWorld plays these games, too.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from data.errors import UserError
from envs.household_games import GameData, House, Receptacle, Thing, draw_house, problem_text

TASK_TYPES = (
  'pick_and_place_simple',
  'look_at_obj_in_light',
  'pick_clean_then_place_in_recep',
  'pick_heat_then_place_in_recep',
  'pick_cool_then_place_in_recep',
  'pick_two_obj_and_place',
)
_TEMPLATES = {
  'pick_and_place_simple': ('put a {o} in {r}.', 'put some {o} on {r}.'),
  'look_at_obj_in_light': ('look at {o} under the desklamp.', 'examine the {o} with the desklamp.'),
  'pick_clean_then_place_in_recep': (
    'put a clean {o} in {r}.',
    'clean some {o} and put it in {r}.',
  ),
  'pick_heat_then_place_in_recep': ('put a hot {o} in {r}.', 'heat some {o} and put it in {r}.'),
  'pick_cool_then_place_in_recep': ('put a cool {o} in {r}.', 'cool some {o} and put it in {r}.'),
  'pick_two_obj_and_place': ('put two {o} in {r}.', 'find two {o} and put them in {r}.'),
}

# What can stand in or on what.
_SEAT = (
  'BasketBall Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow RemoteControl'
)
_DESK = (
  'AlarmClock BasketBall Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup Glassbottle '
  'KeyChain Laptop Mug Newspaper Pen Pencil Plate RemoteControl SprayBottle Statue TennisRacket '
  'TissueBox ToiletPaper Vase Watch WateringCan WineBottle'
)
_TABLE = (
  'AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD Candle CellPhone '
  'Cloth CreditCard Cup DishSponge Egg Fork Glassbottle HandTowel Kettle KeyChain Knife Ladle '
  'Laptop Lettuce Mug Newspaper Pan Pen Pencil PepperShaker Plate Pot Potato RemoteControl '
  'SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle Statue TennisRacket TissueBox '
  'ToiletPaper Tomato Vase Watch WateringCan WineBottle'
)
FITS = {
  kind: tuple(things.split())
  for kind, things in {
    'ArmChair': _SEAT,
    'BathtubBasin': 'Cloth DishSponge HandTowel SoapBar',
    'Bed': 'BaseballBat BasketBall Book CellPhone Laptop Newspaper Pillow TennisRacket',
    'Cabinet': 'Book Bowl Box CD Candle Cloth Cup DishSponge Glassbottle HandTowel Kettle Ladle '
    'Mug Newspaper Pan PepperShaker Plate Plunger Pot SaltShaker SoapBar SoapBottle SprayBottle '
    'TissueBox ToiletPaper Vase WateringCan WineBottle',
    'Cart': 'Candle Cloth DishSponge HandTowel Mug Plunger SoapBar SoapBottle SprayBottle Statue '
    'TissueBox ToiletPaper Vase',
    'CoffeeMachine': 'Mug',
    'CoffeeTable': _TABLE,
    'CounterTop': _TABLE,
    'Desk': _DESK + ' SoapBottle DeskLamp',
    'DiningTable': _TABLE,
    'Drawer': 'Book ButterKnife CD Candle CellPhone Cloth CreditCard DishSponge Fork HandTowel '
    'KeyChain Knife Ladle Newspaper Pen Pencil PepperShaker RemoteControl SaltShaker SoapBar '
    'SoapBottle Spatula Spoon SprayBottle TissueBox ToiletPaper Watch WateringCan',
    'Dresser': _DESK + ' DeskLamp',
    'Fridge': 'Apple Bowl Bread Cup Egg Glassbottle Lettuce Mug Pan Plate Pot Potato Tomato '
    'WineBottle',
    'GarbageCan': 'Apple Bread CD Cloth DishSponge Egg HandTowel Lettuce Newspaper Pen Pencil '
    'Potato SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Tomato WineBottle',
    'HandTowelHolder': 'HandTowel',
    'LaundryHamper': 'Cloth',
    'Microwave': 'Apple Bowl Bread Cup Egg Glassbottle Mug Plate Potato Tomato',
    'Ottoman': _SEAT,
    'Safe': 'CD CellPhone CreditCard KeyChain Statue Vase Watch',
    'Shelf': 'AlarmClock Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup DishSponge '
    'Glassbottle HandTowel Kettle KeyChain Mug Newspaper Pen Pencil PepperShaker Plate Pot '
    'RemoteControl SaltShaker SoapBar SoapBottle SprayBottle Statue TissueBox ToiletPaper Vase '
    'Watch WateringCan WineBottle',
    'SideTable': _TABLE + ' DeskLamp',
    'SinkBasin': 'Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Glassbottle HandTowel '
    'Kettle Knife Ladle Lettuce Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato',
    'Sofa': _SEAT,
    'StoveBurner': 'Kettle Pan Pot',
    'Toaster': '',
    'Toilet': 'Candle Cloth DishSponge HandTowel Newspaper SoapBar SoapBottle SprayBottle '
    'TissueBox ToiletPaper',
    'ToiletPaperHanger': 'ToiletPaper',
    'TowelHolder': 'Towel',
  }.items()
}
OPENABLE = ('Fridge', 'Cabinet', 'Microwave', 'Drawer', 'Safe')
_PROPERTIES = {
  'heatable': 'Apple Bread Cup Egg Mug Plate Potato Tomato',
  'coolable': 'Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle',
  'cleanable': 'Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce '
  'Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato',
  'sliceable': 'Apple Bread Egg Lettuce Potato Tomato',
  'toggleable': 'DeskLamp',
  'isReceptacleObject': 'Bowl Box Cup Mug Pan Plate Pot',
}
_WITH = {name: frozenset(things.split()) for name, things in _PROPERTIES.items()}

# Furniture of each kind of room: least and most of each.
ROOMS = {
  'kitchen': {
    'Cabinet': (1, 12), 'CoffeeMachine': (0, 1), 'CounterTop': (1, 3), 'DiningTable': (0, 1),
    'Drawer': (0, 9), 'Fridge': (1, 1), 'GarbageCan': (0, 1), 'Microwave': (1, 1), 'Shelf': (0, 3),
    'SinkBasin': (1, 1), 'StoveBurner': (0, 4), 'Toaster': (0, 1),
  },
  'livingroom': {
    'ArmChair': (0, 2), 'Cabinet': (0, 6), 'CoffeeTable': (1, 2), 'DiningTable': (0, 1),
    'Drawer': (0, 8), 'Dresser': (0, 1), 'GarbageCan': (0, 1), 'Ottoman': (0, 1), 'Safe': (0, 1),
    'Shelf': (0, 6), 'SideTable': (1, 3), 'Sofa': (1, 2),
  },
  'bedroom': {
    'ArmChair': (0, 1), 'Bed': (1, 2), 'Desk': (1, 2), 'Drawer': (1, 12), 'Dresser': (0, 1),
    'GarbageCan': (0, 1), 'LaundryHamper': (0, 1), 'Safe': (0, 1), 'Shelf': (0, 8),
    'SideTable': (0, 2),
  },
  'bathroom': {
    'BathtubBasin': (0, 1), 'Cabinet': (1, 10), 'Cart': (0, 1), 'CounterTop': (1, 2),
    'Drawer': (0, 6), 'GarbageCan': (0, 1), 'HandTowelHolder': (0, 2), 'Shelf': (0, 2),
    'SinkBasin': (1, 2), 'Toilet': (1, 1), 'ToiletPaperHanger': (0, 1), 'TowelHolder': (0, 2),
  },
}  # fmt: skip
_ROOM_THINGS = {
  'kitchen': 'Apple Book Bowl Bread ButterKnife CellPhone CreditCard Cup DishSponge Egg Fork '
  'Glassbottle Kettle Knife Ladle Lettuce Mug Newspaper Pan PepperShaker Plate Pot Potato '
  'SaltShaker SoapBottle Spatula Spoon Statue Tomato Vase WineBottle',
  'livingroom': 'Book Bowl Box Candle CellPhone CreditCard KeyChain Laptop Newspaper Pen Pencil '
  'Pillow Plate RemoteControl Statue TissueBox Vase Watch WateringCan',
  'bedroom': 'AlarmClock BaseballBat BasketBall Book Bowl Box CD CellPhone Cloth CreditCard '
  'KeyChain Laptop Mug Pen Pencil Pillow Statue TennisRacket TissueBox Vase Watch',
  'bathroom': 'Candle Cloth DishSponge HandTowel Plunger SoapBar SoapBottle SprayBottle TissueBox '
  'ToiletPaper Towel',
}
_TASK_ROOMS = {
  'pick_and_place_simple': tuple(ROOMS),
  'look_at_obj_in_light': ('livingroom', 'bedroom'),
  'pick_clean_then_place_in_recep': ('kitchen', 'bathroom'),
  'pick_heat_then_place_in_recep': ('kitchen',),
  'pick_cool_then_place_in_recep': ('kitchen',),
  'pick_two_obj_and_place': tuple(ROOMS),
}
_TASK_PROPERTY = {
  'pick_clean_then_place_in_recep': ('cleanable', 'isClean'),
  'pick_heat_then_place_in_recep': ('heatable', 'isHot'),
  'pick_cool_then_place_in_recep': ('coolable', 'isCool'),
}
_MOST_FILLERS = {'CounterTop': 7, 'DiningTable': 7, 'CoffeeTable': 5, 'SideTable': 4, 'Desk': 6}
_MOST_ANYWHERE = 3


@dataclasses.dataclass(frozen=True)
class OfficialOptions:
  """What generated official games look like.

  Attributes:
    num_receptacles: least and most receptacles of a house.
    task_types: families that take turns.
  """

  num_receptacles: tuple[int, int] = (6, 30)
  task_types: tuple[str, ...] = TASK_TYPES

  def __post_init__(self):
    unknown = sorted(set(self.task_types) - set(TASK_TYPES))
    if unknown or not self.task_types:
      raise UserError(f'Official task types are {", ".join(TASK_TYPES)}, not {unknown}.')
    low, high = self.num_receptacles
    if not 6 <= low <= high <= 30:
      raise UserError(f'num_receptacles must lie within 6 and 30, not {low} to {high}.')


def _draw_receptacles(rng: random.Random, room: str, bounds: tuple[int, int]) -> tuple:
  """Furnishes a room: the least of everything, then more at random up to a drawn number."""
  furniture = ROOMS[room]
  counts = {kind: least for kind, (least, _) in furniture.items()}
  wanted = rng.randint(*bounds)
  spare = [kind for kind, (least, most) in furniture.items() for _ in range(most - least)]
  rng.shuffle(spare)
  for kind in spare[: max(0, wanted - sum(counts.values()))]:
    counts[kind] += 1
  return tuple(
    Receptacle(kind, openable=kind in OPENABLE)
    for kind in sorted(counts)
    for _ in range(counts[kind])
  )


def _targets(task_type: str, room: str, kinds: set[str]) -> list[tuple[str, str]]:
  """Pairs (thing, goal receptacle type) that make a sensible task in a house."""
  things = _ROOM_THINGS[room].split()
  needed = _TASK_PROPERTY.get(task_type)
  if needed:
    things = [thing for thing in things if thing in _WITH[needed[0]]]
  homes = {thing: {kind for kind in kinds if thing in FITS[kind]} for thing in things}
  if task_type == 'look_at_obj_in_light':
    return [(thing, '') for thing in things if homes[thing]]
  # The thing must be able to stand somewhere else than where it is wanted.
  return [(t, kind) for t in things for kind in sorted(homes[t]) if homes[t] - {kind}]


def _furnish(
  rng: random.Random, task_type: str, room: str, receptacles: Sequence[Receptacle], target: str,
  parent: str,
) -> tuple[Thing, ...]:  # fmt: skip
  """Places things so that the task can be done and is not done already."""
  kinds = [receptacle.type for receptacle in receptacles]

  def places(thing: str, avoid: str = '') -> list[int]:
    return [i for i, kind in enumerate(kinds) if thing in FITS[kind] and kind != avoid]

  least = 2 if task_type == 'pick_two_obj_and_place' else 1
  things = [
    Thing(target, rng.choice(places(target, parent))) for _ in range(rng.randint(least, 3))
  ]
  if task_type == 'look_at_obj_in_light' or (room == 'bedroom' and rng.random() < 0.5):
    things.append(Thing('DeskLamp', rng.choice(places('DeskLamp'))))
  fillers = [thing for thing in _ROOM_THINGS[room].split() if thing != target]
  for place, kind in enumerate(kinds):
    choice = [thing for thing in fillers if thing in FITS[kind]]
    most = _MOST_FILLERS.get(kind, _MOST_ANYWHERE)
    for _ in range(rng.randint(0, most) if choice else 0):
      thing = rng.choice(choice)
      if sum(t.type == thing for t in things) < _MOST_ANYWHERE:
        things.append(Thing(thing, place))
  return tuple(things)


def _goal(task_type: str, thing: str, parent: str) -> str:
  """The goal formula of ALFWorld's goal library."""
  if task_type == 'look_at_obj_in_light':
    return (
      '(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location)'
      ' (and (objectType ?ot DeskLampType) (toggleable ?ot) (isToggled ?ot)'
      ' (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))'
      f' (exists (?o - object ?a - agent) (and (objectType ?o {thing}Type) (holds ?a ?o))))'
    )
  if task_type == 'pick_two_obj_and_place':
    return (
      f'(and (exists (?r - receptacle) (exists (?o1 - object) (and (objectType ?o1 {thing}Type)'
      f' (receptacleType ?r {parent}Type) (inReceptacle ?o1 ?r) (exists (?o2 - object)'
      f' (and (not (= ?o1 ?o2)) (objectType ?o2 {thing}Type) (receptacleType ?r {parent}Type)'
      ' (inReceptacle ?o2 ?r)))))))'
    )
  able, done = _TASK_PROPERTY.get(task_type, ('', ''))
  state = f'({able} ?o) ({done} ?o) ' if able else ''
  return (
    f'(and (exists (?r - receptacle) (exists (?o - object) (and {state}(inReceptacle ?o ?r)'
    f' (objectType ?o {thing}Type) (receptacleType ?r {parent}Type)))))'
  )


def official_game(
  seed: int, split: str, index: int, options: OfficialOptions | None = None
) -> GameData:
  """Generates game number `index` of a split; the task types take turns.

  Args:
    seed: chooses the houses and tasks.
    split: 'train', 'valid_seen' or 'valid_unseen'.
    index: number of the game, from 0.
    options: sizes and task types.
  """
  options = options or OfficialOptions()
  rng = random.Random(f'official {seed} {split} {index}')
  task_type = options.task_types[index % len(options.task_types)]
  while True:
    room = rng.choice(_TASK_ROOMS[task_type])
    receptacles = draw_house(
      lambda rng, room=room: _draw_receptacles(rng, room, options.num_receptacles),
      rng,
      split,
      f'a {room}',
    )
    targets = _targets(task_type, room, {receptacle.type for receptacle in receptacles})
    if targets:
      break
  target, parent = rng.choice(targets)
  house = House(receptacles, _furnish(rng, task_type, room, receptacles, target, parent))
  template = rng.choice(_TEMPLATES[task_type])
  instruction = template.format(o=target.lower(), r=parent.lower())
  properties = {
    thing: [
      *(('pickupable',) if thing != 'DeskLamp' else ()),
      *(name for name, things in _WITH.items() if thing in things),
    ]
    for thing in {thing.type for thing in house.things}
  }
  kinds = sorted({receptacle.type for receptacle in receptacles})
  can_contain = [(kind, thing) for kind in kinds for thing in FITS[kind]]
  trial = f'trial_official_{seed}_{index:05d}'
  toggle = 'DeskLamp' if task_type == 'look_at_obj_in_light' else ''
  name = f'{task_type}-{target}-None-{parent or toggle}-{room}{seed}'
  params = {
    'mrecep_target': '',
    'object_sliced': False,
    'object_target': target,
    'parent_target': parent,
    'toggle_target': toggle,
  }
  goal = _goal(task_type, target, parent)
  text = problem_text(f'plan_{trial}', house, goal, can_contain, properties, rng)
  return GameData(
    f'{split}/{name}/{trial}', task_type, instruction, text, house=house, params=params
  )
