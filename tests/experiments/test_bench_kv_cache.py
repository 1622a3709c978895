"""What a narrower cache costs: the measurement on a few tokens and games."""

import pytest

from experiments.bench import kv_cache


@pytest.fixture(scope='module')
def record(smollm2_path, tmp_path_factory):
  return {
    'logits': kv_cache.measure_logits('smollm2_135m', 1),
    'games': kv_cache.measure_games(4, tmp_path_factory.mktemp('games')),
    'measured': {'command': 'c', 'machine': 'm', 'date': 'd'}}


def test_fewer_bits_err_more_and_take_less(record):
  exact, half, byte = record['logits']['rows']
  assert (exact['logits'], exact['kl'], exact['top1']) == (0.0, 0.0, 1.0)
  assert 0 < half['logits'] < byte['logits'] < 0.1
  assert abs(byte['kl']) < 0.01 and byte['top1'] > 0.95
  # A number in a byte, and a scale in two for each head.
  assert half['token_bytes'] * 2 == exact['token_bytes']
  assert byte['token_bytes'] / exact['token_bytes'] == pytest.approx((64 + 2) / (4 * 64))


def test_the_same_games_are_played_with_each_cache(record):
  rows = record['games']['rows']
  assert [row['dtype'] for row in rows] == list(kv_cache.DTYPES)
  assert all(row['n'] == 4 for row in rows)
  assert rows[0]['same_tokens'] == 1.0 and rows[0]['difference'] == 0.0
  for row in rows:
    assert row['difference'] == pytest.approx(row['success_rate'] - rows[0]['success_rate'])


def test_the_section_has_a_line_for_each_cache(record):
  text = kv_cache.section(record)
  assert all(text.count(f'| {dtype} |') == 2 for dtype in kv_cache.DTYPES)
