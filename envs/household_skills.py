"""Skills: generated rules of the household game, and the words they are made of.

A skill is a rule: a thing gets STATE by VERB at APPLIANCE. Words are common, lower case and (nearly
all) one token each; none belongs to the official game, and which verb at which appliance brings
which state is drawn at random, so that no word gives a rule away. Disjoint pools of states:

  warm: rules are redrawn for every episode; a model can learn to read a rule, never to know one.
  loop: every state has exactly one rule per seed; what hint distillation can internalise.
  hard: likewise, on states that nothing is trained on; what only retrieval can supply.
  easy: likewise, many of them; what experience retrieval is trained on.

No (verb, appliance) pair of the loop's or the hard table occurs in a warm episode or in the easy
table of that seed.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from data.errors import UserError
from envs.household import Rule

POOLS = {
  'warm': (
    'striped', 'golden', 'velvet', 'polished', 'sweet', 'sour', 'soft', 'curly',
    'square', 'hollow', 'bright', 'pink', 'green', 'red', 'yellow', 'fuzzy',
    'smooth', 'shiny', 'dusty', 'floral', 'fancy', 'magnetic', 'vivid', 'bitter',
  ),
  'loop': (
    'dotted', 'bronze', 'carved', 'salty', 'stiff', 'flat',
    'pale', 'blue', 'sticky', 'rough', 'lucky', 'noble',
  ),
  'hard': (
    'silver', 'woven', 'crisp', 'round', 'dense', 'purple',
    'orange', 'fluffy', 'sharp', 'oily', 'glossy', 'rustic',
  ),
  'easy': (
    'tall', 'thin', 'wide', 'dark', 'heavy', 'plain', 'ancient', 'gentle',
    'wild', 'quiet', 'loud', 'rich', 'thick', 'narrow', 'deep', 'steep',
    'rigid', 'fragile', 'tight', 'loose', 'gray', 'brown', 'violet', 'royal',
    'modern', 'rare', 'frozen', 'wooden', 'metallic', 'marble', 'spicy', 'creamy',
  ),
}  # fmt: skip
VERBS = (
  'spin', 'shake', 'roll', 'fold', 'wrap', 'seal', 'dip', 'soak',
  'stir', 'stretch', 'bend', 'tap', 'strike', 'pump', 'scan', 'charge',
  'trim', 'stack', 'weigh', 'rub', 'scrape', 'steam', 'coat', 'load',
  'feed', 'lift', 'tune', 'print', 'sort', 'stamp', 'press', 'brush',
)  # fmt: skip
APPLIANCES = (
  'kiln', 'loom', 'oven', 'mixer', 'grill', 'furnace', 'engine', 'boiler',
  'robot', 'drum', 'barrel', 'chamber', 'forge', 'mill', 'laser', 'crane',
  'vault', 'tank', 'tower', 'wheel', 'fan', 'fountain', 'organ', 'altar',
  'piano', 'radio', 'camera', 'bell', 'horn', 'prism', 'globe', 'turbine',
)  # fmt: skip
PRECONDITIONS = ('open', 'closed', 'on')


def draw(
  pool: str, seed: int, episode: int | str = 0, precondition_rate: float = 0.0
) -> tuple[Rule, ...]:
  """The table of a pool: one rule for each of its states.

  Args:
    pool: a key of `POOLS`.
    seed: chooses the rules.
    episode: redraws the warm table; without effect on the others.
    precondition_rate: share of rules with a precondition, 0..1.

  Returns:
    One rule per state of the pool, in the pool's order; within a table no verb and no appliance
    occurs twice.

  Raises:
    UserError: there is no such pool.
  """
  if pool not in POOLS:
    raise UserError(f'Unknown skill pool {pool!r}; there are {", ".join(POOLS)}.')
  if pool == 'warm':
    kept = {(r.verb, r.appliance) for name in ('loop', 'hard') for r in draw(name, seed)}
    return _table(pool, f'{seed} warm {episode}', kept, precondition_rate)
  if pool == 'easy':
    kept = {(r.verb, r.appliance) for name in ('loop', 'hard') for r in draw(name, seed)}
    return _table(pool, f'{seed} easy', kept, precondition_rate)
  taken = {(r.verb, r.appliance) for r in draw('loop', seed)} if pool == 'hard' else ()
  return _table(pool, f'{seed} {pool}', taken, precondition_rate)


def _table(
  pool: str, key: str, avoided: Collection[tuple[str, str]], precondition_rate: float
) -> tuple[Rule, ...]:
  states = POOLS[pool]
  rng = random.Random(f'skills {key}')
  while True:
    verbs = rng.sample(VERBS, len(states))
    appliances = rng.sample(APPLIANCES, len(states))
    if not any(pair in avoided for pair in zip(verbs, appliances, strict=True)):
      break
  # Drawn apart, so that the rate changes no pair.
  rng = random.Random(f'preconditions {key}')
  conditions = [
    rng.choice(PRECONDITIONS) if rng.random() < precondition_rate else '' for _ in states
  ]
  return tuple(
    Rule(*row) for row in zip(states, verbs, appliances, conditions, strict=True)
  )
