"""What a run multiplies in where its config leaves that to the machine."""

import json

import pytest

from training import speed


@pytest.fixture
def rates(monkeypatch):
  found = {'bfloat16': 1e11, 'float32': 2e11}
  monkeypatch.setattr(speed, 'product_rate', found.__getitem__)
  return found


def test_the_faster_one_is_taken(rates, tmp_path):
  assert speed.settle_dtype('auto', tmp_path) == 'float32'
  rates['bfloat16'] = 4e11
  assert speed.settle_dtype('auto', tmp_path) == 'bfloat16'


@pytest.mark.parametrize('own_kernels, taken', [(True, 'bfloat16'), (False, 'float32')])
def test_where_the_kernels_of_our_own_multiply_it_is_bfloat16(rates, own_kernels, taken):
  assert speed.settle_dtype('auto', own_kernels=lambda: own_kernels) == taken


def test_what_is_named_is_taken(rates, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'dtype': 'float32'}))
  assert speed.settle_dtype('bfloat16', tmp_path) == 'bfloat16'


def test_a_run_keeps_what_it_began_with(rates, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'dtype': 'bfloat16'}))
  assert speed.settle_dtype('auto', tmp_path) == 'bfloat16'


@pytest.mark.parametrize('text', ['{', '[]', '{}', '{"dtype": "auto"}'])
def test_a_broken_config_settles_nothing(rates, tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  assert speed.settle_dtype('auto', tmp_path) == 'float32'
