"""The check of the cost model: what it predicts, and a measured step of a tiny model."""

import pytest

from experiments.bench import cost_model
from models import cost, decoder, registry
from models.lora import LoraConfig

TINY = registry.shrink(registry.get_config('smollm2_135m', dtype='bfloat16'))
SIZES = {'slice': 1, 'data': 1, 'fsdp': 1, 'tensor': 1}


def test_a_prediction_is_that_of_the_rates():
  lora = LoraConfig(16, 32.0)
  model = decoder.abstract(TINY, lora)
  got = cost_model.predict(model, SIZES, 2, 64, 32, 'none', 1e9, 1e6)
  assert got['compute'] == cost.train_flops(TINY, lora, 128, 32, 32.5) / 1e9
  assert got['memory'] == cost.train_traffic(model, SIZES, 128, 32, 'none') / 1e6
  assert got['overlapped'] == max(got['compute'], got['memory'])
  assert got['serial'] == got['compute'] + got['memory']
  # Twice the rows are twice the products; the weights are read once all the same.
  twice = cost_model.predict(model, SIZES, 4, 64, 64, 'none', 1e9, 1e6)
  assert twice['flops'] == 2 * got['flops'] and twice['memory'] < 2 * got['memory']
  again = cost_model.predict(model, SIZES, 2, 64, 32, 'full', 1e9, 1e6)
  assert again['flops'] > got['flops'] and again['memory'] > got['memory']


@pytest.mark.slow
def test_a_step_is_measured_beside_the_machine_s_rates():
  record = cost_model.measure(TINY, rows=2, row_len=64, steps=2, remat='mlp')
  assert record['measured_s'] > 0 and record['flops_per_cpu_s'] > 1e8
  assert record['ratio']['serial'] == record['predicted_s']['serial'] / record['measured_s']
  record['measured'] = {'machine': 'm', 'date': 'd', 'command': 'c'}
  assert '| measured, median of 2' in cost_model.section(record)
