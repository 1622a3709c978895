"""The cost model against a train step of this machine, measured in the same run.

  python -m experiments.bench.cost_model      # writes experiments/results/cost_model.json

A LoRA step of SmolLM2-135M with random weights. The machine's rates (a large product, a large copy)
and the step take turns, and everything is in seconds of CPU time: what other programs take counts
on neither side.
"""

import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import cli
from data import summary
from data import workdir as workdir_lib
from models import chips, cost, decoder, registry, sharding
from models.lora import LoraConfig
from training import optimizer as optimizer_lib
from training import packing, speed
from training import remat as remat_lib
from training import step as step_lib

PATH = pathlib.Path(__file__).parents[1] / 'results' / 'cost_model.json'
_PRODUCT, _COPY = 1024, 2**26  # Rows of the square factors; elements of the copy.


def cpu_seconds(work: Callable[[], Any]) -> float:
  """CPU seconds of a piece of work until its arrays are there."""
  start = time.process_time()
  jax.block_until_ready(work())
  return time.process_time() - start


def predict(
  model: decoder.Model, sizes: dict[str, int], rows: int, row_len: int, losses: int, remat: str,
  flops_per_s: float, bytes_per_s: float,
) -> dict[str, float]:
  """Seconds of a step on one device of these rates: by resource, and what follows."""
  config, lora, places = model.config, model.lora_config, rows * row_len
  context = (row_len + 1) / 2
  flops = cost.train_flops(config, lora, places, losses, context)
  again = cost.recomputed_flops(config, lora, places, context, remat)
  moved = cost.train_traffic(model, sizes, places, losses, remat)
  chip = chips.Chip('this', platform.machine(), 0, 0, bytes_per_s, flops_per_s)
  times = cost.roofline(chip, flops + again, moved)
  return {
    'flops': flops + again, 'traffic_bytes': moved, 'compute': times.compute, 'memory': times.hbm,
    'overlapped': times.overlapped, 'serial': times.serial,
    'by_efficiency': (flops + again) / (flops_per_s * speed.STEP_EFFICIENCY)}


def measure(config, *, rows: int, row_len: int, steps: int, remat: str, seed: int = 0) -> dict:
  """Times steps on one device, and the machine's rates in turns with them."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = decoder.create(config, LoraConfig(16, 32.0), seed=seed, mesh=mesh)
  schedule = optimizer_lib.make_schedule('constant', 1e-4, steps + 1, 0.1)
  optimizer = optimizer_lib.make_optimizer(schedule, weight_decay=0.01, clip_norm=1.0)
  state, shardings = step_lib.init_state(model, optimizer, mesh)
  step = step_lib.make_train_step(
    model, optimizer, schedule, shardings, mesh, seed=seed, remat=remat)
  rng = np.random.default_rng(seed)
  examples = [packing.Example(
    rng.integers(0, config.vocab_size, row_len).astype(np.int32),
    np.arange(row_len) % 4 == 3, str(i)) for i in range(rows)]
  packed = packing.Batches(packing.pack(examples, row_len), batch_rows=rows)[0]
  batch = jax.device_put(packed, step_lib.batch_shardings(mesh))
  losses = int(packed['loss_weight'].size)

  factor = jnp.ones((_PRODUCT, _PRODUCT), config.dtype)
  product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
  array = jnp.ones((_COPY,), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  frozen = step_lib.as_read(model.frozen)
  works = {'product': lambda: [product(factor) for _ in range(20)], 'copy': lambda: copy(array)}
  seconds: dict[str, list[float]] = {'product': [], 'copy': [], 'step': []}
  with jax.set_mesh(mesh):
    compiled = step.lower(state, frozen, batch).compile()
    for turn in range(steps + 1):
      own = {name: cpu_seconds(work) for name, work in works.items()}
      start = time.process_time()
      state, values = step(state, frozen, batch)
      float(values['loss'])
      own['step'] = time.process_time() - start
      if turn:  # The first compiles.
        for name, value in own.items():
          seconds[name].append(value)
  middle = {name: float(np.median(values)) for name, values in seconds.items()}
  flops_per_s = 20 * 2 * _PRODUCT**3 / middle['product']
  bytes_per_s = 2 * 4 * _COPY / middle['copy']
  predicted = predict(
    model, dict(mesh.shape), rows, row_len, losses, remat, flops_per_s, bytes_per_s)
  return {
    'model': config.name, 'dtype': config.dtype, 'rows': rows, 'row_len': row_len,
    'loss_tokens': losses, 'remat': remat, 'steps': steps,
    'program_bytes': remat_lib.program_bytes(compiled),
    'flops_per_cpu_s': flops_per_s, 'bytes_per_cpu_s': bytes_per_s,
    'measured_s': middle['step'], 'range_s': [min(seconds['step']), max(seconds['step'])],
    'predicted_s': predicted,
    'ratio': {name: predicted[name] / middle['step']
              for name in ('overlapped', 'serial', 'by_efficiency')}}


def section(record: dict[str, Any]) -> str:
  """The record as Markdown."""
  measured, predicted, ratio = record['measured'], record['predicted_s'], record['ratio']
  low, high = record['range_s']
  return (
    f'A LoRA step of {record["model"]} in {record["dtype"]}, {record["rows"]} rows of '
    f'{record["row_len"]} tokens, '
    f'{record["loss_tokens"]} with a loss, in CPU seconds, beside a product at '
    f'{record["flops_per_cpu_s"] / 1e9:.0f} GFLOP/s and a copy at '
    f'{record["bytes_per_cpu_s"] / 1e9:.1f} GB/s of CPU time in the same run:\n\n'
    '| | seconds | predicted / measured |\n|---|---|---|\n'
    f'| measured, median of {record["steps"]} ({low:.2f} to {high:.2f}) | '
    f'{record["measured_s"]:.2f} | |\n'
    f'| products and memory at the same time | {predicted["overlapped"]:.2f} | '
    f'{ratio["overlapped"]:.2f} |\n'
    f'| one after the other ({predicted["compute"]:.2f} + {predicted["memory"]:.2f}) | '
    f'{predicted["serial"]:.2f} | {ratio["serial"]:.2f} |\n'
    f'| products at {speed.STEP_EFFICIENCY:.0%} of their rate, what `train.py` predicts with | '
    f'{predicted["by_efficiency"]:.2f} | {ratio["by_efficiency"]:.2f} |\n\n'
    + summary.origin(measured))


def main(_) -> None:
  values = flags.FLAGS
  config = registry.get_config(values.model, dtype=speed.settle_dtype('auto'))
  record = measure(
    config, rows=values.rows, row_len=values.row_len, steps=values.steps, remat=values.remat)
  record['measured'] = summary.measured(
    'experiments.bench.cost_model', ('jax', 'jaxlib', 'flax'))
  workdir_lib.write_json(pathlib.Path(values.out), record)
  print(section(record))


if __name__ == '__main__':
  flags.DEFINE_string('model', 'smollm2_135m', 'A name of models/registry.py.')
  flags.DEFINE_integer('rows', 2, 'Rows of a step.', lower_bound=1)
  flags.DEFINE_integer('row_len', 512, 'Tokens of a row.', lower_bound=16)
  flags.DEFINE_integer('steps', 5, 'Timed steps.', lower_bound=1)
  flags.DEFINE_string('remat', 'none', 'What the backward pass computes again.')
  flags.DEFINE_string('out', str(PATH), 'JSON file to write.')
  cli.run(main, required=())
