"""Quantised kernels: error bounds, and models that compute with what the codes stand for."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.errors import UserError
from models import decoder, incremental, quantise, registry, sharding
from models.decoder import to_params
from models.lora import LoraConfig
from tests.models.test_decoder import loss_and_gradient, run, run_cached, run_steps, with_random_b

KINDS = ('int8', 'int4', 'nf4')
ALL = ['nf4', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('int8', 'int4'))]
_dequantise = jax.jit(quantise.dequantise, static_argnums=2)
# The table of bitsandbytes, to the digits that its source states.
BITSANDBYTES_NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0)  # fmt: skip


def test_normal_float_is_that_of_bitsandbytes():
  np.testing.assert_allclose(quantise.NF4, BITSANDBYTES_NF4, atol=1e-6)


def steps(kernel, kind):
  """The widest distance between neighbouring codes, of each weight's own scale."""
  if kind == 'int8':
    return np.abs(kernel).max(0, keepdims=True) / 127
  size = quantise.block_size(len(kernel))
  blocks = np.abs(kernel).reshape(-1, size, kernel.shape[1]).max(1, keepdims=True)
  widest = 1 / 7 if kind == 'int4' else np.diff(BITSANDBYTES_NF4).max()
  return np.broadcast_to(blocks * widest, (len(blocks), size, kernel.shape[1])).reshape(
    kernel.shape)


@pytest.mark.parametrize('kind', KINDS)
@hypothesis.given(
  inputs=st.sampled_from([12, 192]), seed=st.integers(0, 999), size=st.floats(-6, 6),
  outliers=st.booleans())
def test_error_is_at_most_half_a_step(kind, inputs, seed, size, outliers):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(0, 10**size, (inputs, 3)).astype(np.float32)
  if outliers:
    kernel[rng.integers(inputs)] *= 50
    kernel[:, 0] = 0
  got = np.asarray(_dequantise(*quantise.quantise_layer(kernel, kind), kind))
  assert got.shape == kernel.shape and got.dtype == np.float32
  # Half a step, and what a scale kept as bfloat16 may clip off the largest.
  bound = steps(kernel, kind) / 2 + (0 if kind == 'int8' else np.abs(kernel) * 2**-8)
  assert (np.abs(got - kernel) <= bound * 1.01 + 1e-30).all()
  assert (got[kernel == 0] == 0).all()
  # What the codes stand for is its own code.
  again = _dequantise(*quantise.quantise_layer(got, kind), kind)
  np.testing.assert_allclose(again, got, rtol=2**-7, atol=1e-30)


def test_nf4_is_nearest_and_better_than_int4_on_normal_weights():
  kernel = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
  errors = {}
  for kind in KINDS:
    got = quantise.dequantise(*quantise.quantise(kernel, kind), kind)
    errors[kind] = np.linalg.norm(got - kernel) / np.linalg.norm(kernel)
  assert 0.001 < errors['int8'] < 0.015
  assert 0.05 < errors['nf4'] < errors['int4'] < 0.15
  scale = np.asarray(quantise.quantise(kernel, 'nf4')[1], np.float32)
  units = kernel.reshape(8, 64, 64) / scale[:, None]
  nearest = np.abs(units[..., None] - np.array(BITSANDBYTES_NF4)).argmin(-1)
  want = np.array(BITSANDBYTES_NF4)[nearest] * scale[:, None]
  got = quantise.dequantise(*quantise.quantise(kernel, 'nf4'), 'nf4')
  np.testing.assert_allclose(got, want.reshape(512, 64), atol=1e-5)


def models(kind, name='qwen3_4b', dtype='float32'):
  """A quantised model, and one with what its codes stand for; both with the same adapter."""
  config = registry.shrink(registry.get_config(name, dtype=dtype), base_quantization=kind)
  plain_config = dataclasses.replace(config, base_quantization='none')
  lora = LoraConfig(rank=4, alpha=8)
  params = to_params(decoder.create(plain_config, seed=1).frozen)
  adapter = with_random_b(to_params(decoder.create(plain_config, lora).lora))
  model = decoder.from_params(config, {**params, **adapter}, lora)
  meant = quantise.params_dequantised(to_params(model.frozen), kind, plain_config.weight_dtype)
  return model, decoder.from_params(plain_config, {**meant, **adapter}, lora), params


@pytest.mark.parametrize('kind', ALL)
def test_model_and_gradient_are_those_of_what_the_codes_stand_for(kind):
  model, meant, params = models(kind)
  assert np.abs(to_params(meant.frozen)['blocks.mlp.up.kernel']
                - params['blocks.mlp.up.kernel']).max() > 1e-3
  tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 256)
  (value, gradient), (want, want_gradient) = (loss_and_gradient(m, tokens) for m in (model, meant))
  assert np.isclose(value, want, rtol=1e-5)
  for name, array in want_gradient.items():
    size = np.abs(array).max()
    assert size > 0
    np.testing.assert_allclose(gradient[name], array, atol=1e-5 * size, rtol=0)


@pytest.mark.slow
def test_cached_decoding_and_merging_of_a_quantised_model():
  model, meant, _ = models('nf4')
  tokens = np.random.default_rng(0).integers(0, 256, (2, 20))
  want = run(meant, tokens)
  prepared = incremental.prepare_for_decode(model)
  np.testing.assert_allclose(run_cached(prepared, tokens, 10), want, atol=1e-4)
  np.testing.assert_allclose(run_steps(prepared, tokens, 16), want[:, 16:], atol=1e-4)
  merged = decoder.merge_lora(model)
  assert merged.config.base_quantization == 'none'
  np.testing.assert_allclose(run(merged, tokens), want, atol=1e-4)


def frozen_bytes(model):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.frozen))


def test_memory_of_the_frozen_state():
  # Of a real size, where embedding and norms weigh what they do.
  config = registry.get_config('qwen25_7b', dtype='bfloat16')
  whole = frozen_bytes(decoder.abstract(config))
  blocks = sum(
    leaf.size for name, leaf in to_params(decoder.abstract(config).frozen).items()
    if name in quantise.names([name]))
  for kind, bits in (('int8', 8), ('int4', 4.25), ('nf4', 4.25)):
    model = decoder.abstract(dataclasses.replace(config, base_quantization=kind))
    saved = whole - frozen_bytes(model)
    assert np.isclose(saved, blocks * (16 - bits) / 8, rtol=0.002), kind
    assert registry.count_params(model.config) == registry.count_params(config)


@pytest.mark.slow
def test_bfloat16_products_on_a_mesh():
  model, meant, params = models('nf4', dtype='bfloat16')
  adapter = to_params(model.lora)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  there = decoder.from_params(model.config, {**params, **adapter}, model.lora_config, mesh=mesh)
  codes = to_params(there.frozen)['blocks.mlp.up.kernel']
  assert codes.dtype == jnp.uint8 and tuple(codes.sharding.spec) == (None, 'fsdp', 'tensor')
  tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 256)
  want, want_gradient = loss_and_gradient(meant, tokens)
  with jax.set_mesh(mesh):
    value, gradient = loss_and_gradient(
      there, jax.device_put(tokens, sharding.batch_sharding(mesh)))
  assert np.isclose(value, want, rtol=1e-2)
  for name, array in want_gradient.items():
    error = np.linalg.norm(gradient[name] - array) / np.linalg.norm(array)
    assert error < 0.03, (name, error)


def test_random_bases_and_bad_ones():
  config = registry.shrink(registry.get_config('gemma3_4b'), base_quantization='int8')
  kernel = to_params(decoder.create(config).frozen)['blocks.attn.q.kernel']
  assert kernel.dtype == jnp.int8 and kernel.shape == (2, 64, 64)
  with pytest.raises(UserError, match='none, int8, int4, nf4'):
    dataclasses.replace(config, base_quantization='int2')
  with pytest.raises(UserError, match='cannot be quantised'):
    dataclasses.replace(config, frozen=False)
  with pytest.raises(UserError, match='7 inputs'):
    quantise.quantise(np.ones((7, 2)), 'nf4')


def test_kernels_are_read_and_quantised_a_layer_at_a_time():
  config = registry.shrink(registry.get_config('smollm2_135m'), num_layers=3)
  params = {k: np.asarray(v) for k, v in to_params(decoder.create(config).frozen).items()}
  name, read = 'blocks.mlp.up.kernel', []

  class Stored:
    """Of a file: it is read in parts."""

    shape, dtype = params[name].shape, params[name].dtype

    def __getitem__(self, index):
      read.append(index[0])
      return params[name][index]

  config = dataclasses.replace(config, base_quantization='nf4')
  got = to_params(decoder.from_params(config, {**params, name: Stored()}).frozen)
  assert read == [slice(0, 1), slice(1, 2), slice(2, 3)]
  for layer in range(3):
    codes, scale = quantise.quantise_layer(params[name][layer], 'nf4')
    np.testing.assert_array_equal(got[name][layer], codes)
    np.testing.assert_array_equal(got[f'{name}_scale'][layer], scale)
