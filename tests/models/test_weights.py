"""Weights in and adapters out agree with `transformers` and `peft`, logits to 1e-4 in float32."""

import dataclasses
import json
import struct

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from data.errors import UserError
from data.tokenizer import Tokenizer
from models import decoder, hf_config, incremental, registry, weights
from models.kv_cache import KVCache
from models.lora import TARGETS, LoraConfig
from models.rope import frequencies

TINY = {
  'vocab_size': 96, 'hidden_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 6,
  'num_key_value_heads': 2, 'intermediate_size': 80, 'initializer_range': 0.15,
  'max_position_embeddings': 256, 'rms_norm_eps': 1e-5,
}  # fmt: skip
LLAMA3_ROPE = {
  'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
  'high_freq_factor': 4.0, 'original_max_position_embeddings': 64,
}  # fmt: skip
YARN_ROPE = {
  'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 16.0, 'beta_fast': 32.0, 'beta_slow': 1.0,
  'mscale': 1.0, 'mscale_all_dim': 1.0, 'llama_4_scaling_beta': 0.1,
  'original_max_position_embeddings': 16,
}  # fmt: skip
GEMMA3_ROPE = {
  'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
}
VARIANTS = {
  'llama_tied': ('Llama', {'tie_word_embeddings': True}),
  'llama_scaled': ('Llama', {'tie_word_embeddings': False, 'rope_parameters': LLAMA3_ROPE}),
  'llama_head_dim': ('Llama', {'tie_word_embeddings': False, 'head_dim': 16}),
  'qwen2_tied': ('Qwen2', {'tie_word_embeddings': True}),
  'qwen2_untied': ('Qwen2', {'tie_word_embeddings': False}),
  'qwen3': ('Qwen3', {'tie_word_embeddings': True, 'head_dim': 16}),
  'gemma3': (
    'Gemma3',
    {
      'head_dim': 16, 'sliding_window': 8, 'sliding_window_pattern': 2, 'query_pre_attn_scalar': 7,
      'rope_parameters': GEMMA3_ROPE,
    },
  ),
  'ministral3': ('Ministral3', {'head_dim': 16, 'rope_parameters': YARN_ROPE}),
}  # fmt: skip


def hf_model(variant):
  """A random tiny `transformers` model with biases and norms that are not their init."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  family, settings = VARIANTS[variant]
  torch.manual_seed(0)
  kind = 'Gemma3TextConfig' if family == 'Gemma3' else f'{family}Config'
  ids = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}
  config = getattr(transformers, kind)(**TINY | ids | settings)
  model = getattr(transformers, f'{family}ForCausalLM')(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name.endswith('bias') or 'norm' in name:
        parameter += 0.3 * torch.randn_like(parameter)
  return model


def hf_logits(model, tokens):
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


_forward = jax.jit(decoder.forward, static_argnums=0)
_cached = jax.jit(incremental.forward_cached, static_argnums=0, static_argnames='attend_len')


def our_logits(model, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = _forward(model.graphdef, model.lora, model.frozen, jnp.asarray(tokens), positions)
  return np.asarray(decoder.logits(model.graphdef, model.frozen, hidden))


def cached_logits(model, tokens, chunk):
  """The same through the cache, `chunk` tokens a call."""
  rows, length = tokens.shape
  cache = KVCache.init(model.config, rows, length, 'float32')
  parts = []
  for start in range(0, length, chunk):
    new = tokens[:, start : start + chunk]
    counts = jnp.full((rows,), new.shape[1], jnp.int32)
    new = np.pad(new, ((0, 0), (0, chunk - new.shape[1])))
    lengths = jnp.full((rows,), start, jnp.int32)
    hidden, cache = _cached(
      model.graphdef, model.lora, model.frozen, jnp.asarray(new), cache, lengths, counts,
      attend_len=length,
    )  # fmt: skip
    parts.append(decoder.logits(model.graphdef, model.frozen, hidden))
  return np.concatenate(parts, axis=1)[:, :length]


def tokens_for(vocab_size, shape=(3, 40)):
  return np.random.default_rng(1).integers(0, vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize(
  ('variant', 'shard'), zip(VARIANTS, ['10GB', '30KB'] * 4, strict=True)
)
def test_folder_equals_transformers(variant, shard, tmp_path):
  model = hf_model(variant)
  model.save_pretrained(tmp_path, max_shard_size=shard)
  assert (tmp_path / 'model.safetensors').is_file() == (shard == '10GB')
  config, params = weights.load_pretrained(tmp_path)
  ours = decoder.from_params(config, params)
  tokens = tokens_for(96)
  want = hf_logits(model, tokens)
  assert np.abs(want).max() > 1
  assert np.abs(our_logits(ours, tokens) - want).max() < 1e-4
  assert np.abs(cached_logits(ours, tokens, 7) - want).max() < 1e-4
  assert registry.count_params(config) == model.num_parameters()


@pytest.mark.parametrize(
  'variant', ['llama_scaled', 'qwen2_untied', 'qwen3', 'gemma3', 'ministral3'])
def test_an_exported_folder_is_the_model_again(variant, tmp_path):
  transformers = pytest.importorskip('transformers')
  model = hf_model(variant)
  model.save_pretrained(tmp_path / 'model')
  config, params = weights.load_pretrained(tmp_path / 'model')
  weights.export_pretrained(tmp_path / 'again' / 'model', config, params)
  config_again, params_again = weights.load_pretrained(tmp_path / 'again' / 'model')
  assert config_again == config
  assert params_again.keys() == params.keys()
  assert all((params_again[name] == value).all() for name, value in params.items())
  tokens = tokens_for(96)
  loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'again' / 'model')
  assert type(loaded) is type(model)
  assert (hf_logits(loaded.eval(), tokens) == hf_logits(model, tokens)).all()


@pytest.mark.parametrize('kind', ['Gemma3', 'Mistral3'])
def test_the_text_model_of_a_multimodal_folder(kind, tmp_path):
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  text = hf_model('gemma3' if kind == 'Gemma3' else 'ministral3')
  vision = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14)
  config = getattr(transformers, f'{kind}Config')(
    text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=kind == 'Gemma3')
  whole = getattr(transformers, f'{kind}ForConditionalGeneration')(config).eval()
  whole.model.language_model.load_state_dict(text.model.state_dict())
  whole.lm_head.load_state_dict(text.lm_head.state_dict())
  whole.save_pretrained(tmp_path / 'whole')
  text.save_pretrained(tmp_path / 'text')
  (config, params), (want_config, want) = (
    weights.load_pretrained(tmp_path / name) for name in ('whole', 'text'))
  assert config == dataclasses.replace(want_config, name='whole')
  assert params.keys() == want.keys()
  assert all((params[name] == array).all() for name, array in want.items())
  # As the folders of older versions name them.
  renamed = {
    name.replace('model.language_model.', 'language_model.model.'): array
    for name, array in safetensors.numpy.load_file(tmp_path / 'whole/model.safetensors').items()}
  safetensors.numpy.save_file(renamed, tmp_path / 'whole/model.safetensors')
  config, params = weights.load_pretrained(tmp_path / 'whole')
  assert config == dataclasses.replace(want_config, name='whole')
  assert all((params[name] == array).all() for name, array in want.items())


def test_the_published_gemma3_config_is_the_registered_one(tmp_path):
  # The text_config of google/gemma-3-4b-it leaves out what equals its class's defaults.
  text = {
    'hidden_size': 2560, 'intermediate_size': 10240, 'model_type': 'gemma3_text',
    'num_hidden_layers': 34, 'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'sliding_window': 1024,
  }  # fmt: skip
  got = hf_config.read({'model_type': 'gemma3', 'text_config': text}, tmp_path, 'float32')
  assert got == dataclasses.replace(registry.get_config('gemma3_4b'), name=got.name)


def test_the_defaults_of_ministral3_are_the_registered_ones(tmp_path):
  transformers = pytest.importorskip('transformers')
  raw = transformers.Ministral3Config().to_dict()
  got = hf_config.read(raw, tmp_path, 'float32')
  assert got == dataclasses.replace(registry.get_config('ministral3_8b'), name=got.name)


def test_bfloat16_is_kept_bitwise(tmp_path):
  torch = pytest.importorskip('torch')
  model = hf_model('qwen2_tied').to(torch.bfloat16)
  model.save_pretrained(tmp_path)
  config, params = weights.load_pretrained(tmp_path, dtype='bfloat16')
  assert config.param_dtype == 'bfloat16'
  kernel = np.asarray(params['blocks.mlp.up.kernel'])
  assert kernel.dtype == ml_dtypes.bfloat16
  want = torch.stack([layer.mlp.up_proj.weight.T for layer in model.model.layers])
  assert (kernel.astype(np.float32) == want.detach().float().numpy()).all()
  assert params['blocks.attn_norm.scale'].dtype == np.float32
  _, wide = weights.load_pretrained(tmp_path)
  assert (wide['blocks.mlp.up.kernel'] == kernel.astype(np.float32)).all()


@pytest.fixture(scope='module')
def smollm2(smollm2_path):
  return decoder.from_params(*weights.load_pretrained(smollm2_path))


@pytest.fixture(scope='module')
def smollm2_reference(smollm2_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  return transformers.AutoModelForCausalLM.from_pretrained(
    smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
  ).eval()


def test_smollm2_matches_its_registered_config(smollm2):
  registered = registry.get_config('smollm2_135m')
  assert smollm2.config == dataclasses.replace(registered, name=smollm2.config.name)


def test_smollm2_equals_transformers(smollm2, smollm2_reference, smollm2_path):
  tokenizer = Tokenizer.load(smollm2_path)
  prompts = [
    'You are in the middle of a room. Looking quickly around you, you see a cabinet 12, a fridge 1,'
    ' a microwave 1, a drawer 4 and a shelf 2.',
    'go to cabinet 12 and open it. You see a mug 1, a plate 2 and a knife 3. Close the cabinet and'
    ' go to the sink.',
    'The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is'
    ' Madrid, and that of Portugal is Lisbon.',
  ]
  tokens = np.array([tokenizer.encode(prompt)[:24] for prompt in prompts], np.int32)
  want = hf_logits(smollm2_reference, tokens)
  assert tokenizer.decode([want[2, 4].argmax()]) == ' Paris'
  for got in (our_logits(smollm2, tokens), cached_logits(smollm2, tokens, 12)):
    error = np.abs(got - want)
    assert error.max() < 1e-4
    assert (got.argmax(-1) == want.argmax(-1)).all()


def test_smollm2_with_an_adapter_equals_peft(smollm2_path, smollm2_reference, tmp_path):
  peft = pytest.importorskip('peft')
  config, params = weights.load_pretrained(smollm2_path)
  lora_config = LoraConfig(rank=4, alpha=8)
  ours, adapter = adapted(config, params, lora_config, scale=0.01)
  weights.export_peft(tmp_path, config, lora_config, adapter, 'org/base')
  prompt = Tokenizer.load(smollm2_path).encode('You arrive at shelf 1. On it, you see a mug 1.')
  tokens = np.array([prompt], np.int32)
  plain = hf_logits(smollm2_reference, tokens)
  theirs = peft.PeftModel.from_pretrained(smollm2_reference, tmp_path).eval()
  want = hf_logits(theirs, tokens)
  theirs.unload()
  assert np.abs(want - plain).max() > 0.1
  near = 1e-5 * max(10, np.abs(want).max())  # Logits of 30 layers reach 20.
  assert np.abs(our_logits(ours, tokens) - want).max() < near
  assert np.abs(our_logits(decoder.merge_lora(ours), tokens) - want).max() < near


def permuted(kernel, head_dim):
  """llama.cpp's order of query and key rows: the halves of each head interleaved."""
  return kernel.reshape(-1, 2, head_dim // 2, kernel.shape[1]).swapaxes(1, 2).reshape(kernel.shape)


def write_gguf(path, config, params, kinds=(), extra=None):
  """Writes flat parameters as llama.cpp's converter does; `kinds` maps suffixes to types."""
  writer = gguf.GGUFWriter(path, config.family)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.embed_dim)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  tensors = dict(extra or {})
  for flat, array in params.items():
    array = np.asarray(array)
    array = array.swapaxes(-1, -2) if flat.endswith('.kernel') else array
    if not flat.startswith('blocks.'):
      tensors[weights._GLOBAL_NAMES[flat][1]] = array
      continue
    name = weights._LAYER_NAMES[flat.removeprefix('blocks.')][1]
    for layer in range(config.num_layers):
      rotary = config.family == 'llama' and name in ('attn_q.weight', 'attn_k.weight')
      one = permuted(array[layer], config.head_dim) if rotary else array[layer]
      tensors[f'blk.{layer}.{name}'] = one
  for name, array in tensors.items():
    kind = dict(kinds).get(name.split('.', 2)[-1], gguf.GGMLQuantizationType.F32)
    data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
    writer.add_tensor(name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def tiny_model(base, **overrides):
  config = registry.shrink(registry.get_config(base), max_position=256, **overrides)
  model = decoder.create(config, seed=3)
  return config, {k: np.asarray(v) for k, v in decoder.to_params(model.frozen).items()}


@pytest.mark.parametrize('base', ['smollm2_135m', 'qwen25_7b', 'llama31_8b', 'qwen3_4b'])
def test_gguf_round_trip(base, tmp_path):
  config, params = tiny_model(base)
  extra = {}
  if config.rope_scaling:
    args = config.head_dim, config.rope_theta
    plain = np.asarray(frequencies(*args, None))
    extra['rope_freqs.weight'] = plain / np.asarray(frequencies(*args, config.rope_scaling))
  path = write_gguf(tmp_path / 'tiny.gguf', config, params, extra=extra)
  got_config, got = weights.load_pretrained(path)
  assert got_config == dataclasses.replace(config, name='tiny')
  assert got.keys() == params.keys()
  for name, array in params.items():
    assert (got[name] == array).all(), name


@pytest.mark.parametrize('kind', ['Q4_0', 'Q4_1', 'Q5_0', 'Q8_0', 'F16', 'BF16'])
def test_gguf_quantisations(kind, tmp_path):
  kind = gguf.GGMLQuantizationType[kind]
  config, params = tiny_model('smollm2_135m')
  kinds = {'attn_q.weight': kind, 'ffn_down.weight': kind}
  got = weights.load_pretrained(write_gguf(tmp_path / 'tiny.gguf', config, params, kinds))[1]
  tolerance = {'Q4_0': 0.15, 'Q4_1': 0.1, 'Q5_0': 0.08, 'Q8_0': 0.01, 'F16': 1e-3, 'BF16': 1e-2}
  for name in ('blocks.attn.q.kernel', 'blocks.mlp.down.kernel'):
    error = np.abs(got[name] - params[name]).max() / np.abs(params[name]).max()
    assert 0 < error < tolerance[kind.name]
  assert (got['blocks.mlp.up.kernel'] == params['blocks.mlp.up.kernel']).all()


def test_bad_gguf(tmp_path, smollm2_path):
  config, params = tiny_model('smollm2_135m')
  path = write_gguf(tmp_path / 'tiny.gguf', config, params)
  whole = path.read_bytes()
  bad = tmp_path / 'bad.gguf'
  for size in (len(whole) - 40_000, len(whole) // 2, 400, 30):
    bad.write_bytes(whole[:size])
    with pytest.raises(UserError, match='truncated'):
      weights.load_pretrained(bad)
  bad.write_bytes(whole.replace(b'\5\0\0\0\0\0\0\0llama', b'\5\0\0\0\0\0\0\0gemma'))
  with pytest.raises(UserError, match=r"'gemma'; supported are llama, qwen2"):
    weights.load_pretrained(bad)
  bad.write_bytes(whole[:4] + struct.pack('<I', 9) + whole[8:])
  with pytest.raises(UserError, match='version 9'):
    weights.load_pretrained(bad)
  bad.write_bytes(whole.replace(b'blk.1.ffn_up', b'blk.1.ffn_xx'))
  with pytest.raises(UserError, match=r'lacks 1 tensors.*blk\.1\.ffn_up\.weight'):
    weights.load_pretrained(bad)
  write_gguf(bad, config, params, extra={'blk.0.attn_q_norm.weight': np.ones(16, np.float32)})
  with pytest.raises(UserError, match=r'attn_q_norm\.weight; this variant'):
    weights.load_pretrained(bad)
  write_gguf(bad, config, params, extra={'rope_freqs.weight': np.linspace(1, 3, 8)})
  with pytest.raises(UserError, match='rotary'):
    weights.load_pretrained(bad)
  with pytest.raises(UserError, match='there are no weights'):
    weights.load_pretrained(tmp_path / 'missing.gguf')


@pytest.fixture
def folder(tmp_path):
  """A sound sharded folder with a config to break."""
  hf_model('llama_tied').save_pretrained(tmp_path, max_shard_size='30KB')
  return tmp_path


def edit_json(path, **changes):
  content = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'mistral'}, "'mistral'; supported are llama, qwen2"),
    ({'num_hidden_layers': 3}, r'lacks 9 tensors.*model\.layers\.2'),
    ({'num_hidden_layers': 1}, r'holds 9 tensors.*model\.layers\.1'),
    ({'intermediate_size': 81}, r'mlp\..*has shape \((80, 48|48, 80)\)'),
    ({'hidden_size': None}, 'has no hidden_size'),
    ({'attention_bias': True}, 'attention_bias=True'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'model_type': 'gemma3'}, "'gemma3'"),
    ({'model_type': 'gemma3_text', 'attn_logit_softcapping': 30.0}, 'attn_logit_softcapping'),
    (
      {'model_type': 'gemma3_text', 'layer_types': ['full_attention', 'sliding_attention']},
      'layer_types',
    ),
    ({'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0}}, "'dynamic' scaling"),
    ({'tie_word_embeddings': False}, r'lm_head\.weight'),
  ],
)
def test_bad_config(folder, changes, message):
  edit_json(folder / 'config.json', **changes)
  with pytest.raises(UserError, match=message):
    weights.load_pretrained(folder)


def test_bad_files(folder):
  shard = sorted(folder.glob('model-*.safetensors'))[1]
  whole = shard.read_bytes()
  shard.write_bytes(whole[: len(whole) - 100])
  with pytest.raises(UserError, match=f'{shard.name} is truncated'):
    weights.load_pretrained(folder)
  shard.unlink()
  with pytest.raises(UserError, match=f'{shard.name} is missing'):
    weights.load_pretrained(folder)
  (folder / 'model.safetensors.index.json').write_text('{')
  with pytest.raises(UserError, match='not readable JSON'):
    weights.load_pretrained(folder)
  (folder / 'model.safetensors.index.json').unlink()
  with pytest.raises(UserError, match=r'model\.safetensors is missing'):
    weights.load_pretrained(folder)
  (folder / 'config.json').unlink()
  with pytest.raises(UserError, match=r'config\.json is missing'):
    weights.load_pretrained(folder)


def adapted(config, params, lora_config, scale=0.2):
  """A model with an adapter that does something (B is zero at init)."""
  model = decoder.from_params(config, params, lora_config, seed=5)
  rng = np.random.default_rng(7)
  adapter = {
    name: rng.normal(0, scale, array.shape).astype(np.float32)
    for name, array in decoder.to_params(model.lora).items()
  }
  return decoder.from_params(config, {**params, **adapter}, lora_config), adapter


@pytest.mark.parametrize(
  ('variant', 'targets'),
  [('llama_tied', ('q', 'v')), ('qwen2_untied', ('q', 'k', 'v', 'o', 'gate', 'up', 'down'))],
)
def test_peft_loads_our_adapter(variant, targets, tmp_path):
  peft = pytest.importorskip('peft')
  base = hf_model(variant)
  base.save_pretrained(tmp_path / 'base')
  config, params = weights.load_pretrained(tmp_path / 'base')
  lora_config = LoraConfig(rank=4, alpha=12, dropout=0.1, targets=targets)
  ours, adapter = adapted(config, params, lora_config)
  weights.export_peft(tmp_path / 'adapter', config, lora_config, adapter, 'org/base')
  tokens = tokens_for(96)
  plain = hf_logits(base, tokens)
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
  want = hf_logits(theirs, tokens)
  assert np.abs(want - plain).max() > 0.1
  assert np.abs(our_logits(ours, tokens) - want).max() < 1e-4
  assert np.abs(cached_logits(ours, tokens, 16) - want).max() < 1e-4
  assert np.abs(our_logits(decoder.merge_lora(ours), tokens) - want).max() < 1e-4
  settings = theirs.peft_config['default']
  assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (4, 12, 0.1)
  assert settings.base_model_name_or_path == 'org/base'

  # Theirs back: peft's own file has the same content.
  theirs.save_pretrained(tmp_path / 'saved')
  got_config, got = weights.load_peft(tmp_path / 'saved', config)
  assert got_config == lora_config
  assert all((got[name] == array).all() for name, array in adapter.items())


@pytest.fixture(scope='module')
def qwen2_base(tmp_path_factory):
  """A model with biases on q, k and v, as `transformers` and as ours read it."""
  folder = tmp_path_factory.mktemp('qwen2')
  base = hf_model('qwen2_untied')
  base.save_pretrained(folder)
  return base, *weights.load_pretrained(folder)


@pytest.mark.parametrize(
  'lora_config',
  [
    *(LoraConfig(rank=2, alpha=4, targets=(target,)) for target in TARGETS),
    LoraConfig(rank=1, alpha=1),
    LoraConfig(rank=8, alpha=4),  # a scale below 1
    LoraConfig(rank=3, alpha=4.5, targets=('k', 'up')),  # no whole number
    LoraConfig(rank=64, alpha=128, targets=('q', 'v')),  # a rank above the width
  ],
  ids=lambda c: f'{"".join(c.targets)}-{c.rank}-{c.alpha}',
)
def test_every_target_and_scale_equals_peft(qwen2_base, lora_config, tmp_path):
  peft = pytest.importorskip('peft')
  base, config, params = qwen2_base
  ours, adapter = adapted(config, params, lora_config)
  weights.export_peft(tmp_path, config, lora_config, adapter, 'org/base')
  tokens = tokens_for(96, (2, 20))
  plain = hf_logits(base, tokens)
  theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
  try:
    want = hf_logits(theirs, tokens)
  finally:
    theirs.unload()  # the base is everyone's
  size = np.abs(want).max()
  assert np.abs(want - plain).max() > 1e-2 * size
  for model in (ours, decoder.merge_lora(ours)):
    assert np.abs(our_logits(model, tokens) - want).max() < 1e-5 * max(10, size)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_adapter_round_trip_is_bitwise(dtype, tmp_path):
  config, params = tiny_model('qwen25_7b')
  lora_config = LoraConfig(rank=3, alpha=4.5, targets=('o', 'down', 'gate'))
  adapter = {k: v.astype(dtype) for k, v in adapted(config, params, lora_config)[1].items()}
  for _ in range(2):  # the second time over the first
    weights.export_peft(tmp_path / 'a', config, lora_config, adapter, 'base')
  got_config, got = weights.load_peft(tmp_path / 'a', config)
  assert got_config == lora_config
  assert got.keys() == adapter.keys()
  for name, array in adapter.items():
    assert got[name].dtype == dtype
    assert got[name].tobytes() == array.tobytes(), name
  assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == [
    'adapter_config.json',
    'adapter_model.safetensors',
  ]


def test_bad_adapters(tmp_path):
  config, params = tiny_model('smollm2_135m')
  lora_config = LoraConfig(rank=2, alpha=4)
  _, adapter = adapted(config, params, lora_config)
  folder = tmp_path / 'adapter'

  def fresh():
    weights.export_peft(folder, config, lora_config, adapter, 'base')

  with pytest.raises(UserError, match=r'adapter_config\.json is missing'):
    weights.load_peft(folder, config)
  changes = {
    'use_dora': True, 'use_rslora': True, 'rank_pattern': {'q_proj': 8}, 'bias': 'all'
  }  # fmt: skip
  for key, value in changes.items():
    fresh()
    edit_json(folder / 'adapter_config.json', **{key: value})
    with pytest.raises(UserError, match=key):
      weights.load_peft(folder, config)
  fresh()
  edit_json(folder / 'adapter_config.json', peft_type='LOHA')
  with pytest.raises(UserError, match='LOHA'):
    weights.load_peft(folder, config)
  fresh()
  edit_json(folder / 'adapter_config.json', r=3)
  with pytest.raises(UserError, match='at rank 3 needs'):
    weights.load_peft(folder, config)
  fresh()
  other = dataclasses.replace(config, num_layers=1)
  with pytest.raises(UserError, match=r'has no place in .*1 layers'):
    weights.load_peft(folder, other)
  other = dataclasses.replace(config, num_layers=3)
  with pytest.raises(UserError, match='of layer 2'):
    weights.load_peft(folder, other)
  other = dataclasses.replace(config, mlp_dim=64)
  with pytest.raises(UserError, match='another base model'):
    weights.load_peft(folder, other)
  path = folder / 'adapter_model.safetensors'
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(UserError, match='truncated'):
    weights.load_peft(folder, config)
  safetensors.numpy.save_file({'x': np.zeros(1, np.float32)}, path)
  with pytest.raises(UserError, match='tensor x has no place'):
    weights.load_peft(folder, config)
