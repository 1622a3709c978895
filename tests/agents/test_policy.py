import dataclasses

import numpy as np
import pytest

from agents import policy
from configs import rollout, serve
from data import errors
from models import decoder, lora, native, weights
from tests.agents import fakes
from training import speed


@pytest.fixture(scope='module')
def tokenizer_path(tmp_path_factory):
  return str(fakes.tokenizer_folder(tmp_path_factory.mktemp('policy')))


@pytest.fixture(scope='module')
def base(tokenizer_path):
  return policy.load_base('qwen25_7b', 'random', tokenizer=tokenizer_path, shrink=True, seed=3)


def test_a_shrunken_model_keeps_its_family_and_fits_its_tokenizer(base):
  assert base.config.family == 'qwen2' and base.config.vocab_size == base.tokenizer.vocab_size
  assert base.name == 'qwen25_7b_tiny'


def test_an_adapter_goes_on_the_same_base(base, tmp_path):
  config = lora.LoraConfig(rank=2, alpha=4.0)
  drawn = decoder.create(base.config, config, seed=1)
  params = {k: np.asarray(v) for k, v in decoder.to_params(drawn.lora).items()}
  weights.export_peft(tmp_path / 'adapter', base.config, config, params, 'tiny')
  plain, adapted = base.model(), base.model(str(tmp_path / 'adapter'))
  assert plain.lora_config is None and adapted.lora_config.rank == 2
  for name, value in decoder.to_params(plain.frozen).items():
    np.testing.assert_array_equal(value, decoder.to_params(adapted.frozen)[name])
  for name, value in params.items():
    np.testing.assert_array_equal(value, decoder.to_params(adapted.lora)[name])


def test_policies_lie_side_by_side_over_one_base(base, tmp_path):
  folders = ['']
  for rank, targets in ((2, ('q', 'down')), (3, lora.TARGETS)):
    config = lora.LoraConfig(rank, 6.0, targets=targets)
    shapes = decoder.to_params(decoder.abstract(base.config, config).lora)
    params = {name: np.full(x.shape, rank, np.float32) for name, x in shapes.items()}
    folders.append(str(tmp_path / str(rank)))
    weights.export_peft(folders[-1], base.config, config, params, 'tiny')
  several = base.policies(folders)
  np.testing.assert_array_equal(
    several.gates, [[0.0] * 5, [3.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0, 2.0]])
  joint = decoder.to_params(several.model.lora)
  np.testing.assert_array_equal(
    joint['blocks.attn.k.lora_a'][..., 2:], params['blocks.attn.k.lora_a'])
  # The first of them has nothing there.
  assert not joint['blocks.attn.k.lora_a'][..., :2].any()
  held = decoder.to_params(several.model.frozen)
  assert all(held[k] is v for k, v in decoder.to_params(base.model().frozen).items())
  assert base.policies(folders[1:2]).lora_config.rank == 2
  # A quantised base is dequantised, as where one adapter is merged.
  coded = dataclasses.replace(
    base, config=dataclasses.replace(base.config, base_quantization='int8'), params=held)
  several = coded.policies(folders)
  assert several.model.config.base_quantization == 'none'
  name = 'blocks.mlp.up.kernel'
  np.testing.assert_array_equal(
    decoder.to_params(several.model.frozen)[name],
    decoder.to_params(decoder.merge_lora(coded.model()).frozen)[name])


@pytest.mark.parametrize('entry', [rollout, serve])
def test_the_keys_of_an_engine_mean_the_same_in_every_entry(entry):
  options = policy.engine_options(entry.get_config('dtype=bfloat16,decode_steps=4,seed=3'))
  assert options == {'decode_steps': 4, 'cache_dtype': 'bfloat16', 'lookup': None, 'seed': 3}
  options = policy.engine_options(entry.get_config('lookup=5,cache_dtype=int8'))
  assert options['lookup'].draft_len == 5 and options['cache_dtype'] == 'int8'


def test_the_weights_are_put_on_the_device_once(base, tmp_path):
  plain = base.model()
  adapted = base.with_adapter(lora.LoraConfig(rank=2, alpha=4.0), seed=3)
  held = decoder.to_params(adapted.frozen)
  for name, value in decoder.to_params(plain.frozen).items():
    assert held[name] is value
  # What is trained is new each time: a train step takes it.
  again = base.with_adapter(lora.LoraConfig(rank=2, alpha=4.0), seed=3)
  for name, value in decoder.to_params(adapted.lora).items():
    other = decoder.to_params(again.lora)[name]
    assert other is not value and np.array_equal(other, value)


def test_an_adapter_that_is_none(base, tmp_path):
  with pytest.raises(errors.UserError, match=r'no PEFT adapter'):
    base.model(str(tmp_path))


def test_weights_of_another_model(smollm2_path):
  with pytest.raises(errors.UserError, match=r'is not qwen25_0.5b: its family is llama'):
    policy.load_base('qwen25_0.5b', str(smollm2_path))


def test_a_tokenizer_with_more_tokens_than_the_model(smollm2_path, tokenizer_path, monkeypatch):
  small = policy.registry.get_config('smollm2_135m', vocab_size=300)
  monkeypatch.setitem(policy.registry.CONFIGS, 'smollm2_135m', small)
  with pytest.raises(errors.UserError, match=r'449 tokens and smollm2_135m only 300'):
    policy.load_base('smollm2_135m', 'random', tokenizer=tokenizer_path)


def test_the_expert_s_tokenizer_is_the_model_s(smollm2_path, tokenizer_path):
  found = policy.load_tokenizer('smollm2_135m')
  assert found.fingerprint == policy.load_tokenizer(str(smollm2_path)).fingerprint
  assert policy.load_tokenizer('smollm2_135m', tokenizer=tokenizer_path).vocab_size == 449


@pytest.mark.parametrize('change, taken', [
  ({}, 'bfloat16'), ({'mesh': '1,1,2'}, 'float32'), ({'base_quantization': 'int8'}, 'float32'),
  ({'model': 'experiments/small_decoder'}, 'float32'), ({'model': 'nowhere'}, 'float32'),
  ({'dtype': 'bfloat16', 'mesh': '1,1,2'}, 'bfloat16')])
def test_bfloat16_is_for_models_that_the_own_kernels_take(monkeypatch, change, taken):
  monkeypatch.setattr(native, 'available', lambda: True)
  monkeypatch.setattr(speed, 'product_rate', {'bfloat16': 1e11, 'float32': 2e11}.__getitem__)
  config = rollout.make({'dtype': 'auto', **change})
  assert policy.settle_dtype(config, None) == taken


def test_a_loaded_base_says_what_it_plays_in(base):
  assert policy.settle_dtype(rollout.make({'dtype': 'auto'}), base) == base.config.dtype
