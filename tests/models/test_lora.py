import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.errors import UserError
from models import decoder, layers, lora, registry, sharding
from models.lora import LoraConfig
from tests.models.test_decoder import adapted_model, forward, positions, run, tiny, with_random_b


def test_init_is_pefts_and_has_no_effect():
  config = tiny()
  model = decoder.create(config, LoraConfig(rank=8, alpha=16), seed=3)
  params = decoder.to_params(model.lora)
  assert len(params) == 14
  for name, value in params.items():
    assert value.dtype == jnp.float32
    if name.endswith('lora_b'):
      assert not value.any()
    else:
      bound = 1 / math.sqrt(value.shape[1])
      assert 0.9 * bound < float(jnp.abs(value).max()) <= bound
      assert abs(float(value.std()) * math.sqrt(3) / bound - 1) < 0.1
      assert not np.allclose(value[0], value[1])  # Each layer has its own draw.
  tokens = np.arange(12)[None]
  plain = decoder.from_params(config, decoder.to_params(model.frozen))
  np.testing.assert_array_equal(run(model, tokens), run(plain, tokens))


def test_adapter_drawn_for_given_weights_depends_on_the_seed_only():
  config, shape = tiny(), LoraConfig(rank=2, alpha=4, targets=('v', 'q'))
  params = decoder.to_params(decoder.create(config).frozen)
  draw = lambda seed: decoder.to_params(
    decoder.from_params(config, params, shape, seed=seed).lora
  )
  assert set(draw(0)) == {f'blocks.attn.{t}.lora_{x}' for t in 'qv' for x in 'ab'}
  name = 'blocks.attn.q.lora_a'
  np.testing.assert_array_equal(draw(0)[name], draw(0)[name])
  assert not np.allclose(draw(0)[name], draw(1)[name])
  with pytest.raises(UserError, match='lora_b'):
    decoder.from_params(config, params | {name: draw(0)[name]}, shape)


def test_equals_peft():
  pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  import torch

  from tests.models import torch_reference

  config = torch_reference.CONFIGS['qwen2_untied']
  reference = torch_reference.build(config)
  params = torch_reference.params(config, reference)
  shape = LoraConfig(rank=4, alpha=12, targets=('q', 'o', 'down'))
  adapter = with_random_b(decoder.to_params(decoder.create(config, shape).lora))
  model = decoder.from_params(config, params | adapter, shape)
  modules = [f'{t}_proj' for t in shape.targets]
  theirs = peft.get_peft_model(
    reference, peft.LoraConfig(r=4, lora_alpha=12, target_modules=modules)
  ).eval()
  state = {}
  for name, value in adapter.items():
    _, part, target, kind = name.split('.')
    part = {'attn': 'self_attn', 'mlp': 'mlp'}[part]
    for layer in range(config.num_layers):
      key = f'base_model.model.model.layers.{layer}.{part}.{target}_proj.lora_{kind[-1].upper()}'
      state[f'{key}.default.weight'] = torch.from_numpy(value[layer].T.copy())
  _, unexpected = theirs.load_state_dict(state, strict=False)
  assert not unexpected
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 30)).astype(np.int32)
  np.testing.assert_allclose(
    run(model, tokens), torch_reference.logits(theirs, tokens), atol=1e-4, rtol=0
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_merging_folds_the_adapter(dtype):
  model = adapted_model(tiny(dtype=dtype))
  merged = decoder.merge_lora(model)
  assert merged.lora_config is None and not jax.tree.leaves(merged.lora)
  tokens = np.arange(30)[None]
  difference = np.abs(run(model, tokens) - run(merged, tokens)).max()
  assert difference < (1e-4 if dtype == 'float32' else 0.1)
  assert not np.allclose(
    run(model, tokens), run(decoder.create(model.config), tokens), atol=1e-2
  )
  assert decoder.merge_lora(merged) is merged


def test_dropout_acts_on_the_adapters_input_only():
  shape = LoraConfig(rank=4, alpha=8, dropout=0.5)
  tokens = jnp.arange(40)[None]
  call = lambda m, **kw: forward(m.graphdef, m.lora, m.frozen, tokens, positions(tokens), **kw)
  idle = decoder.create(tiny(), shape)
  key = jax.random.key(0)
  np.testing.assert_array_equal(call(idle), call(idle, dropout_rng=key))
  model = adapted_model(tiny(), shape)
  assert not np.allclose(call(model), call(model, dropout_rng=key), atol=1e-3)
  np.testing.assert_array_equal(call(model, dropout_rng=key), call(model, dropout_rng=key))
  other = call(model, dropout_rng=jax.random.key(1))
  assert not np.allclose(other, call(model, dropout_rng=key), atol=1e-3)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_projections_of_one_input_equal_each_alone(dtype):
  config, shape = tiny(dtype=dtype), LoraConfig(rank=3, alpha=6)
  with nnx.use_eager_sharding(False):
    rngs = nnx.Rngs(params=jax.random.key(0))
    linears = nnx.List([
      layers.Linear(24, width, ('embed', 'mlp'), config=config, rngs=rngs,
                    lora=shape if adapted else None)
      for width, adapted in ((32, True), (8, False), (2, True))])
    graphdef, trained, frozen = nnx.split(linears, nnx.LoRAParam, ...)
  trained = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), trained)
  x = jax.random.normal(jax.random.key(1), (5, 24))
  targets = [jax.random.normal(jax.random.key(n), (5, n)) for n in (32, 8, 2)]

  def ours(trained, x):
    found = layers.project(nnx.merge(graphdef, trained, frozen), x)
    return sum(jnp.sum(y * t) for y, t in zip(found, targets, strict=True))

  def alone(trained, x):
    total = 0.0
    for linear, target in zip(nnx.merge(graphdef, trained, frozen), targets, strict=True):
      kernel = linear.kernel.get_value().astype(jnp.float32)
      if linear.lora is not None:
        kernel += 2 * linear.lora_a.get_value() @ linear.lora_b.get_value()
      total += jnp.sum(x @ kernel * target)
    return total

  grads = jax.grad(ours, (0, 1))(trained, x), jax.grad(alone, (0, 1))(trained, x)
  for got, want in zip(*map(jax.tree.leaves, grads), strict=True):
    np.testing.assert_allclose(
      got, want, rtol=0, atol=(1e-5 if dtype == 'float32' else 0.02) * float(jnp.abs(want).max()))
  # Two of three have an adapter: three kernels, one first factor, two second ones.
  assert str(jax.make_jaxpr(ours)(trained, x)).count('dot_general') == 6


@pytest.mark.parametrize('widths', [(40, 8, 8), (40,)])
@pytest.mark.parametrize('dropped', [False, True])
def test_joined_products_equal_separate_ones(widths, dropped, monkeypatch):
  """Many rows on a CPU: a kernel and its adapter's second factor are one product."""
  config, shape = tiny(dtype='bfloat16'), LoraConfig(rank=3, alpha=6)
  with nnx.use_eager_sharding(False):
    rngs = nnx.Rngs(params=jax.random.key(0))
    linears = nnx.List([
      layers.Linear(24, width, ('embed', 'mlp'), config=config, rngs=rngs, lora=shape, bias=True)
      for width in widths])
    graphdef, trained, frozen = nnx.split(linears, nnx.LoRAParam, ...)
  trained = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), trained)
  x, other = jax.random.normal(jax.random.key(1), (2, 2, 300, 24))
  targets = [jax.random.normal(jax.random.key(n), (2, 300, n)) for n in widths]

  def loss(trained, x, other):
    found = layers.project(nnx.merge(graphdef, trained, frozen), x, other if dropped else None)
    return sum(jnp.sum(y * t) for y, t in zip(found, targets, strict=True))

  def found():
    gradient = lambda *a: jax.value_and_grad(loss, (0, 1, 2))(*a)  # A new one: nothing is cached.
    count = str(jax.make_jaxpr(gradient)(trained, x, other)).count('dot_general')
    return count, jax.tree.leaves(jax.jit(gradient)(trained, x, other))

  count, joined = found()
  monkeypatch.setattr(layers, '_JOINED_ROWS', 10**9)
  more, separate = found()
  assert count < more
  for got, want in zip(joined, separate, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=0.01 * float(jnp.abs(want).max()))


def test_an_adapter_is_gathered_before_the_layers():
  model = decoder.create(tiny(), LoraConfig(rank=4, alpha=8))
  mesh = sharding.make_mesh(1, 4, 2)
  placed = jax.device_put(model.lora, sharding.state_shardings(model.lora, mesh))
  with jax.set_mesh(mesh):
    gathered = jax.jit(lambda state: sharding.gather(state, 'embed'))(placed)
  for name, value in decoder.to_params(gathered).items():
    np.testing.assert_array_equal(value, decoder.to_params(model.lora)[name])
  axes = {axis for value in jax.tree.leaves(placed) for axis in value.sharding.spec if axis}
  assert axes == {'fsdp', 'tensor'}
  axes = {axis for value in jax.tree.leaves(gathered) for axis in value.sharding.spec if axis}
  assert axes == {'tensor'}


def test_dropout_keeps_the_mean():
  x = jnp.ones((400, 500))
  y = np.asarray(lora.dropout(x, 0.1, jax.random.key(0)))
  assert abs((y == 0).mean() - 0.1) < 0.003
  assert abs(y.mean() - 1) < 0.003
  np.testing.assert_allclose(y[y > 0], 1 / 0.9, rtol=1e-4)


def test_bad_shapes_are_refused():
  for bad in (
    {'rank': 0, 'alpha': 1},
    {'rank': 1, 'alpha': 1, 'dropout': 1.0},
    {'rank': 1, 'alpha': 1, 'targets': ('q_proj',)},
    {'rank': 1, 'alpha': 1, 'targets': ()},
  ):
    with pytest.raises(UserError):
      LoraConfig(**bad)
  assert LoraConfig(1, 1, targets=('v', 'q')) == LoraConfig(1, 1, targets=('q', 'v'))
  assert registry.get_config('smollm2_135m').tie_embeddings
