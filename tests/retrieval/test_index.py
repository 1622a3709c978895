"""ScaNN against NumPy."""

import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra.numpy import arrays

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


@hypothesis.given(st.data())
def test_exact_search_is_a_full_sort(data):
  keys, queries = (
    data.draw(arrays(np.float32, (data.draw(st.integers(1, rows)), 3), elements=st.sampled_from(
      [-1.0, 0.0, 0.5, 1.0]))) for rows in (12, 90))
  k = data.draw(st.integers(0, 14))
  ids, scores = index_lib.exact_search(keys, queries, k)
  wanted = np.argsort(-(queries @ keys.T), axis=1, kind='stable')[:, :k]
  assert ids.tolist() == wanted.tolist() and ids.dtype == np.int32
  np.testing.assert_array_equal(scores, np.take_along_axis(queries @ keys.T, wanted, axis=1))


def test_equal_keys_come_in_the_order_of_their_ids():
  ids, _ = index_lib.VectorIndex.build(np.repeat(_vectors(1), 5, axis=0)).search(_vectors(1), 5)
  assert ids.tolist() == [[0, 1, 2, 3, 4]]


def test_large_banks_use_a_tree_and_report_their_recall(tmp_path):
  # Clustered, as embeddings are; random directions are the one case that a tree cannot split.
  centres = _vectors(40)
  keys = np.repeat(centres, 60, axis=0) + 0.1 * _vectors(2400, seed=2)
  # ScaNN draws its partition at random: a fifth of 49 leaves finds 0.94 to 1.0, half of them all.
  index = index_lib.VectorIndex.build(keys, exact_below=1000, leaves_searched=0.5)
  assert index.report.kind == 'tree_ah' and index.report.recall > 0.95
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


def test_without_scann_the_same_interface_finds_the_same(tmp_path, monkeypatch):
  keys, queries = _vectors(300), _vectors(70, seed=1)
  index_lib.VectorIndex.build(keys, exact_below=1, leaves_searched=1.0).save(tmp_path / 'tree')
  monkeypatch.setattr(index_lib, '_scann', lambda: None)
  index = index_lib.VectorIndex.build(keys[:30])
  assert index.report == index_lib.IndexReport('exact', 30, 1.0, 10)
  for found, wanted in zip(index.search(queries, 4), index_lib.exact_search(keys[:30], queries, 4)):
    np.testing.assert_array_equal(found, wanted)
  index.save(tmp_path / 'exact')
  loaded = index_lib.VectorIndex.load(tmp_path / 'exact')
  np.testing.assert_array_equal(loaded.search(queries, 4)[0], index.search(queries, 4)[0])
  # Large banks lie on the device; so does a tree that another machine's ScaNN wrote.
  wanted, scores = index_lib.exact_search(keys, queries, 4)
  device = index_lib.VectorIndex.build(keys, exact_below=1)
  for large in (device, index_lib.VectorIndex.load(tmp_path / 'tree')):
    assert large.report.kind == 'approx_max_k' and large.report.recall > 0.95
    found, found_scores = large.search(queries, 4)
    assert np.mean(found == wanted) > 0.95
    np.testing.assert_allclose(found_scores[found == wanted], scores[found == wanted], atol=1e-5)
  device.add(queries[:1])
  assert device.search(queries[:1], 1)[0].tolist() == [[300]]


@pytest.mark.parametrize('exact_below', [1, 10_000])
def test_added_keys_are_found_and_the_old_ones_keep_their_ids(exact_below, monkeypatch):
  keys, new = _vectors(500), _vectors(40, seed=3)
  index = index_lib.VectorIndex.build(keys, exact_below=exact_below, leaves_searched=1.0)
  built = []
  monkeypatch.setattr(index_lib, '_searcher', lambda *args: built.append(args))
  index.add(new)
  assert not built, 'only the new keys are indexed'
  assert index.size == 540 and index.report.recall >= 0.95
  assert index.search(new, 1)[0][:, 0].tolist() == list(range(500, 540))
  assert np.mean(index.search(keys, 1)[0][:, 0] == np.arange(500)) > 0.99


def test_a_bank_that_outgrows_exact_scoring_becomes_a_tree():
  index = index_lib.VectorIndex.build(_vectors(90), exact_below=100, leaves_searched=1.0)
  index.add(_vectors(30, seed=2))
  assert index.report.kind == 'tree_ah' and index.size == 120
  empty = index_lib.VectorIndex.build(np.zeros((0, 0)))
  empty.add(_vectors(3))
  assert empty.search(_vectors(3), 1)[0].tolist() == [[0], [1], [2]]


def test_a_loaded_index_takes_keys(tmp_path):
  index_lib.VectorIndex.build(_vectors(300), exact_below=1, leaves_searched=1.0).save(tmp_path)
  index = index_lib.VectorIndex.load(tmp_path)
  index.add(_vectors(5, seed=4))
  assert index.search(_vectors(5, seed=4), 1)[0][:, 0].tolist() == [300, 301, 302, 303, 304]


def test_a_query_whose_leaves_run_short_is_scored_exactly_and_it_alone():
  class Searcher:
    def search_batched(self, queries, final_num_neighbors):
      ids = np.tile(np.arange(final_num_neighbors, dtype=np.uint32), (len(queries), 1))
      scores = np.full(ids.shape, 7, np.float32)
      ids[1], scores[1, 2:] = 0, np.nan
      return ids, scores

  index = index_lib.VectorIndex.build(_vectors(50))
  index._searcher = Searcher()
  ids, scores = index.search(_vectors(3, seed=1), 4)
  exact_ids, exact_scores = index_lib.exact_search(_vectors(50), _vectors(3, seed=1)[1:2], 4)
  assert ids[1].tolist() == exact_ids[0].tolist() and np.allclose(scores[1], exact_scores[0])
  assert ids[[0, 2]].tolist() == [[0, 1, 2, 3]] * 2 and (scores[[0, 2]] == 7).all()


def test_a_recall_that_is_too_low_says_what_to_raise():
  with pytest.raises(errors.UserError, match=r'raise leaves_searched \(0.02\).*exact_below'):
    index_lib.VectorIndex.build(_vectors(3000), exact_below=1, leaves_searched=0.02)


@pytest.mark.parametrize('name', ['keys.npy', 'scann/dataset.npy', 'scann/hashed_dataset.npy'])
@pytest.mark.parametrize('how', ['short', 'flipped', 'gone'])
def test_torn_files_are_named(tmp_path, name, how):
  index_lib.VectorIndex.build(_vectors(300), exact_below=1, leaves_searched=1.0).save(tmp_path)
  path = tmp_path / name
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(bytes(data) if how == 'flipped' else bytes(data[:-40]))
  if how == 'gone':
    path.unlink()
  with pytest.raises(errors.UserError, match=f'{path.name} is torn.*build the index again'):
    index_lib.VectorIndex.load(tmp_path)


def test_an_index_that_was_being_written_is_none(tmp_path, monkeypatch):
  index = index_lib.VectorIndex.build(_vectors(30))
  index.save(tmp_path)
  monkeypatch.setattr(index_lib.np, 'save', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    index.save(tmp_path)
  with pytest.raises(errors.UserError, match='no complete index'):
    index_lib.VectorIndex.load(tmp_path)


def test_bad_input(tmp_path):
  with pytest.raises(errors.UserError, match='finite matrix'):
    index_lib.VectorIndex.build(np.full((2, 3), np.nan))
  with pytest.raises(errors.UserError, match='no complete index'):
    index_lib.VectorIndex.load(tmp_path / 'nothing')
  index = index_lib.VectorIndex.build(_vectors(4))
  with pytest.raises(errors.UserError, match=r'width 32 and the encoder gives 8'):
    index.search(_vectors(1, 8), 2)
  with pytest.raises(errors.UserError, match=r'width 32 and the encoder gives 8'):
    index.add(_vectors(1, 8))
  with pytest.raises(errors.UserError, match='leaves_searched must lie in'):
    index_lib.VectorIndex.build(_vectors(4), leaves_searched=0.0)
