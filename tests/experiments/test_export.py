"""Exported folders are what `peft` and `transformers` load, with our logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from data import tokenizer as tokenizer_lib
from data.errors import UserError
from experiments import export
from models import decoder, registry, weights
from models.lora import LoraConfig

_forward = jax.jit(decoder.forward, static_argnums=0)
LORA = LoraConfig(rank=3, alpha=6, targets=('q', 'v', 'o', 'gate', 'down'))


def slow(name):
  return pytest.param(name, marks=pytest.mark.slow)


def our_logits(model, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden = _forward(model.graphdef, model.lora, model.frozen, jnp.asarray(tokens), positions)
  return np.asarray(decoder.logits(model.graphdef, model.frozen, hidden))


def write_run(folder, name):
  """A run of train.py over a tiny random base: (config, its params, adapter params, tokens)."""
  pytest.importorskip('torch')
  from tests.models import torch_reference

  config = torch_reference.CONFIGS[name]
  torch_reference.build(config).save_pretrained(folder / 'base')
  for file in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    (folder / 'base' / file).write_text(f'{{"the": "{file}"}}')
  config, params = weights.load_pretrained(folder / 'base')
  rng = np.random.default_rng(1)
  shapes = decoder.to_params(decoder.abstract(config, LORA).lora)
  adapter = {k: rng.normal(0, 0.2, v.shape).astype(np.float32) for k, v in shapes.items()}
  weights.export_peft(folder / 'adapter', config, LORA, adapter, 'org/base')
  (folder / 'config.json').write_text(json.dumps(
    {'model': str(folder / 'base'), 'base': '', 'tokenizer': ''}))
  return config, params, adapter, rng.integers(0, config.vocab_size, (2, 30)).astype(np.int32)


@pytest.mark.parametrize('name', [
  'gemma3', slow('llama_tied'), slow('llama_untied_scaled_rope'), slow('qwen2_untied'),
  slow('qwen3_tied'), slow('ministral3')])
def test_every_format_has_our_logits(name, tmp_path):
  config, params, adapter, tokens = write_run(tmp_path, name)
  peft = pytest.importorskip('peft')
  import transformers

  from tests.models import torch_reference

  want = our_logits(decoder.from_params(config, {**params, **adapter}, LORA), tokens)
  source = export.from_run(tmp_path)
  options = {'dtype': 'float32', 'max_shard_bytes': export.parse_bytes('30KB')}
  for kind in export.FORMATS:
    # The second time over the first.
    for _ in range(2):
      files = export.export(kind, source, tmp_path / kind, **options)
  load = transformers.AutoModelForCausalLM.from_pretrained
  plain = load(tmp_path / 'hf').eval()
  adapted = peft.PeftModel.from_pretrained(plain, tmp_path / 'peft').eval()
  assert np.abs(torch_reference.logits(adapted, tokens) - want).max() < 1e-4
  before = torch_reference.logits(adapted.unload(), tokens)
  assert np.abs(before - want).max() > 0.1
  merged = load(tmp_path / 'merged').eval()
  assert np.abs(torch_reference.logits(merged, tokens) - want).max() < 1e-4

  assert adapted.peft_config['default'].base_model_name_or_path == str(tmp_path / 'base')
  assert files == sorted(files) and len([f for f in files if 'safetensors' in f]) > 3
  index = json.loads((tmp_path / 'merged/model.safetensors.index.json').read_text())
  sizes = {
    file: sum(a.nbytes for a in safetensors.numpy.load_file(tmp_path / 'merged' / file).values())
    for file in set(index['weight_map'].values())}
  assert sum(sizes.values()) == index['metadata']['total_size']
  assert max(sizes.values()) <= 30e3
  for file in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    assert (tmp_path / 'merged' / file).read_text() == (tmp_path / 'base' / file).read_text()

  # Fewer files, in bfloat16: the old ones are gone.
  export.export('hf', source, tmp_path / 'hf')
  assert not (tmp_path / 'hf/model.safetensors.index.json').exists()
  assert [p.name for p in (tmp_path / 'hf').glob('*.safetensors')] == ['model.safetensors']
  assert json.loads((tmp_path / 'hf/config.json').read_text())['dtype'] == 'bfloat16'
  _, narrow = weights.load_pretrained(tmp_path / 'hf', 'bfloat16')
  name = 'blocks.mlp.up.kernel'
  assert (np.asarray(narrow[name]) == np.asarray(params[name]).astype(jnp.bfloat16)).all()


@pytest.mark.parametrize('kind', ['Gemma3', slow('Mistral3')])
def test_an_adapter_for_a_model_that_reads_images_too(kind, tmp_path):
  name = 'gemma3' if kind == 'Gemma3' else 'ministral3'
  config, params, adapter, tokens = write_run(tmp_path, name)
  peft = pytest.importorskip('peft')
  import transformers

  from tests.models import torch_reference

  text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
  vision = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14)
  whole_config = getattr(transformers, f'{kind}Config')(
    text_config=text.config.to_dict(), vision_config=vision,
    tie_word_embeddings=config.tie_embeddings, image_token_index=96)
  whole = getattr(transformers, f'{kind}ForConditionalGeneration')(whole_config).eval()
  whole.model.language_model.load_state_dict(text.model.state_dict())
  whole.lm_head.load_state_dict(text.lm_head.state_dict())
  whole.save_pretrained(tmp_path / 'whole')
  source = export.Source(str(tmp_path / 'whole'), adapter=str(tmp_path / 'adapter'))
  export.export('peft', source, tmp_path / 'peft', base_name='org/whole')
  tokens %= 90
  want = our_logits(decoder.from_params(config, {**params, **adapter}, LORA), tokens)
  adapted = peft.PeftModel.from_pretrained(whole, tmp_path / 'peft').eval()
  assert np.abs(torch_reference.logits(adapted, tokens) - want).max() < 1e-4
  trained = {n.rsplit('.lora_A', 1)[0] for n, _ in adapted.named_parameters() if 'lora_A' in n}
  assert len(trained) == config.num_layers * len(LORA.targets)
  assert all('.language_model.layers.' in n for n in trained)
  # And back.
  lora, got = weights.load_peft(tmp_path / 'peft', config)
  assert lora == LORA and all((got[k] == v).all() for k, v in adapter.items())
  published = export.Source('gemma3_4b')
  assert export.find_weights(published) is None


def test_the_tokenizer_of_a_gguf_file_as_a_folder(smollm2_path, tmp_path):
  transformers = pytest.importorskip('transformers')
  files = tokenizer_lib.export(smollm2_path, tmp_path)
  assert files == ['tokenizer.json', 'tokenizer_config.json', 'generation_config.json']
  ours, again = (tokenizer_lib.Tokenizer.load(path) for path in (smollm2_path, tmp_path))
  assert again.fingerprint == ours.fingerprint and again.stop_ids == ours.stop_ids
  assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = 'go to cabinet 12; Größe 日本 don’t <|im_end|>'
  assert theirs(text).input_ids == ours.encode(text, allow_special=True)
  messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Where?'}]
  rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  assert rendered == ours.render_chat(messages, add_generation_prompt=True)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_folder(smollm2_path, tmp_path):
  export.export('hf', export.Source('smollm2_135m'), tmp_path, dtype='float32')
  config, params = weights.load_pretrained(tmp_path)
  assert config == dataclasses.replace(registry.get_config('smollm2_135m'), name=config.name)
  _, want = weights.load_pretrained(smollm2_path)
  for flat in ('blocks.attn.q.kernel', 'embed.embedding', 'final_norm.scale'):
    assert (np.asarray(params[flat]) == np.asarray(want[flat])).all()


def test_what_cannot_be_exported_is_said(tmp_path):
  source = export.Source('qwen3_4b', adapter=str(tmp_path))
  for kind, given, message in (
    ('onnx', source, 'peft, hf, merged'),
    ('peft', export.Source('qwen3_4b'), 'needs an adapter'),
    ('merged', source, 'give --base=FOLDER'),
    ('hf', export.Source('qwen3_4bb'), 'qwen3_4b'),
    ('hf', export.Source('qwen3_4b', base='random'), 'random weights'),
    ('hf', export.Source('qwen3_4b', base=str(tmp_path / 'no')), 'no weights at'),
    ('hf', export.Source(str(tmp_path)), 'give another --out'),
  ):
    with pytest.raises(UserError, match=message):
      export.export(kind, given, tmp_path / 'out' if given.model != str(tmp_path) else tmp_path)
  with pytest.raises(UserError, match='float16'):
    export.export('hf', source, tmp_path, dtype='float16')
  with pytest.raises(UserError, match=r'no run of train\.py'):
    export.from_run(tmp_path)
  (tmp_path / 'config.json').write_text('{"model": "m", "base": "", "tokenizer": ""}')
  with pytest.raises(UserError, match='not finished'):
    export.from_run(tmp_path)
  for text in ('5', '5TB', '-1GB', '0MB', 'GB'):
    with pytest.raises(UserError, match='as in 5GB'):
      export.parse_bytes(text)
  assert export.parse_bytes('1.5gb') == 1.5e9
