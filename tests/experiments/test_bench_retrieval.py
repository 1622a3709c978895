"""The measurement of retrieval: its keys, its recall, its engines, one small run."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.bench import retrieval as bench
from retrieval import index

_ROOT = pathlib.Path(__file__).parents[2]


def _vectors(count, width=16, seed=0):
  vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_keys_are_the_vectors_and_then_mixtures_of_two():
  vectors = _vectors(5)
  np.testing.assert_array_equal(bench.make_keys(vectors, 3), vectors[:3])
  keys = bench.make_keys(vectors, 200)
  np.testing.assert_array_equal(keys[:5], vectors)
  np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, atol=1e-5)
  # A mixture lies in the plane of two of them: their two best solve it.
  pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
  for key in keys[5:50]:
    left = [np.linalg.lstsq(vectors[list(pair)].T, key, rcond=None)[0] @ vectors[list(pair)] - key
            for pair in pairs]
    assert min(np.abs(rest).max() for rest in left) < 1e-5
  assert len(np.unique(keys, axis=0)) == 200


def test_recall_takes_any_of_equal_keys_and_no_missing_one():
  keys, queries = np.repeat(_vectors(6), 2, axis=0), _vectors(6)
  ids, scores = index.exact_search(keys, queries, 2)
  assert bench.recall(ids, keys, queries, scores[:, -1]) == 1.0
  assert bench.recall(ids ^ 1, keys, queries, scores[:, -1]) == 1.0
  assert bench.recall((ids + 2) % 12, keys, queries, scores[:, -1]) == 0.0
  assert bench.recall(np.full_like(ids, -1), keys, queries, scores[:, -1]) == 0.0


@pytest.mark.parametrize('engine', bench.ENGINES)
def test_every_engine_finds_what_is_near(engine):
  if engine.startswith('faiss') and importlib.util.find_spec('faiss') is None:
    pytest.skip('faiss is not installed')
  keys, queries = _vectors(1500), _vectors(20, seed=1)
  least = index.exact_search(keys, queries, bench.RECALL_K)[1][:, -1]
  row = bench.measure(engine, keys, queries, least)
  assert row['recall'] >= bench.RECALL and min(row['single_per_s'], row['batch_per_s']) > 0
  assert ('leaves_searched' in row) == (engine == 'faiss_ivf')
  line = bench.table({'rows': [{'keys': 1500, 'engine': engine, **row}]}).splitlines()[-1]
  assert '1,500' in line and f'{row["recall"]:.3f}' in line


@pytest.mark.parametrize('split', ['train', 'valid_unseen'])
def test_texts_are_openings_of_different_houses(split):
  texts = bench.opening_texts(3, split)
  assert len(set(texts)) == 3 and all('make a' in text for text in texts)


def test_sizes_without_meaning_are_one_sentence(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.retrieval', '--sizes=1e3,many'],
    cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and 'give numbers of keys' in done.stderr


@pytest.mark.slow
def test_a_small_run(tmp_path):
  out = tmp_path / 'out.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.retrieval', '--sizes=100,300', '--texts=60',
     '--engines=exact,ours', '--episodes=2', f'--out={out}'],
    cwd=_ROOT, capture_output=True, text=True, env=dict(os.environ, JAX_PLATFORMS='cpu'))
  assert done.returncode == 0, done.stderr
  record = json.loads(out.read_text())
  assert [(r['keys'], r['engine']) for r in record['rows']] == [
    (100, 'exact'), (100, 'ours'), (300, 'exact'), (300, 'ours')]
  assert all(row['recall'] == 1.0 for row in record['rows'])
  static = record['static']
  assert static['share'] == pytest.approx(
    (static['encode_s'] + static['search_s']) / static['episode_s'])
  assert 'of an episode' in done.stdout
