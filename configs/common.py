"""What every config file shares: typed `key=value` arguments over documented defaults.

A config file is `configs/NAME.py` with `get_config(arg)`; on the command line
`--config=configs/NAME.py:key=value,key=value` sets what shapes the run and
`--config.key=value` changes one field afterwards.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections

from data import errors

_DTYPES = ('auto', 'bfloat16', 'float32')
_TRUE = ('true', '1', 'yes', 'on')
_FALSE = ('false', '0', 'no', 'off')


def near(key: str, known: list[str]) -> str:
  """Returns ' Did you mean ...?' for the known names closest to `key`, or all of them."""
  close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
  if close:
    return f' Did you mean {" or ".join(close)}?'
  return f' Known keys: {", ".join(sorted(known))}.'


def cast(key: str, text: str, default: Any) -> Any:
  """Reads `text` as the type of `default`.

  Raises:
    errors.UserError: if the text is not a value of that type.
  """
  try:
    if isinstance(default, bool):
      lowered = text.lower()
      if lowered in _TRUE:
        return True
      if lowered in _FALSE:
        return False
      raise ValueError
    if isinstance(default, (int, float)):
      return type(default)(text)
    return text
  except ValueError:
    raise errors.UserError(
      f'Config key {key!r} takes a {type(default).__name__}, not {text!r}.'
    ) from None


def parse_arg(arg: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
  """Parses `key=value,key=value` over `defaults`.

  A value may contain commas if the parts after them hold no `=` (lists of run folders).

  Args:
    arg: the text after the colon of `--config=configs/NAME.py:...`; None or '' for none.
    defaults: every key there is, with its default; the default's type is the key's type.

  Returns:
    A new dict with all keys of `defaults`.

  Raises:
    errors.UserError: on an unknown key (names the near ones), a bad value or a key given twice.
  """
  values = dict(defaults)
  if not arg:
    return values
  pairs: list[str] = []
  for part in arg.split(','):
    if '=' in part or not pairs:
      pairs.append(part)
    else:
      pairs[-1] += ',' + part
  seen = set()
  for pair in pairs:
    key, equals, text = pair.partition('=')
    key = key.strip()
    if not equals:
      raise errors.UserError(f'Config argument {pair!r} is not of the form key=value.')
    if key not in defaults:
      raise errors.UserError(f'There is no config key {key!r}.{near(key, list(defaults))}')
    if key in seen:
      raise errors.UserError(f'Config key {key!r} is given twice.')
    seen.add(key)
    values[key] = cast(key, text.strip(), defaults[key])
  return values


def with_values(
  defaults: Mapping[str, Any], values: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A locked ConfigDict of `values` over `defaults`; an int given for a float becomes one.

  Raises:
    errors.UserError: on an unknown key.
  """
  config = dict(defaults)
  for key, value in values.items():
    if key not in defaults:
      raise errors.UserError(f'There is no config key {key!r}.{near(key, list(defaults))}')
    config[key] = float(value) if isinstance(defaults[key], float) else value
  config = ml_collections.ConfigDict(config)
  config.lock()
  return config


def check_dtype(dtype: str) -> None:
  """Raises errors.UserError for a key `dtype` that there is not."""
  if dtype not in _DTYPES:
    raise errors.UserError(f'dtype={dtype!r}: choose {", ".join(_DTYPES)}.')


def check_engine(config: ml_collections.ConfigDict) -> None:
  """What can be wrong about the keys of an engine, said before anything is loaded.

  Raises:
    errors.UserError: one of them has a value that it cannot have.
  """
  for key in ('slots', 'decode_steps'):
    if config[key] < 1:
      raise errors.UserError(f'{key} must be at least 1.')
  check_dtype(config.dtype)
  if config.cache_dtype not in ('', 'float32', 'bfloat16', 'int8'):
    raise errors.UserError(
      f'cache_dtype={config.cache_dtype} is not float32, bfloat16 or int8; leave it out for dtype.')
  if config.lookup < 0:
    raise errors.UserError(f'lookup={config.lookup} is negative; 0 decodes token by token.')


def read_adapters(text: str, base_name: str = '') -> dict[str, str]:
  """Policies by name: NAME:FOLDER;NAME:FOLDER, each a PEFT folder.

  Args:
    text: of the config key `adapters`.
    base_name: under which the base is one of them, the first; '' where NAME: alone is the base.

  Returns:
    Name -> folder, '' for the base.

  Raises:
    errors.UserError: not of the form, or a name that is taken.
  """
  found = {base_name: ''} if base_name else {}
  for pair in filter(None, (part.strip() for part in text.split(';'))):
    name, colon, folder = (part.strip() for part in pair.partition(':'))
    if not (name and colon) or (base_name and not folder):
      or_base = '' if base_name else ' (NAME: alone is the base)'
      raise errors.UserError(f'adapters part {pair!r} is not of the form NAME:FOLDER{or_base}.')
    if name in found:
      base = ' (the base has one, too)' if base_name else ''
      raise errors.UserError(
        f'adapters gives the name {name!r} to two policies{base}; take another.')
    if not folder and '' in found.values():
      raise errors.UserError('adapters names the base twice; once is enough.')
    found[name] = folder
  return found


def make_config(arg: str | None, defaults: dict[str, Any]) -> ml_collections.ConfigDict:
  """Returns a locked, type-safe ConfigDict of `parse_arg(arg, defaults)`."""
  config = ml_collections.ConfigDict(parse_arg(arg, defaults))
  config.lock()
  return config
