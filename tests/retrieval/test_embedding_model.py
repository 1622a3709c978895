"""The embedding decoder equals `transformers`; long texts are split and pooled, never cut."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from data.errors import UserError
from models import sharding
from retrieval import embed, embedding_model, encoders

TEXTS = [
  'heat some mug and put it in cabinet.',
  '',
  'a <|endoftext|> in a text is text',
  'the shelf holds a plate and a cup ' * 3,
]


def write_tokenizer(folder):
  """Bytes, a few merges, and Qwen's two control tokens."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=['<|endoftext|>', '<|im_end|>'], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  backend.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({
    'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|im_end|>',
    'pad_token': '<|endoftext|>'}))


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """(folder, torch model): a tiny random Qwen3 without a head, as the embedding models are kept."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  folder = tmp_path_factory.mktemp('qwen3')
  torch.manual_seed(0)
  config = transformers.Qwen3Config(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, intermediate_size=48, initializer_range=0.3,
    max_position_embeddings=256, tie_word_embeddings=True)
  model = transformers.Qwen3Model(config).eval()
  model.save_pretrained(folder)
  write_tokenizer(folder)
  return folder, model


@pytest.fixture(scope='module')
def ours(reference):
  return embedding_model.load(reference[0], instruction='find', window=500)


def wanted(model, rows):
  """As the model's authors do it: one batch padded on the left, the last place, normalised."""
  import torch

  width = max(map(len, rows))
  tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
  mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
  with torch.no_grad():
    last = model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, -1]
  return torch.nn.functional.normalize(last).numpy()


def test_equals_transformers(ours, reference):
  backend = tokenizers.Tokenizer.from_file(str(reference[0] / 'tokenizer.json'))
  assert ours.window == 256  # what the model was trained for
  texts = [text for text in TEXTS if '<|' not in text]  # their tokenizer knows control tokens
  for got, prefix in (
    (ours.encode(texts), ''), (ours.encode_queries(texts), 'Instruct: find\nQuery:')):
    assert got.shape == (3, 32) and got.dtype == np.float32
    rows = [[*backend.encode(prefix + text).ids, 0] for text in texts]
    np.testing.assert_allclose(got, wanted(reference[1], rows), atol=1e-5)
  assert ours.count_tokens('') == 1
  assert len(ours._parts(TEXTS[2], '')[0]) > 10, 'no control token but its letters'
  assert ours._parts(TEXTS[2], '')[0].count(0) == 1


def test_a_long_text_is_split_and_pooled(ours, reference):
  text = ' '.join(f'shelf {i} holds a cup' for i in range(90))
  parts = ours._parts(text, '')
  assert len(parts) > 2 and max(map(len, parts)) <= 256
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  assert [i for part in parts for i in part[:-1]] == ours._tokenizer.encode(text)
  vectors = wanted(reference[1], parts) * np.array([[len(part)] for part in parts])
  want = vectors.sum(0) / np.linalg.norm(vectors.sum(0))
  np.testing.assert_allclose(ours.encode([text, ''])[0], want, atol=1e-5)
  assert ours.count_tokens(text) == sum(map(len, parts))
  # Every part of a query is read as a query.
  front = ours._tokenizer.encode('Instruct: find\nQuery:')
  query_parts = ours._parts(text, 'Instruct: find\nQuery:')
  assert all(part[: len(front)] == front for part in query_parts)
  assert ours.count_query_tokens(text) == sum(map(len, query_parts))
  a, b = ours.encode([text, text + ' and the zebra sleeps'])
  assert np.abs(a - b).max() > 1e-4


def test_batched_on_a_mesh_few_programs(ours, reference):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  there = embedding_model.load(reference[0], instruction='find', mesh=mesh)
  assert there.fingerprint == ours.fingerprint
  texts = [f'{text} {i}' for i in range(5) for text in TEXTS]
  before = embedding_model.pooled._cache_size()
  np.testing.assert_allclose(there.encode(texts), ours.encode(texts), atol=1e-5)
  assert embedding_model.pooled._cache_size() - before <= 6
  alone = np.concatenate([ours.encode([text]) for text in texts[:4]])
  np.testing.assert_allclose(ours.encode(texts)[:4], alone, atol=1e-5)


def test_queries_are_embedded_and_counted_as_queries(ours):
  embedder = embed.TextEmbedder(ours, queries=True)
  np.testing.assert_array_equal(embedder(['a mug']), ours.encode_queries(['a mug']))
  assert embedder.count_tokens('a mug') == ours.count_query_tokens('a mug')


def test_bad_folders(ours, reference, tmp_path, monkeypatch):
  monkeypatch.setenv('HINTSIGHT_CACHE', str(tmp_path))
  with pytest.raises(UserError, match=r'put the Hugging Face folder Qwen/Qwen3-Embedding-0\.6B'):
    encoders.load('qwen3_embedding')
  (tmp_path / 'Qwen3-Embedding-0.6B').symlink_to(reference[0])
  model = encoders.load('qwen3_embedding')
  assert model._mesh.size == jax.device_count()
  np.testing.assert_allclose(model.encode(TEXTS[:1]), ours.encode(TEXTS[:1]), atol=1e-5)
  with pytest.raises(UserError, match='more than half of the 16 tokens'):
    embedding_model.load(reference[0], window=16)
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  with pytest.raises(UserError, match="'llama'"):
    embedding_model.load(tmp_path)
