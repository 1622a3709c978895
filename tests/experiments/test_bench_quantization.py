"""The figures of a quantised base on SmolLM2's own weights."""

import pytest

from experiments.bench import quantization


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
