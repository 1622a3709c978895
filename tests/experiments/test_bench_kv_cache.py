"""What a narrower cache costs: the measurement on a few tokens and games."""

import pytest

from configs import from_scratch as scratch_config
from experiments.bench import kv_cache


def test_fewer_bits_err_more_and_take_less():
  exact, half, byte = kv_cache.measure_logits(scratch_config.PUBLISHED, 1)['rows']
  assert (exact['logits'], exact['kl'], exact['top1']) == (0.0, 0.0, 1.0)
  assert 0 < half['logits'] < byte['logits'] < 0.1
  assert abs(byte['kl']) < 0.01 and byte['top1'] > 0.95
  assert half['token_bytes'] * 2 == exact['token_bytes']
  # A number in a byte, and a scale for each head.
  assert 32 / 128 < byte['token_bytes'] / exact['token_bytes'] < 37 / 128


@pytest.mark.slow
def test_the_same_games_are_played_with_each_cache(tmp_path):
  record = {
    'logits': kv_cache.measure_logits(scratch_config.PUBLISHED, 1),
    'games': kv_cache.measure_games(4, tmp_path),
    'measured': {'command': 'c', 'machine': 'm', 'date': 'd'}}
  rows = record['games']['rows']
  assert [row['dtype'] for row in rows] == list(kv_cache.DTYPES)
  assert all(row['n'] == 4 for row in rows)
  assert rows[0]['same_tokens'] == 1.0 and rows[0]['difference'] == 0.0
  for row in rows:
    assert row['difference'] == pytest.approx(row['success_rate'] - rows[0]['success_rate'])
  text = kv_cache.section(record)
  assert all(text.count(f'| {dtype} |') == 2 for dtype in kv_cache.DTYPES)
