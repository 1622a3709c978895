"""The official engine: ALFWorld's games played by TextWorld and its PDDL planner.

Optional (`pip install alfworld==0.4.2 textworld[pddl]`); the oracle of the fast engine's tests. It
takes about a second to load a game and plays some dozen steps a second.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator

from data.errors import UserError
from envs import household_files
from envs.household import OFFICIAL
from envs.household_games import GameData
from envs.household_goal import STATE_PREDICATES

_WORLD = frozenset(
  ('atlocation', 'holds', 'inreceptacle', 'objectatlocation', 'opened', *STATE_PREDICATES)
)


@contextlib.contextmanager
def _kept_arguments() -> Iterator[None]:
  """Restores sys.argv, which the planner's translator overwrites."""
  arguments = sys.argv
  try:
    yield
  finally:
    sys.argv = arguments


class TextWorldGame:
  """The interface of `household.Game` on TextWorld.

  Attributes:
    changed: whether the newest command moved the world.
    state: what TextWorld itself says after the newest command ('feedback', 'won', 'done', 'score').
  """

  def __init__(self, data: GameData):
    """Loads a game.

    Args:
      data: a game with the official rules.

    Raises:
      UserError: TextWorld is not installed, or the game has other rules.
    """
    try:
      import textworld
      from alfworld.agents.utils.misc import Demangler
      from textworld.envs.pddl.pddl import PddlEnv, fast_downward_missing
    except ImportError as error:
      raise UserError(
        "engine='textworld' needs `pip install alfworld==0.4.2 textworld[pddl]` "
        f"({error}); or use engine='fast'."
      ) from error
    if fast_downward_missing:
      raise UserError("engine='textworld' needs `pip install textworld[pddl]` (fast-downward).")
    if data.rules != OFFICIAL:
      raise UserError(f'{data.id}: TextWorld knows the official rules only; use engine="fast".')
    content = {
      'pddl_domain': household_files.official_domain(),
      'grammar': household_files.grammar(data.instruction),
      'pddl_problem': data.problem,
    }
    if data.source:
      content = json.loads(pathlib.Path(data.source).read_text())
    self._env = PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))
    with _kept_arguments():
      self._env.load(content)
      infos = self._env._entity_infos
      demangler = Demangler(game_infos=infos)
      for info in infos.values():
        info.name = demangler.demangle_alfred_name(info.id)
    self.changed = False

  def reset(self) -> str:
    """Starts again and returns banner, room description and goal."""
    with _kept_arguments():
      self.state = self._env.reset()
    self._world = self._facts()
    self.changed = False
    return self.state.feedback

  def step(self, command: str) -> tuple[str, bool]:
    """Performs a command; returns the observation and whether the goal holds afterwards."""
    self.state, _, _ = self._env.step(command)
    before, self._world = self._world, self._facts()
    self.changed = self._world != before
    return self.state.feedback, bool(self.state['won'])

  def _facts(self) -> frozenset:
    """The facts that make up the world; others only record that something was looked at."""
    return frozenset(fact for fact in self.state['_facts'] if fact.name in _WORLD)

  @property
  def admissible_commands(self) -> list[str]:
    """All commands that do something now, sorted, without doubles."""
    return list(self.state['admissible_commands'])
