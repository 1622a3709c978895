import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.errors import UserError
from models import decoder, incremental, layers, registry, sharding
from models.kv_cache import KVCache
from models.lora import LoraConfig

forward = jax.jit(decoder.forward, static_argnums=0, static_argnames='remat')
forward_cached = jax.jit(incremental.forward_cached, static_argnums=0, static_argnames='attend_len')


def tiny(name='qwen25_7b', **overrides):
  return registry.shrink(registry.get_config(name), **overrides)


def positions(tokens):
  return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def run(model, tokens, **options):
  tokens = jnp.asarray(tokens)
  hidden = forward(
    model.graphdef, model.lora, model.frozen, tokens, positions(tokens), **options
  )
  return np.asarray(decoder.logits(model.graphdef, model.frozen, hidden))


def run_cached(model, tokens, chunk):
  """Logits of whole rows, `chunk` tokens at a time."""
  batch, width = tokens.shape
  cache, outs = KVCache.init(model.config, batch, width), []
  for start in range(0, width, chunk):
    part = jnp.asarray(tokens[:, start : start + chunk])
    lengths = jnp.full((batch,), start, jnp.int32)
    counts = jnp.full((batch,), part.shape[1], jnp.int32)
    hidden, cache = forward_cached(
      model.graphdef, model.lora, model.frozen, part, cache, lengths, counts, attend_len=width
    )
    outs.append(decoder.logits(model.graphdef, model.frozen, hidden))
  return np.concatenate(outs, axis=1)


def with_random_b(params, seed=0):
  """An adapter that does something: B is 0 at init."""
  rng = np.random.default_rng(seed)
  return {
    k: rng.normal(0, 0.1, v.shape).astype(np.float32) if k.endswith('lora_b') else np.asarray(v)
    for k, v in params.items()
  }


def run_packed(model, tokens):
  """Logits of rows [2, T], computed as two segments of one row, padded."""
  width = tokens.shape[1]
  packed = np.concatenate([tokens[0], tokens[1], np.zeros(7, tokens.dtype)])[None]
  segments = np.repeat([1, 2, 0], [width, width, 7])[None]
  places = np.concatenate([np.arange(width), np.arange(width), np.zeros(7, np.int64)])[None]
  hidden = forward(
    model.graphdef, model.lora, model.frozen, *map(jnp.asarray, (packed, places)),
    segment_ids=jnp.asarray(segments))  # fmt: skip
  found = np.asarray(decoder.logits(model.graphdef, model.frozen, hidden))
  return found[0, : 2 * width].reshape(2, width, -1)


def run_steps(model, tokens, start):
  """Logits of the tokens from `start` on, in one decode loop behind a cached prefix."""
  batch, width = tokens.shape
  cache = KVCache.init(model.config, batch, width)
  lengths = jnp.full((batch,), start, jnp.int32)
  _, cache = forward_cached(
    model.graphdef, model.lora, model.frozen, jnp.asarray(tokens[:, :start]), cache, 0 * lengths,
    lengths, attend_len=width)  # fmt: skip
  prefix, tail, outs = cache.prefix(start), cache.tail(width - start), []
  once = jax.jit(incremental.forward_step, static_argnums=0)
  for step in range(width - start):
    new = jnp.asarray(tokens[:, start + step])
    hidden, tail = once(
      model.graphdef, model.lora, model.frozen, new, prefix, tail, lengths, jnp.int32(step))
    outs.append(decoder.logits(model.graphdef, model.frozen, hidden))
  return np.stack(outs, axis=1)


def slow(name):
  return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  'name',
  [
    'llama_untied_scaled_rope', 'qwen3_untied', 'gemma3', 'ministral3', slow('llama_tied'),
    slow('qwen2_tied'), slow('qwen2_untied'), slow('qwen2_yarn'), slow('qwen3_tied'),
    slow('ministral3_windowed'),
  ],
)  # fmt: skip
def test_logits_equal_transformers(name):
  pytest.importorskip('torch')
  from tests.models import torch_reference

  config = torch_reference.CONFIGS[name]
  reference = torch_reference.build(config)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 60)).astype(np.int32)
  params = torch_reference.params(config, reference)
  model = decoder.from_params(config, params)
  want = torch_reference.logits(reference, tokens)
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(run_packed(model, tokens), want, atol=1e-4, rtol=0)
  np.testing.assert_allclose(run_cached(model, tokens, 20), want, atol=1e-4, rtol=0)
  prepared = incremental.prepare_for_decode(model)
  np.testing.assert_allclose(run_steps(prepared, tokens, 40), want[:, 40:], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['qwen2_tied', slow('llama_untied_scaled_rope'), slow('gemma3')])
def test_adapted_logits_equal_transformers(name):
  pytest.importorskip('torch')
  from tests.models import torch_reference

  config = torch_reference.CONFIGS[name]
  reference = torch_reference.build(config)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 60)).astype(np.int32)
  params = torch_reference.params(config, reference)
  plain = torch_reference.logits(reference, tokens)
  model = decoder.from_params(config, params)
  np.testing.assert_allclose(run(model, tokens), plain, atol=1e-4, rtol=0)

  lora = LoraConfig(rank=4, alpha=8)
  adapter = with_random_b(decoder.to_params(decoder.create(config, lora).lora))
  adapted = decoder.from_params(config, params | adapter, lora)
  state = reference.state_dict()
  for flat, (pattern, _) in torch_reference.names(config).items():
    if (base := flat.removesuffix('.kernel')) + '.lora_a' in adapter:
      for layer in range(config.num_layers):
        a, b = (adapter[f'{base}.lora_{x}'][layer] for x in 'ab')
        weight = state[pattern.format(layer)]
        weight += weight.new_tensor((a @ b * lora.scale).T)
  want = torch_reference.logits(reference, tokens)
  assert np.abs(want - plain).max() > 0.1
  np.testing.assert_allclose(run(adapted, tokens), want, atol=1e-4, rtol=0)
  np.testing.assert_allclose(run_cached(adapted, tokens, 20), want, atol=1e-4, rtol=0)
  merged = decoder.merge_lora(adapted)
  np.testing.assert_allclose(run(merged, tokens), want, atol=1e-4, rtol=0)


def test_packed_rows_equal_separate_rows():
  model = decoder.create(tiny())
  rng = np.random.default_rng(0)
  parts = [rng.integers(0, 256, (1, n)) for n in (150, 1, 90)]
  packed = np.concatenate([*parts, np.zeros((1, 15), np.int64)], axis=1)
  segments = np.repeat([1, 2, 3, 0], [150, 1, 90, 15])[None]
  places = np.concatenate([np.arange(p.shape[1]) for p in parts] + [np.zeros(15, np.int64)])[None]
  hidden = forward(
    model.graphdef,
    model.lora,
    model.frozen,
    *map(jnp.asarray, (packed, places)),
    segment_ids=jnp.asarray(segments),
  )
  got = np.asarray(decoder.logits(model.graphdef, model.frozen, hidden))
  assert np.isfinite(got).all()
  want = np.concatenate([run(model, part) for part in parts], axis=1)
  np.testing.assert_allclose(got[:, :241], want, atol=1e-4, rtol=0)


def test_windowed_layers_see_their_window_only():
  # One windowed layer and one global layer: the first layer's output at a place depends on the
  # newest tokens only, the second's on all.
  config = tiny('gemma3_4b', num_layers=2, sliding_window=5)
  assert config.windows == (5, 0)
  tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
  other = np.concatenate([(tokens[:, :20] + 1) % 256, tokens[:, 20:]], axis=1)
  for num_layers, reach in ((1, 24), (2, 40)):
    model = decoder.create(dataclasses.replace(config, num_layers=num_layers))
    same = np.isclose(run(model, tokens), run(model, other), atol=1e-6).all(axis=(0, 2))
    assert not same[:24].any()
    assert same[24:].all() == (reach == 24)


def loss_and_gradient(model, tokens, **options):
  def loss(lora):
    hidden = decoder.forward(
      model.graphdef, lora, model.frozen, tokens, positions(tokens), **options
    )
    return jnp.mean(jnp.square(decoder.logits(model.graphdef, model.frozen, hidden)))

  value, gradient = jax.jit(jax.value_and_grad(loss))(model.lora)
  return value, decoder.to_params(gradient)


def adapted_model(config, lora=None):
  lora = lora or LoraConfig(rank=4, alpha=8)
  model = decoder.create(config, lora)
  params = decoder.to_params(model.frozen) | with_random_b(decoder.to_params(model.lora))
  return decoder.from_params(config, params, lora)


@pytest.mark.parametrize('dropout', [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_remat_changes_nothing(dropout):
  model = adapted_model(tiny(), LoraConfig(rank=4, alpha=8, dropout=dropout))
  tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 256)
  options = {'dropout_rng': jax.random.key(1)} if dropout else {}
  value, gradient = loss_and_gradient(model, tokens, **options)
  for remat in ('mlp', 'full'):
    again, regradient = loss_and_gradient(model, tokens, remat=remat, **options)
    assert np.isclose(value, again)
    for name in gradient:
      np.testing.assert_allclose(gradient[name], regradient[name], atol=1e-5)
  with pytest.raises(UserError, match='remat'):
    loss_and_gradient(model, tokens, remat='some')


def test_remat_keeps_less_for_the_backward_pass():
  config = tiny(mlp_dim=512)
  model = decoder.create(config, LoraConfig(rank=4, alpha=8))
  tokens = jnp.zeros((2, 24), jnp.int32)

  def kept(remat):
    # The arrays that the forward pass hands to the backward pass.
    loss = lambda lora: decoder.forward(
      model.graphdef, lora, model.frozen, tokens, positions(tokens), remat=remat).sum()
    shapes = jax.eval_shape(lambda lora: jax.vjp(loss, lora)[1], model.lora)
    return [leaf.shape for leaf in jax.tree.leaves(shapes)]

  size = {remat: sum(map(math.prod, kept(remat))) for remat in decoder.REMAT}
  assert size['none'] > size['mlp'] > size['full']
  inner = (config.num_layers, *tokens.shape, config.mlp_dim)
  assert inner in kept('none') and inner not in kept('mlp')


def test_bfloat16_is_close_to_float32_forward_and_backward():
  config = tiny()
  model = adapted_model(config)
  params = decoder.to_params(model.frozen) | decoder.to_params(model.lora)
  fast = decoder.from_params(
    dataclasses.replace(config, dtype='bfloat16'), params, model.lora_config
  )
  kinds = {k: v.dtype for k, v in decoder.to_params(fast.frozen).items()}
  assert kinds['blocks.attn.q.kernel'] == kinds['embed.embedding'] == jnp.bfloat16
  assert kinds['blocks.attn.q.bias'] == kinds['final_norm.scale'] == jnp.float32
  tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 256)
  value, gradient = loss_and_gradient(model, tokens)
  fast_value, fast_gradient = loss_and_gradient(fast, tokens)
  assert abs(fast_value / value - 1) < 0.02
  for name, want in gradient.items():
    got = fast_gradient[name]
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 0.05, (name, error)
  one = np.asarray(tokens[:1, :1])
  np.testing.assert_allclose(run(fast, one), run(model, one), atol=0.1)


def products(jaxpr):
  """All `dot_general` equations, also in scans and closed calls."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield equation
    for value in equation.params.values():
      for sub in value if isinstance(value, (tuple, list)) else [value]:
        sub = getattr(sub, 'jaxpr', sub)
        if hasattr(sub, 'eqns'):
          yield from products(sub)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_gradient_of_a_frozen_kernel_and_fast_operands(dtype):
  config = tiny(dtype=dtype)
  model = decoder.create(config, LoraConfig(rank=3, alpha=6))
  tokens = jnp.zeros((2, 24), jnp.int32)

  def loss(lora):
    hidden = decoder.forward(model.graphdef, lora, model.frozen, tokens, positions(tokens))
    return jnp.sum(hidden)

  found = list(products(jax.make_jaxpr(jax.grad(loss))(model.lora).jaxpr))
  shapes = {equation.outvars[0].aval.shape for equation in found}
  kernels = {v.shape[1:] for k, v in decoder.to_params(model.frozen).items() if 'kernel' in k}
  kernels |= {shape[::-1] for shape in kernels}
  assert not shapes & kernels
  assert {(64, 3), (3, 64), (64, 24)} & shapes  # The adapter's gradients are there.
  for equation in found:
    assert {v.aval.dtype for v in equation.invars} == {jnp.dtype(dtype)}
    assert equation.outvars[0].aval.dtype == jnp.float32


def multiplied_dtypes(compiled):
  """Of each product in a compiled program the dtypes of its two factors."""
  text = compiled.as_text()
  kinds = dict(re.findall(r'%([\w.-]+) = (\w+)\[', text))
  return [
    {kinds[name] for name in re.findall(r'%([\w.-]+)', factors)[:2]}
    for factors in re.findall(r' dot\(([^)]*)\)', text)]


def test_the_cpu_multiplies_bfloat16_as_such():
  """XLA may multiply float32 copies of factors that lie otherwise than row by row."""
  square = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
  plain = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  if multiplied_dtypes(jax.jit(plain).lower(square, square).compile()) != [{'bf16'}]:
    pytest.skip('this CPU has no product of bfloat16')
  config = tiny(dtype='bfloat16')
  model = decoder.create(config, LoraConfig(rank=8, alpha=16))
  tokens = jnp.zeros((2, 256), jnp.int32)

  def loss(lora):
    hidden = decoder.forward(model.graphdef, lora, model.frozen, tokens, positions(tokens))
    return jnp.sum(jnp.square(hidden))

  found = multiplied_dtypes(jax.jit(jax.grad(loss)).lower(model.lora).compile())
  assert len(found) > 20 and all(kinds == {'bf16'} for kinds in found), found


def test_sharded_equals_single_device():
  config, lora = tiny('llama31_8b'), LoraConfig(rank=4, alpha=8)
  single = adapted_model(config, lora)
  params = decoder.to_params(single.frozen) | decoder.to_params(single.lora)
  tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 256)
  value, gradient = loss_and_gradient(single, tokens)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model = decoder.from_params(config, params, lora, mesh=mesh)
  kernel = decoder.to_params(model.frozen)['blocks.attn.q.kernel']
  assert tuple(kernel.sharding.spec) == (None, 'fsdp', 'tensor')
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  with jax.set_mesh(mesh):
    placed = jax.device_put(tokens, sharding.batch_sharding(mesh))
    sharded_value, sharded_gradient = loss_and_gradient(model, placed)
  assert np.isclose(value, sharded_value)
  for name in gradient:
    np.testing.assert_allclose(gradient[name], sharded_gradient[name], atol=1e-5)


def test_random_weights_are_drawn_into_their_shards():
  config, lora = tiny('llama31_8b'), LoraConfig(rank=4, alpha=8)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  single, model = decoder.create(config, lora), decoder.create(config, lora, mesh=mesh)
  for state in ('lora', 'frozen'):
    want = decoder.to_params(getattr(single, state))
    for name, value in decoder.to_params(getattr(model, state)).items():
      np.testing.assert_allclose(value, want[name], rtol=1e-6)
      assert value.sharding.mesh == mesh


def test_every_parameter_has_logical_axes():
  model = decoder.abstract(tiny(), LoraConfig(rank=4, alpha=8))
  for state in (model.lora, model.frozen):
    for path, variable in nnx.to_flat_state(state):
      axes = variable.get_metadata()['out_sharding']
      assert len(axes) == len(variable.get_value().shape), path
      assert set(axes) <= set(sharding.RULES), path


def test_mesh_sizes():
  shape = lambda *sizes, **options: tuple(sharding.make_mesh(*sizes, **options).shape.items())
  assert shape(-1, 2, 1) == (('slice', 1), ('data', 4), ('fsdp', 2), ('tensor', 1))
  assert shape(1, -1, 2, slice=2) == (('slice', 2), ('data', 1), ('fsdp', 2), ('tensor', 2))
  for sizes, options, message in (
    ((16,), {}, '8 devices'),
    ((-1, 3), {}, 'fsdp=3, tensor=1 does not fit 8 devices'),
    ((1, 8), {'slice': 2}, 'the 4 devices of a slice'),
    ((1,), {'slice': 3}, 'slice=3'),
  ):
    with pytest.raises(UserError, match=message):
      sharding.make_mesh(*sizes, **options)
  # Three key-value heads on two devices: replicated, not an error.
  mesh = sharding.make_mesh(tensor=2)
  assert tuple(sharding.spec(('embed', 'kv_heads'), (4, 3), mesh)) == (None, None)


def test_params_round_trip_and_bad_params():
  config = tiny()
  model = decoder.create(config, seed=1)
  params = {k: np.asarray(v) for k, v in decoder.to_params(model.frozen).items()}
  tokens = np.arange(20)[None] % 256
  again = decoder.from_params(config, params)
  np.testing.assert_array_equal(run(model, tokens), run(again, tokens))
  kernel = decoder.output_kernel(model.frozen, config)
  np.testing.assert_array_equal(kernel, params['head.kernel'].T)
  with pytest.raises(UserError, match=r'missing.*head\.kernel'):
    decoder.from_params(config, {k: v for k, v in params.items() if k != 'head.kernel'})
  with pytest.raises(UserError, match=r'unknown.*extra'):
    decoder.from_params(config, params | {'extra': np.zeros(1)})
  with pytest.raises(UserError, match=r'final_norm\.scale has shape'):
    decoder.from_params(config, params | {'final_norm.scale': np.zeros(3)})
  with pytest.raises(UserError, match='mamba'):
    dataclasses.replace(config, family='mamba')


@pytest.mark.parametrize('activation', ['silu', 'gelu_tanh'])
def test_what_is_recomputed_has_the_gradient_of_what_is_kept(activation):
  """`recomputed` keeps its activations in the products' dtype, and what it is given as it comes."""
  gate, up, grad = jax.random.normal(jax.random.key(0), (3, 64, 32))
  shift = jnp.float32(0.5)
  plain = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}

  def want(gate, up, shift):
    return jax.vjp(
      lambda gate, up, shift: plain[activation](gate) * up + shift, gate, up, shift)[1](grad)

  def function(inputs, shift):
    return layers.gated(*inputs, activation) + shift

  for dtype in ('float32', 'bfloat16'):
    value, pullback = jax.vjp(
      lambda inputs, shift, dtype=dtype: layers.recomputed(function, dtype, inputs, shift),
      [gate, up], shift)
    np.testing.assert_allclose(value, plain[activation](gate) * up + shift, rtol=1e-6, atol=1e-6)
    kept = (x.astype(dtype).astype(jnp.float32) for x in (gate, up))
    for got, expected in zip(jax.tree.leaves(pullback(grad)), want(*kept, shift), strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
