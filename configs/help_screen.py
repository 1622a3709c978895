"""What `--help` of every entry point shows: one screen, the useful things first."""

import importlib
import pathlib
import re
import sys
import textwrap

from absl import flags

WIDTH, HEIGHT = 100, 24  # columns and lines of the screen
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_ARGUMENTS = ('--help', '-help', '-h', '-?')
_CONFIG_FILE = re.compile(r'--config=(configs/(\w+)\.py)')
_INDENT, _HANG = ' ' * 2, ' ' * 4


def is_asked(argv: list[str]) -> bool:
  """Whether a command line asks for the screen; `--helpfull` and its like are absl's."""
  end = argv.index('--') if '--' in argv else len(argv)
  return any(argument in _ARGUMENTS for argument in argv[1:end])


def _paragraphs(docstring: str) -> list[str]:
  return [p.strip('\n') for p in re.split(r'\n[ ]*\n', docstring.strip('\n')) if p.strip()]


def _usage(paragraph: str) -> list[str]:
  """The commands of an indented paragraph, without their comments.

  A backslash at a line's end is not in the docstring any more, only the next line's indentation is:
  there the command is broken again.
  """
  lines = []
  for line in paragraph.splitlines():
    command = line.partition('#')[0].rstrip()
    lines += re.sub(r'(?<=\S) {2,}(?=\S)', ' \\\\\n' + _HANG, command).splitlines()
  return lines


def _table(rows: list[tuple[str, str]]) -> list[list[str]]:
  """(name, meaning) pairs as two columns; the lines of each pair."""
  column = min(max(len(name) for name, _ in rows), 34)
  table = []
  for name, meaning in rows:
    wrapped = textwrap.wrap(meaning, WIDTH - column - 4) or ['']
    if len(name) > column:
      wrapped.insert(0, '')
    lines = [f'{_INDENT}{name:<{column}}{_INDENT}{wrapped[0]}'.rstrip()]
    table.append(lines + [' ' * (column + 4) + text for text in wrapped[1:]])
  return table


def _flag_rows(required: tuple[str, ...]) -> list[tuple[str, str]]:
  """The entry's own flags: those that are needed first, then as they were defined."""
  modules = flags.FLAGS.flags_by_module_dict()
  own = [*modules.get('configs.cli', ()), *modules.get(sys.argv[0], ())]
  rows = []
  for flag in sorted(own, key=lambda flag: flag.name not in required):
    if flag.boolean:
      name = f'--[no]{flag.name}'
    elif flag.default in (None, ''):
      name = f'--{flag.name}=...'
    else:
      # A path in this repository is shown as one would type it.
      name = f'--{flag.name}={str(flag.default).removeprefix(f"{_ROOT}/")}'
    rows.append((name, flag.help + (' Needed.' if flag.name in required else '')))
  return rows


def _key_rows(path: str, name: str) -> tuple[list[tuple[str, str]], int]:
  """The keys that a config file puts into its HELP_KEYS, and how many it has in all.

  A key's meaning is the comment behind its default in the file, which stays the only place.
  """
  module = importlib.import_module(f'configs.{name}')
  with open(module.__file__, encoding='utf-8') as f:
    comments = dict(re.findall(r'^  (\w+)=.*?,  # (.*)$', f.read(), re.MULTILINE))
  rows = [(f'{key}={module.DEFAULTS[key]}', comments.get(key, '')) for key in module.HELP_KEYS]
  return rows, len(module.DEFAULTS)


def screen(docstring: str, required: tuple[str, ...]) -> str:
  """The help of the running program.

  Args:
    docstring: of its module: a sentence, then the usage in an indented paragraph.
    required: the flags that it cannot do without.

  Returns:
    At most HEIGHT lines of at most WIDTH characters.
  """
  paragraphs = _paragraphs(docstring)
  summary = textwrap.wrap(paragraphs[0], WIDTH)
  usage = next((p for p in paragraphs[1:] if p.startswith(_INDENT)), '')
  lines = [*summary, '', *_usage(usage), '', 'Flags:']
  for rows in _table(_flag_rows(required)):
    lines += rows
  last = ['', 'All flags, also those of absl: --helpfull']
  # A launcher's docstring names a config of another program.
  config = _CONFIG_FILE.search(docstring) if 'config' in flags.FLAGS else None
  if config:
    rows, number = _key_rows(*config.groups())
    lines += [
      '', f'Useful keys of the config; all {number}, and what they mean, are in {config[1]}:']
    for row in _table(rows):
      if len(lines) + len(row) + len(last) <= HEIGHT:
        lines += row
  return '\n'.join(lines + last)
