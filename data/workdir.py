"""The folder of a run: its config, and files that are there whole or not at all."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data import errors


def write_json(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
  """Writes beside the place and renames."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(json.dumps(record, indent=2) + '\n')
  os.replace(temporary, path)


def check_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], free_keys: Sequence[str] = ()
) -> None:
  """Checks that a folder that holds a run holds this one; writes nothing.

  Args:
    workdir: may not exist.
    config: flat, of JSON's types.
    free_keys: may differ when the run goes on.

  Raises:
    UserError: the folder holds a run with other settings, which are named.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    return
  try:
    before = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise errors.UserError(
      f'{path} is not readable JSON ({error}); take another --workdir.') from error
  changed = [
    f'{key} (there {before.get(key)!r}, now {config.get(key)!r})'
    for key in sorted(before.keys() | config.keys())
    if key not in free_keys and before.get(key) != config.get(key)
  ]
  if changed:
    raise errors.UserError(
      f'{workdir} holds a run with another config: {", ".join(changed)}; take another --workdir, '
      'or the same config to go on.'
    )


def open_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], free_keys: Sequence[str] = ()
) -> None:
  """Makes the run's folder with its config.json, after `check_workdir`."""
  check_workdir(workdir, config, free_keys)
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
