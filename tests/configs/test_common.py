"""Typed key=value arguments, and flag errors as a user meets them."""

import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import common
from data import errors

_ROOT = pathlib.Path(__file__).parents[2]
_DEFAULTS = {'model': 'a', 'rate': 1e-3, 'n': 5, 'flag': True}


def test_values_take_the_type_of_their_default():
  parsed = common.parse_arg('model=b,rate=2e-4,n=7,flag=false', _DEFAULTS)
  assert parsed == {'model': 'b', 'rate': 2e-4, 'n': 7, 'flag': False}
  assert common.parse_arg(None, _DEFAULTS) == _DEFAULTS


def test_a_value_may_hold_commas():
  assert common.parse_arg('model=runs/a,runs/b,n=1', _DEFAULTS)['model'] == 'runs/a,runs/b'


@pytest.mark.parametrize('arg, words', [
  ('modle=b', 'Did you mean model'), ('n=x', 'takes a int'), ('flag=maybe', 'takes a bool'),
  ('model', 'key=value'), ('n=1,n=2', 'given twice'), ('zzzzzz=1', 'Known keys')])
def test_bad_arguments_name_the_thing(arg, words):
  with pytest.raises(errors.UserError, match=words):
    common.parse_arg(arg, _DEFAULTS)


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_values_round_trip(n, rate, flag):
  parsed = common.parse_arg(f'n={n},rate={rate!r},flag={flag}', _DEFAULTS)
  assert (parsed['n'], parsed['rate'], parsed['flag']) == (n, rate, flag)


@pytest.mark.parametrize('flags, words', [
  (['--config=configs/rollout.py:modle=x', '--workdir=w'], 'Did you mean model'),
  (['--config=configs/rollout.py', '--config.spilt=x', '--workdir=w'], 'Did you mean split'),
  (['--config=configs/rollout.py', '--config.episodes=x', '--workdir=w'], 'episodes'),
  (['--config=configs/nothing.py', '--workdir=w'], 'configs/nothing.py'),
  (['--config=configs/rollout.py'], '--workdir is needed'),
])
def test_flag_errors_are_a_sentence_and_exit_code_2(flags, words, tmp_path):
  run = subprocess.run(
    [sys.executable, 'rollout.py', *flags], cwd=_ROOT, capture_output=True, text=True)
  assert words in run.stderr + run.stdout
  assert 'Traceback' not in run.stderr
  assert run.returncode in (1, 2)
