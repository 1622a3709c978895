"""--help of every entry that BUILD names: one screen, with what one needs to start."""

import functools
import importlib
import re
import subprocess
import sys

import pytest

from configs import help_screen
from tests import build_file

# What asks jax for nothing until it runs; the others load the whole loop.
LIGHT = ('rollout', 'train', 'hints', 'household_generate', 'results_table')

pytestmark = pytest.mark.skipif(
  not build_file.PATH.exists(), reason='BUILD is not among the files of a Bazel test')


def entries():
  """Name of each py_binary -> the words that start it."""
  if not build_file.PATH.exists():
    return {}
  started = {}
  for target in build_file.targets('py_binary'):
    module = target['main'].removesuffix('.py').replace('/', '.')
    started[target['name']] = ['-m', module] if '.' in module else [target['main']]
  return started


@functools.cache
def ask(name, *arguments):
  return subprocess.run(
    [sys.executable, '-X', 'importtime', *entries()[name], *arguments],
    cwd=build_file.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('name', entries())
def test_help_is_one_screen(name):
  done = ask(name, '--help')
  assert done.returncode == 0, done.stderr[-2000:]
  lines = done.stdout.splitlines()
  assert 6 <= len(lines) <= 24 and max(map(len, lines)) <= 100, done.stdout
  text = ' '.join(done.stdout.split())
  # What it does, then how it is called, then the flags.
  assert re.match(r'[A-Z].*[.:]$', lines[0]) or lines[1].strip()
  call = ' '.join(['python', *entries()[name]])
  assert re.search(rf'^  {re.escape(call)}(\s|$)', done.stdout, re.MULTILINE), call
  assert text.index(call) < text.index(' Flags: ') < text.index('--helpfull')
  if 'Needed.' in text:
    flags = done.stdout.partition('Flags:\n')[2].splitlines()
    needed = ['Needed.' in line for line in flags if line.startswith('  --')]
    assert needed == sorted(needed, reverse=True), 'flags that are needed come first'


@pytest.mark.parametrize('name', entries())
def test_the_useful_keys_are_all_there_with_default_and_meaning(name):
  text = ask(name, '--help').stdout
  used = re.search(r'are in configs/(\w+)\.py', text)
  assert bool(used) == bool(re.search(r'^  --config=', text, re.MULTILINE))
  if not used:
    return
  config = importlib.import_module(f'configs.{used[1]}')
  assert 5 <= len(config.HELP_KEYS) == len(set(config.HELP_KEYS))
  assert f'all {len(config.DEFAULTS)}' in text
  for key in config.HELP_KEYS:
    row = re.search(rf'^  {key}=(\S*) +(\S.*)$', text, re.MULTILINE)
    assert row, f'{key} is not on the screen with its meaning'
    assert row[1] == str(config.DEFAULTS[key])


@pytest.mark.parametrize('name', [name for name in entries() if name in LIGHT])
def test_help_does_not_wait_for_jax(name):
  imported = re.findall(r'\| +(\S+)$', ask(name, '--help').stderr, re.MULTILINE)
  assert 'configs.cli' in imported and 'jax' not in imported


def test_all_flags_are_one_flag_away():
  done = ask('hints', '--helpfull')
  assert '--verbosity' in done.stdout and '--base_url' in done.stdout


def test_a_forgotten_flag_is_told_and_points_to_help():
  done = ask('hints', '--writer=rules')
  assert done.returncode == 2 and '--episodes is needed; --help shows how.' in done.stderr


def test_what_asks_for_help():
  assert help_screen.is_asked(['train.py', '--help'])
  assert help_screen.is_asked(['train.py', '--workdir=x', '-h'])
  assert not help_screen.is_asked(['train.py', '--helpfull'])
  assert not help_screen.is_asked(['train.py', '--', '--help'])
  assert not help_screen.is_asked(['--help', '--workdir=x'])
