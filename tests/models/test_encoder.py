"""The sentence encoder equals `transformers`' BERT, and long texts are never cut."""

import json
import shutil

import jax
import numpy as np
import pytest

from data.errors import UserError
from models import encoder as encoder_lib
from models import sharding
from models.encoder import load_encoder

TEXTS = [
  'heat some mug and put it in cabinet.',
  'If the drawer is closed, open it first.',
  '',
  'Größe 12 [SEP] 日本 don’t ' + 'the shelf holds a plate and a cup ' * 8,
]


@pytest.fixture(scope='module')
def minilm(minilm_path):
  return load_encoder(minilm_path)


def reference(model, torch, windows):
  """Mean of the last hidden states over all windows of one text, normalised; float32 [D]."""
  total = 0
  for ids in windows:
    with torch.no_grad():
      total = total + model(torch.tensor([ids])).last_hidden_state[0].sum(0)
  return (total / total.norm()).numpy()


def test_equals_transformers_on_the_real_weights(minilm, minilm_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = transformers.BertModel.from_pretrained(minilm_path).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
  got = minilm.encode(TEXTS, batch=4)
  assert got.shape == (4, 384)
  assert got.dtype == np.float32
  for text, vector in zip(TEXTS, got, strict=True):
    # The reference's own tokenizer would read '[SEP]' in a text as the control token.
    ids = tokenizer(text.replace('[SEP]', '[ SEP ]')).input_ids
    assert np.abs(vector - reference(model, torch, [ids])).max() < 1e-4
    assert minilm.count_tokens(text) == len(ids)


def test_equals_transformers_on_a_random_tiny_model(tmp_path, minilm_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=30522, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=40, initializer_range=0.3,
  )  # fmt: skip
  model = transformers.BertModel(config).eval()
  model.save_pretrained(tmp_path)
  shutil.copy(minilm_path / 'tokenizer.json', tmp_path)
  ours = load_encoder(tmp_path)
  assert ours.config.window == 40  # no sentence_bert_config.json: bounded by the positions
  tokens = np.random.default_rng(0).integers(0, 30522, (3, 32)).astype(np.int32)
  mask = np.arange(32) < np.array([[32], [7], [1]])
  got = encoder_lib.hidden_states(ours.graphdef, ours.state, tokens, mask)
  with torch.no_grad():
    want = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state
  assert np.abs(np.asarray(got) - want.numpy())[mask].max() < 1e-4


def test_long_texts_are_split_and_pooled(minilm, minilm_path):
  text = ' '.join(f'shelf {i} holds a cup' for i in range(130))
  windows = minilm._windows(text)
  sizes = [len(w) for w in windows]
  assert len(windows) == 3
  assert max(sizes) <= 256
  assert max(sizes) - min(sizes) <= 1
  inner = [i for w in windows for i in w[1:-1]]
  assert inner == minilm._tokenizer.encode(text, add_special_tokens=False).ids
  assert minilm.count_tokens(text) == sum(sizes)
  # The end of the text matters: nothing is cut.
  a, b = minilm.encode([text, text + ' and the zebra sleeps'])
  assert np.abs(a - b).max() > 1e-4
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = transformers.BertModel.from_pretrained(minilm_path).eval()
  assert np.abs(a - reference(model, torch, windows)).max() < 1e-4


def test_rows_are_independent_and_few_programs_compile(minilm):
  before = encoder_lib._sums._cache_size()
  alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
  together = minilm.encode(TEXTS * 5, batch=16)
  assert np.abs(np.tile(alone, (5, 1)) - together).max() < 1e-5
  assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
  minilm.encode([t + ' again' for t in TEXTS * 3], batch=16)
  assert encoder_lib._sums._cache_size() - before <= 6
  assert minilm.encode([]).shape == (0, 384)


def test_bad_folders(tmp_path, minilm_path):
  with pytest.raises(UserError, match=r'config\.json is missing'):
    load_encoder(tmp_path)
  for name in ('config.json', 'tokenizer.json', 'model.safetensors'):
    shutil.copy(minilm_path / name, tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | {'model_type': 'gpt2'}))
  with pytest.raises(UserError, match="'gpt2'"):
    load_encoder(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(config | {'intermediate_size': 8}))
  with pytest.raises(UserError, match='has shape'):
    load_encoder(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(config))
  weights = (tmp_path / 'model.safetensors').read_bytes()
  (tmp_path / 'model.safetensors').write_bytes(weights[: len(weights) // 2])
  with pytest.raises(UserError, match='truncated'):
    load_encoder(tmp_path)


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_same_vectors(minilm, minilm_path):
  mesh = sharding.make_mesh(data=4, tensor=2)
  spread = load_encoder(minilm_path, mesh=mesh)
  got = spread.encode(TEXTS[:3], batch=4)
  np.testing.assert_allclose(got, minilm.encode(TEXTS[:3], batch=4), atol=1e-5)
  weight = jax.tree.leaves(spread.state)[0]
  assert len(weight.sharding.device_set) == 8
