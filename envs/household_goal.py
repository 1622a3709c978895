"""Goals of household games: conjunctions of existential PDDL formulas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from data.errors import UserError

_TOKEN = re.compile(r'[()]|[^\s()]+')
# State predicates of the official domain and the states they stand for.
STATE_PREDICATES = {
  'isclean': 'clean',
  'ishot': 'hot',
  'iscool': 'cool',
  'issliced': 'sliced',
  'istoggled': 'toggled',
}


def parse(text: str) -> list:
  """The first s-expression of a text as nested lists of words."""
  stack: list[list] = [[]]
  for token in _TOKEN.findall(text):
    if token == '(':
      stack.append([])
    elif token == ')':
      if len(stack) == 1:
        break
      done = stack.pop()
      stack[-1].append(done)
      if len(stack) == 1:
        return done
    else:
      stack[-1].append(token)
  raise UserError('The goal of the household problem is cut off (unbalanced parentheses).')


class Goal:
  """A goal, compiled for one problem.

  Every top-level conjunct becomes one query: variables with small domains, and the atoms that must
  hold. Facts that never change shrink the domains once; the others are checked while the variables
  are bound.
  """

  def __init__(self, text: str, problem: Any):
    """Compiles.

    Args:
      text: from '(:goal' to the end of the problem, lower case.
      problem: the `household.Problem` it belongs to.

    Raises:
      UserError: the goal is cut off or uses what the game does not know.
    """
    formula = parse(text)
    if formula[:1] != [':goal'] or len(formula) != 2:
      raise UserError('The household problem has no readable goal.')
    conjuncts = formula[1][1:] if formula[1][0] == 'and' else [formula[1]]
    self._queries = [_Query(conjunct, problem) for conjunct in conjuncts]

  def holds(self, game: Any) -> bool:
    """Whether the goal holds in the game's present state."""
    return all(query.holds(game) for query in self._queries)


class _Query:
  """exists variables: all atoms."""

  def __init__(self, formula: list, problem: Any):
    self._problem = problem
    types: dict[str, str] = {}
    self.atoms: list[list[str]] = []
    self._flatten(formula, types)
    everything = {
      'object': range(len(problem.things)),
      'receptacle': range(len(problem.receptacles)),
      'agent': ('agent',),
      'location': sorted(problem.receptacles_at),
    }
    self.domains = {}
    for variable, type_ in types.items():
      if type_ not in everything:
        raise UserError(f'The goal of the household problem speaks of an unknown type: {type_}.')
      domain = set(everything[type_])
      for atom in self.atoms:
        if atom[1] == variable and len(atom) > 1:
          static = self._static(atom)
          if static is not None:
            domain &= static
      self.domains[variable] = domain
    self.atoms = [atom for atom in self.atoms if self._static(atom) is None]
    self._order = self._plan()

  def _flatten(self, formula: list, types: dict[str, str]) -> None:
    head = formula[0] if formula else ''
    if head == 'and':
      for part in formula[1:]:
        self._flatten(part, types)
    elif head == 'exists':
      names: list[str] = []
      words = iter(formula[1])
      for word in words:
        if word == '-':
          types.update(dict.fromkeys(names, next(words)))
          names = []
        else:
          names.append(word)
      self._flatten(formula[2], types)
    elif head == 'not':
      if formula[1][0] != '=':
        raise UserError('The goal of the household problem negates more than an equality.')
      self.atoms.append(['!=', *formula[1][1:]])
    elif head in _CHECKS or head in _STATIC:
      self.atoms.append(formula)
    else:
      raise UserError(f'The goal of the household problem uses an unknown predicate: {head}.')

  def _static(self, atom: list[str]) -> set[int] | None:
    """The numbers for which a fact holds that never changes; None for one that may."""
    problem = self._problem
    name = atom[0]
    if name == 'objecttype':
      wanted = atom[2].removesuffix('type')
      return {i for i, type_ in enumerate(problem.thing_types) if type_ == wanted}
    if name == 'receptacletype':
      wanted = atom[2].removesuffix('type')
      return {i for i, type_ in enumerate(problem.receptacle_types) if type_ == wanted}
    if name in _STATIC:
      return problem.has[name]
    return None

  def _plan(self) -> list[tuple[str, list[list[str]]]]:
    """Order of binding (small domains first) and the atoms that are complete at each step."""
    order = []
    bound: set[str] = set()
    left = list(self.atoms)
    for variable in sorted(self.domains, key=lambda v: (v not in ('?a',), len(self.domains[v]))):
      bound.add(variable)
      ready = [a for a in left if all(w in bound for w in a[1:] if w.startswith('?'))]
      left = [a for a in left if a not in ready]
      order.append((variable, ready))
    return order

  def holds(self, game: Any) -> bool:
    return next(self._solutions(game, {}, 0), None) is not None

  def _solutions(self, game: Any, binding: dict, depth: int) -> Iterator[bool]:
    if depth == len(self._order):
      yield True
      return
    variable, ready = self._order[depth]
    for value in self._candidates(game, binding, variable):
      binding[variable] = value
      if all(_CHECKS[a[0]](game, *(binding.get(word, word) for word in a[1:])) for a in ready):
        yield from self._solutions(game, binding, depth + 1)
    binding.pop(variable, None)

  def _candidates(self, game: Any, binding: dict, variable: str) -> Any:
    # A place that the agent must be at is where it is: no need to try the others.
    for atom in self.atoms:
      if atom[0] == 'atlocation' and atom[2] == variable:
        return (game.location,)
    return self.domains[variable]


def _has_state(game: Any, thing: int, state: str) -> bool:
  return thing in game.states and state in game.states[thing]


_STATIC = (
  'objecttype', 'receptacletype', 'cleanable', 'heatable', 'coolable', 'toggleable', 'sliceable',
  'pickupable',
)  # fmt: skip
_CHECKS = {
  'inreceptacle': lambda game, o, r: o in game.contents[r],
  'holds': lambda game, a, o: game.held == o,
  'atlocation': lambda game, a, place: game.location == place,
  'receptacleatlocation': lambda game, r, place: game.problem.location_of[r] == place,
  'objectatlocation': lambda game, o, place: (o, place) in game.thing_locations,
  'opened': lambda game, r: r in game.opened,
  'hasstate': _has_state,
  '!=': lambda game, x, y: x != y,
  **{
    predicate: lambda game, o, state=state: _has_state(game, o, state)
    for predicate, state in STATE_PREDICATES.items()
  },
}
