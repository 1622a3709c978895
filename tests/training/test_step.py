"""The train step on a tiny model: packing changes nothing, one trace, one result on any mesh."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention as attention_lib
from models import decoder, flash, registry, sharding, splash
from models.lora import LoraConfig
from training import optimizer as optimizer_lib
from training import packing
from training import step as step_lib

CONFIG = registry.shrink(registry.get_config('qwen25_7b'), vocab_size=96, num_layers=2)


def make_examples(lengths=(13, 7, 20, 5, 9, 11, 16, 3)):
  rng = np.random.default_rng(0)
  return [
    packing.Example(rng.integers(0, 96, n).astype(np.int32), rng.random(n) < 0.6, str(i))
    for i, n in enumerate(lengths)
  ]


@pytest.fixture(scope='module')
def model():
  model = decoder.create(CONFIG, LoraConfig(4, 8), seed=0)
  # B = 0 would leave A without a gradient.
  shake = lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape)
  return dataclasses.replace(model, lora=jax.tree.map(shake, model.lora))


def make_step(model, mesh, num_steps=6, **options):
  schedule = optimizer_lib.make_schedule('linear', 1e-2, num_steps, 0.1)
  optimizer = optimizer_lib.make_optimizer(schedule, weight_decay=0.01, clip_norm=1.0)
  # The step donates its state; the fixture's arrays must live on.
  model = dataclasses.replace(model, lora=jax.tree.map(jnp.copy, model.lora))
  placed = lambda state: jax.device_put(state, sharding.state_shardings(state, mesh))
  model = dataclasses.replace(model, lora=placed(model.lora), frozen=placed(model.frozen))
  state, shardings = step_lib.init_state(model, optimizer, mesh)
  train_step = step_lib.make_train_step(
    model, optimizer, schedule, shardings, mesh, seed=3, **options
  )
  return state, train_step, model.frozen


def put(batch, mesh):
  return jax.device_put(batch, step_lib.batch_shardings(mesh))


def gradient(model, rows):
  batches = packing.Batches(rows, batch_rows=rows.num_rows)
  micro = jax.tree.map(lambda x: x[0], batches[0])
  loss = lambda lora: step_lib.batch_loss(model.graphdef, lora, model.frozen, micro)[0]
  value, grads = jax.jit(jax.value_and_grad(loss))(model.lora)
  return float(value), decoder.to_params(grads)


def take_path(path, monkeypatch):
  """The forward pass attends as on a TPU or GPU (interpreted), or in several blocks a row."""
  if path == 'blocks':
    monkeypatch.setattr(attention_lib, 'MIN_BLOCK', 8)
    return

  kernel = {'splash': splash.splash_attention, 'flash': flash.flash_attention}[path]

  def by_kernel(q, k, v, *, segment_ids, window, is_local, path):
    assert is_local is None and path == 'auto'
    return kernel(
      q * q.shape[-1]**-0.5, k, v, segment_ids, window=window, interpret=True)

  monkeypatch.setattr(decoder, 'attention', by_kernel)


def packed_and_unpacked():
  """The same examples, several in a row and one in a row."""
  examples = make_examples()
  packed = packing.pack(examples, 28)
  alone = [packing.pack([e], 28) for e in examples]
  fields = ('tokens', 'segment_ids', 'positions', 'loss_mask')
  arrays = [np.concatenate([getattr(rows, name) for rows in alone]) for name in fields]
  unpacked = packing.Rows(*arrays, len(examples), ())
  assert packed.segment_ids.max() >= 2 and unpacked.segment_ids.max() == 1
  return packed, unpacked


PATHS = ['blocks', *(pytest.param(name, marks=pytest.mark.slow) for name in ('splash', 'flash'))]


@pytest.mark.parametrize('path', PATHS)
def test_packed_equals_unpacked(model, monkeypatch, path):
  take_path(path, monkeypatch)
  (loss, grads), (want_loss, want_grads) = (
    gradient(model, rows) for rows in packed_and_unpacked())
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  for name, grad in grads.items():
    want = np.asarray(want_grads[name])
    np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize('path', PATHS)
def test_a_leak_between_examples_would_be_seen(model, monkeypatch, path):
  take_path(path, monkeypatch)
  attend = decoder.attention

  def leaky(*qkv, segment_ids, **options):
    # The second and later examples of a row see what came before them there.
    return attend(*qkv, segment_ids=jnp.minimum(segment_ids, 1), **options)

  monkeypatch.setattr(decoder, 'attention', leaky)
  packed, unpacked = (
    step_lib.batch_loss(
      model.graphdef, model.lora, model.frozen,
      jax.tree.map(lambda x: x[0], packing.Batches(rows, batch_rows=rows.num_rows)[0]))[0]
    for rows in packed_and_unpacked())
  assert abs(packed - unpacked) > 1e-3 * unpacked  # a hundred times what the test above allows


def test_loss_equals_dense_logits(model):
  rows = packing.pack(make_examples(), 28)
  hidden = decoder.forward(
    model.graphdef, model.lora, model.frozen, rows.tokens, rows.positions,
    segment_ids=rows.segment_ids,
  )
  logprobs = jax.nn.log_softmax(decoder.logits(model.graphdef, model.frozen, hidden))
  picked = jnp.take_along_axis(logprobs[:, :-1], rows.tokens[:, 1:, None], -1)[..., 0]
  want = -(picked * rows.loss_mask[:, 1:]).sum()
  np.testing.assert_allclose(gradient(model, rows)[0], want, rtol=1e-5)


def test_one_trace_over_several_steps_and_the_loss_falls(model):
  mesh = sharding.make_mesh(2, 2, 2)
  rows = packing.pack(make_examples(), 20)
  batches = packing.Batches(rows, batch_rows=4, grad_accum=2, epochs=5, num_shards=4)
  state, train_step, frozen = make_step(model, mesh, batches.num_steps)
  losses = []
  for step in range(5):
    state, metrics = train_step(state, frozen, put(batches[step], mesh))
    losses.append(float(metrics['loss']))
  assert train_step._cache_size() == 1
  assert int(state.step) == 5 and losses[-1] < losses[0] - 0.2


def one_step(model, sizes, *, batch_rows=4, grad_accum=1, **options):
  """Metrics and adapter after one step on a mesh of (slices, data, fsdp, tensor)."""
  mesh = sharding.make_mesh(*sizes[1:], slice=sizes[0])
  batches = packing.Batches(
    packing.pack(make_examples(), 20), batch_rows=batch_rows, grad_accum=grad_accum,
    num_shards=sharding.batch_shards(mesh))
  state, train_step, frozen = make_step(model, mesh, label_smoothing=0.1, **options)
  with jax.set_mesh(mesh):
    state, metrics = train_step(state, frozen, put(batches[0], mesh))
  values = [float(metrics[k]) for k in ('loss', 'accuracy', 'grad_norm', 'loss_tokens')]
  return values, decoder.to_params(jax.device_get(state.lora))


def assert_equal_steps(got, want):
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for name, value in want[1].items():
    # Adam divides by the gradient's size, so an element that is nearly zero may differ most.
    np.testing.assert_allclose(got[1][name], value, atol=1e-4, err_msg=name)


def test_accumulation_and_mesh_change_nothing(model):
  want = one_step(model, (1, 1, 1, 1))
  assert_equal_steps(one_step(model, (1, 1, 1, 1), batch_rows=2, grad_accum=2), want)
  assert_equal_steps(one_step(model, (2, 1, 2, 2)), want)


# All that eight devices can fill; of all four axes at once there would be sixteen.
MIXES = [sizes for sizes in itertools.product((1, 2), (1, 2), (1, 2, 4), (1, 2))
         if 1 < math.prod(sizes) <= 8]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', MIXES, ids=str)
def test_every_mix_of_axes_changes_nothing(model, sizes):
  remat = decoder.REMAT[MIXES.index(sizes) % 3]
  rows = max(4, math.prod(sizes[:3]))
  want = one_step(model, (1, 1, 1, 1), batch_rows=rows)
  assert_equal_steps(one_step(model, sizes, batch_rows=rows, remat=remat), want)


def test_weights_as_they_are_read_give_the_same_loss():
  """On CPU bfloat16 is read as bits; what is not bfloat16 stays the array that it is."""
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  model = decoder.create(config, LoraConfig(4, 8))
  frozen = step_lib.as_read(model.frozen)
  pairs = list(zip(*map(jax.tree.leaves, (model.frozen, frozen)), strict=True))
  for given, read in pairs:
    assert read.dtype == (jnp.uint16 if given.dtype == jnp.bfloat16 else given.dtype)
    assert given is read or given.dtype == jnp.bfloat16
  assert len({given is read for given, read in pairs}) == 2
  rows = packing.pack(make_examples(), 32)
  batch = {k: jnp.asarray(v[0]) for k, v in packing.Batches(rows, batch_rows=2)[0].items()}
  loss = lambda frozen: step_lib.batch_loss(
    model.graphdef, model.lora, frozen, batch, label_smoothing=0.1)[0]
  assert float(loss(frozen)) == pytest.approx(float(loss(model.frozen)), rel=1e-6)


def test_dropout_depends_on_seed_and_step(model):
  model = dataclasses.replace(model, lora_config=LoraConfig(4, 8, dropout=0.5))
  dropped = decoder.create(CONFIG, model.lora_config)
  model = dataclasses.replace(model, graphdef=dropped.graphdef)
  mesh = sharding.make_mesh(1, 1, 1)
  batch = put(packing.Batches(packing.pack(make_examples(), 20), batch_rows=4)[0], mesh)
  state, train_step, frozen = make_step(model, mesh)
  losses = []
  for step in (0, 0, 1):
    start = jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(step))
    losses.append(float(train_step(start, frozen, batch)[1]['loss']))
  assert losses[0] == losses[1] != losses[2]
