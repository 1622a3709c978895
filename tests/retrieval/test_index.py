"""ScaNN against NumPy."""

import shutil
import sys

import numpy as np
import pytest

from data import errors
from retrieval import index as index_lib


def _vectors(count, width=32, seed=0):
  x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize('size', [1, 2, 7, 300])
@pytest.mark.parametrize('k', [1, 3, 400])
def test_small_banks_are_searched_exactly(size, k):
  keys, queries = _vectors(size), 2.5 * _vectors(5, seed=1)
  index = index_lib.VectorIndex.build(keys)
  ids, scores = index.search(queries, k)
  wanted_ids, wanted = index_lib.exact_search(keys, queries, k)
  assert index.report.kind == 'exact' and index.report.recall == 1.0
  assert ids.shape == (5, min(k, size)) and ids.dtype == np.int32
  np.testing.assert_allclose(scores, wanted, atol=1e-5)
  np.testing.assert_array_equal(ids, wanted_ids)


def test_empty_bank_and_no_queries():
  empty = index_lib.VectorIndex.build(np.zeros((0, 8)))
  assert empty.search(_vectors(2, 8), 3)[0].shape == (2, 0)
  assert index_lib.VectorIndex.build(_vectors(4)).search(np.zeros((0, 32)), 2)[0].shape == (0, 2)


def test_equal_keys_come_in_the_order_of_their_ids():
  ids, _ = index_lib.VectorIndex.build(np.repeat(_vectors(1), 5, axis=0)).search(_vectors(1), 5)
  assert ids.tolist() == [[0, 1, 2, 3, 4]]


def test_large_banks_use_a_tree_and_report_their_recall(tmp_path):
  # Clustered, as embeddings are; random directions are the one case that a tree cannot split.
  centres = _vectors(40)
  keys = np.repeat(centres, 60, axis=0) + 0.1 * _vectors(2400, seed=2)
  index = index_lib.VectorIndex.build(keys, exact_below=1000)
  assert index.report.kind == 'tree_ah' and index.report.recall > 0.9
  found, scores = index.search(keys[::100], 10)
  exact, _ = index_lib.exact_search(keys, keys[::100], 10)
  shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist())])
  assert shared > 0.9
  # A saved index works from another place.
  index.save(tmp_path / 'a')
  shutil.move(tmp_path / 'a', tmp_path / 'b')
  again = index_lib.VectorIndex.load(tmp_path / 'b')
  np.testing.assert_array_equal(again.search(keys[::100], 10)[0], found)
  assert again.report == index.report


def test_save_and_load_small(tmp_path):
  for keys in (_vectors(3), np.zeros((0, 4), np.float32)):
    index_lib.VectorIndex.build(keys).save(tmp_path)
    loaded = index_lib.VectorIndex.load(tmp_path)
    queries = _vectors(2, keys.shape[1])
    np.testing.assert_array_equal(
      loaded.search(queries, 2)[0], index_lib.exact_search(keys, queries, 2)[0])


def test_without_scann_small_banks_are_searched_and_large_ones_name_the_package(
    tmp_path, monkeypatch):
  keys, queries = _vectors(30), _vectors(3, seed=1)
  index_lib.VectorIndex.build(keys, exact_below=1).save(tmp_path / 'tree')
  monkeypatch.setitem(sys.modules, 'scann', None)
  index = index_lib.VectorIndex.build(keys)
  assert index.report == index_lib.IndexReport('exact', 30, 1.0, 10)
  for found, wanted in zip(index.search(queries, 4), index_lib.exact_search(keys, queries, 4)):
    np.testing.assert_array_equal(found, wanted)
  index.save(tmp_path / 'exact')
  loaded = index_lib.VectorIndex.load(tmp_path / 'exact')
  np.testing.assert_array_equal(loaded.search(queries, 4)[0], index.search(queries, 4)[0])
  with pytest.raises(errors.UserError, match=r'package scann'):
    index_lib.VectorIndex.build(keys, exact_below=1)
  with pytest.raises(errors.UserError, match=r'package scann'):
    index_lib.VectorIndex.load(tmp_path / 'tree')


def test_bad_input(tmp_path):
  with pytest.raises(errors.UserError, match='finite matrix'):
    index_lib.VectorIndex.build(np.full((2, 3), np.nan))
  with pytest.raises(errors.UserError, match='no complete index'):
    index_lib.VectorIndex.load(tmp_path / 'nothing')
