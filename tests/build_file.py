"""BUILD as Python reads it: its targets, for the tests that compare it with the code."""

import functools
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / 'BUILD'


def glob(include: list[str], exclude: list[str] | tuple[str, ...] = ()) -> list[str]:
  """Bazel's: the files of the patterns, as sorted paths relative to the root."""
  found = {str(p.relative_to(ROOT)) for pattern in include for p in ROOT.glob(pattern)}
  return sorted(found - (set(glob(list(exclude))) if exclude else set()))


@functools.cache
def _all() -> list[tuple[str, dict[str, Any]]]:
  targets: list[tuple[str, dict[str, Any]]] = []

  def rule(kind: str):
    return lambda **attributes: targets.append((kind, attributes))

  # Starlark is near enough to Python for this file.
  names = {kind: rule(kind) for kind in ('package', 'py_library', 'py_binary', 'py_test')}
  exec(PATH.read_text(), names | {'glob': glob})
  return targets


def targets(kind: str) -> list[dict[str, Any]]:
  """The attributes of every target of a rule, such as 'py_library'."""
  return [attributes for name, attributes in _all() if name == kind]
