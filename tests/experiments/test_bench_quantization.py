"""The figures of a quantised base on SmolLM2's own weights."""

import pytest

from experiments.bench import quantization


def test_the_section_has_a_row_for_every_variant():
  row = {'frozen_bytes': 2e8, 'kernels': 0.01, 'logits': 0.02, 'kl': 0.003, 'top1': 0.99, 'loss': 2}
  record = {
    'model': 'm', 'tokens': 1234, 'measured': {'machine': 'x', 'date': 'd', 'command': 'c'},
    'rows': [{'dtype': a, 'base_quantization': b, **row} for a, b in quantization.VARIANTS]}
  text = quantization.section(record)
  assert '| bfloat16 | nf4 | 200 | 0.0100 | 0.0200 | 0.00300 | 99.0 | 2.000 |' in text
  assert text.count('\n| ') == len(quantization.VARIANTS) + 1 and '1,234 tokens' in text


@pytest.mark.slow
def test_more_bits_cost_less(smollm2_path):
  del smollm2_path
  record = quantization.measure('smollm2_135m', episodes=2)
  rows = {(r['dtype'], r['base_quantization']): r for r in record['rows']}
  assert rows['float32', 'none']['logits'] == 0 and rows['float32', 'none']['top1'] == 1
  assert rows['bfloat16', 'none']['logits'] < 0.02
  for dtype in ('bfloat16', 'float32'):
    eight, four, normal = (rows[dtype, kind] for kind in ('int8', 'int4', 'nf4'))
    for key in ('kernels', 'logits', 'kl'):
      assert eight[key] < normal[key] < four[key], (dtype, key)
    assert eight['kernels'] < 0.01 and normal['kernels'] < 0.1
    assert normal['frozen_bytes'] < eight['frozen_bytes'] < rows['bfloat16', 'none']['frozen_bytes']
  assert str(record['tokens']) in quantization.table(record)
