"""One timed run of our train step, for experiments/bench/train.py."""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np

from models import cost, decoder, registry, sharding, weights
from models.lora import LoraConfig
from training import attention_path as attention_path_lib
from training import metrics, packing, speed
from training import optimizer as optimizer_lib
from training import step as step_lib


def _model(job: dict, mesh) -> decoder.Model:
  lora = LoraConfig(job['rank'], job['alpha'])
  if not job['folder']:
    return decoder.create(registry.get_config(job['model'], dtype=job['dtype']), lora, mesh=mesh)
  config, params = weights.load_pretrained(job['folder'], job['dtype'])
  # The file says in what the weights are kept, the job in what they are multiplied.
  config = dataclasses.replace(config, dtype=job['dtype'])
  _, adapter = weights.load_peft(job['adapter'], config)
  return decoder.from_params(config, {**params, **adapter}, lora, mesh=mesh)


def run(job: dict) -> dict:
  """Trains `warm_steps` and then `steps` timed steps; the record that bench/train.py sums up."""
  data = np.load(job['data'])
  rows = packing.Rows(
    *(data[f'packed.{key}'] for key in ('tokens', 'segment_ids', 'positions', 'loss_mask')),
    num_examples=0, too_long=())
  num_steps = job['warm_steps'] + job['steps']
  mesh = sharding.make_mesh()  # One device, as the peer has.
  batches = packing.Batches(
    rows, batch_rows=job['batch_rows'], epochs=1 + num_steps * job['batch_rows'] / rows.num_rows)
  model = _model(job, mesh)
  schedule = optimizer_lib.make_schedule('constant', job['learning_rate'], num_steps, 0.0)
  optimizer = optimizer_lib.make_optimizer(schedule, weight_decay=0.0, clip_norm=1.0)
  attention_path = attention_path_lib.choose(job['attention'], model.config)
  state, shardings = step_lib.init_state(model, optimizer, mesh)
  train_step = step_lib.make_train_step(
    model, optimizer, schedule, shardings, mesh, seed=0, remat=job['remat'],
    attention_path=attention_path)
  place, frozen = step_lib.batch_shardings(mesh), step_lib.as_read(model.frozen)
  seconds, tokens, losses = [], [], []
  with jax.set_mesh(mesh):
    for step in range(num_steps):
      batch = batches[step]
      started = time.perf_counter()
      state, values = train_step(state, frozen, jax.device_put(batch, place))
      losses.append(float(values['loss']))  # Waits: a step's time is its own.
      seconds.append(time.perf_counter() - started)
      tokens.append(int((batch['segment_ids'] > 0).sum()))
  flops = cost.train_flops(
    model.config, model.lora_config, rows.num_tokens, rows.num_loss_tokens, rows.context)
  warm = job['warm_steps']
  return {
    'seconds': seconds[warm:], 'tokens': tokens[warm:], 'losses': losses,
    'first_step_s': seconds[0], 'peak_bytes': metrics.memory_bytes(),
    'flops_per_token': flops / rows.num_tokens, 'efficiency': rows.efficiency,
    'attention': attention_path,
    # The machine's best, whatever this run multiplies in: float32 where a CPU has no bfloat16.
    'product_rates': {dtype: speed.product_rate(dtype) for dtype in ('bfloat16', 'float32')},
    'device_name': jax.devices()[0].device_kind}


def run_file(job: str, out: str) -> None:
  """Runs the job of one JSON file and writes the record to another."""
  pathlib.Path(out).write_text(json.dumps(run(json.loads(pathlib.Path(job).read_text()))))
