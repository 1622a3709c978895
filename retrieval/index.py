"""Nearest neighbours by inner product: exact for small banks, tree and quantisation for large.

ScaNN (Guo et al., arXiv 1908.10396) does the work; where it has no wheel, `jax.lax.approx_max_k`
(Chern et al., arXiv 2206.14286) over the keys on the device serves large banks.

Axis legend: N keys, Q queries, D embedding width, K neighbours.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from data import errors
from data import workdir as workdir_lib

# ScaNN's own advice (docs/algorithms.md) is to score banks below 20,000 points exhaustively.
EXACT_BELOW = 20_000
MIN_RECALL = 0.95
_META = 'index.json'
_KEYS = 'keys.npy'
_ASSETS = 'scann'
_RECALL_QUERIES = 200
# Queries that are scored at a time: 64 of them against a million keys are 256 MB.
_BLOCK_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class IndexReport:
  """What was built and how close it comes to exact search.

  Attributes:
    kind: 'empty', 'exact', 'tree_ah' or 'approx_max_k'.
    size: number of keys N.
    recall: recall@k against exact search, mean over a sample of the keys as queries.
    recall_k: the k of that recall.
  """

  kind: str
  size: int
  recall: float
  recall_k: int


@dataclasses.dataclass(frozen=True)
class IndexOptions:
  """How an index is built, and built again when keys are added.

  Attributes:
    exact_below: number of keys from which the approximate index is used.
    leaves_searched: share of the tree's leaves that a query visits.
    reorder: candidates of the quantised scores that are scored again exactly.
    recall_k: k at which recall against exact search is reported.
    min_recall: a lower recall is an error.
  """

  exact_below: int = EXACT_BELOW
  leaves_searched: float = 0.2
  reorder: int = 200
  recall_k: int = 10
  min_recall: float = MIN_RECALL

  def __post_init__(self):
    if not 0 < self.leaves_searched <= 1 or self.reorder < 1 or self.exact_below < 0:
      raise errors.UserError(
        f'leaves_searched must lie in 0..1, not {self.leaves_searched}, and reorder and '
        f'exact_below must be positive, not {self.reorder} and {self.exact_below}.')


def exact_search(keys: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Reference search: all inner products, best first, ties by lower id.

  Args:
    keys: float32 [N, D].
    queries: float32 [Q, D].
    k: neighbours wanted; min(k, N) are returned.

  Returns:
    ids int32 [Q, min(k, N)] and scores float32 of the same shape.
  """
  keys, queries = np.asarray(keys, np.float32), np.asarray(queries, np.float32)
  k = min(k, len(keys))
  ids = np.zeros((len(queries), k), np.int32)
  best = np.zeros((len(queries), k), np.float32)
  for start in range(0, len(queries) if k else 0, _BLOCK_QUERIES):
    for row, scores in enumerate(queries[start:start + _BLOCK_QUERIES] @ keys.T, start):
      # Only what can be among the k is sorted; all that equals the k-th is, so that ties are exact.
      near = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
      ids[row] = near[np.argsort(-scores[near], kind='stable')[:k]]
      best[row] = scores[ids[row]]
  return ids, best


class VectorIndex:
  """An index over N vectors: ScaNN's, or for machines without it NumPy's and JAX's.

  Attributes:
    keys: float32 [N, D].
    options: as it was built.
    report: what was built.
  """

  def __init__(self, keys: np.ndarray, searcher: Any, options: IndexOptions, report: IndexReport):
    self.keys = keys
    self.options = options
    self.report = report
    self._searcher = searcher

  @property
  def size(self) -> int:
    return self.report.size

  @classmethod
  def build(cls, keys: np.ndarray, **options) -> 'VectorIndex':
    """Builds an index: exact scoring below `exact_below` keys, tree and hashing from there.

    Args:
      keys: float32 [N, D]; N may be 0.
      **options: fields of `IndexOptions`.

    Raises:
      errors.UserError: the keys are not a finite matrix, or the recall is too low.
    """
    chosen = IndexOptions(**options)
    keys = _check_keys(keys)
    kind = _kind(len(keys), chosen)
    index = cls(keys, _searcher(keys, kind, chosen), chosen, IndexReport(kind, len(keys), 1.0, 1))
    index._measure()
    return index

  def add(self, keys: np.ndarray) -> None:
    """Appends keys; only they are indexed, unless the bank has outgrown exact scoring.

    Args:
      keys: float32 [M, D].

    Raises:
      errors.UserError: they are not a finite matrix of the index's width, or the recall has become
        too low.
    """
    keys = _check_keys(keys)
    if not len(keys):
      return
    if self.size and keys.shape[1] != self.keys.shape[1]:
      raise errors.UserError(
        f'The index has keys of width {self.keys.shape[1]} and the encoder gives '
        f'{keys.shape[1]}; use the encoder that it was built with, or build it again.')
    before = self.size
    self.keys = np.concatenate([self.keys, keys]) if before else keys
    kind = _kind(len(self.keys), self.options)
    if kind == self.report.kind and hasattr(self._searcher, 'upsert'):
      self._searcher.upsert(
        list(range(before, len(self.keys))), keys, batch_size=min(len(keys), 1000))
    else:
      self._searcher = _searcher(self.keys, kind, self.options)
    self.report = IndexReport(kind, len(self.keys), 1.0, 1)
    self._measure()

  def _measure(self) -> None:
    """Reports the recall; below the least one allowed it is an error that says what to raise."""
    k = max(1, min(self.options.recall_k, self.size))
    recall = self._recall(k) if self.size else 1.0
    self.report = dataclasses.replace(self.report, recall=recall, recall_k=k)
    if recall < self.options.min_recall:
      raise errors.UserError(
        f'The index over {self.size} keys finds {recall:.3f} of the {k} nearest, less than '
        f'{self.options.min_recall}; raise leaves_searched ({self.options.leaves_searched}) or '
        f'reorder ({self.options.reorder}), or raise exact_below above {self.size} to score all.')

  def _recall(self, k: int) -> float:
    sample = np.linspace(0, self.size - 1, min(self.size, _RECALL_QUERIES)).astype(int)
    queries = self.keys[sample]
    _, scores = self.search(queries, k)
    _, exact = exact_search(self.keys, queries, k)
    # Compared by score, not by id: with equal keys in the bank any of them is a right answer.
    hits = [np.sum(row >= best[-1] - 1e-4) / k for row, best in zip(scores, exact)]
    return float(np.mean(hits))

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the keys with the largest inner products.

    Args:
      queries: float32 [Q, D].
      k: neighbours wanted.

    Returns:
      ids int32 [Q, min(k, N)] and scores float32 of the same shape, best first, ties by lower id.

    Raises:
      errors.UserError: the queries have another width than the keys.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    # ScaNN answers a k beyond the bank with id 0 and NaN.
    k = max(0, min(k, self.size))
    if k == 0 or len(queries) == 0:
      return np.zeros((len(queries), k), np.int32), np.zeros((len(queries), k), np.float32)
    if queries.shape[1] != self.keys.shape[1]:
      raise errors.UserError(
        f'The index has keys of width {self.keys.shape[1]} and the encoder gives '
        f'{queries.shape[1]}; use the encoder that it was built with, or build it again.')
    if self._searcher is None:
      return exact_search(self.keys, queries, k)
    found, scores = self._searcher.search_batched(queries, final_num_neighbors=k)
    ids, scores = np.array(found, np.int32), np.array(scores, np.float32)
    if scores.shape != (len(queries), k):
      return exact_search(self.keys, queries, k)
    # Where the visited leaves held fewer than k keys, answering short would be a silent cut. Only
    # those queries are scored exactly: the recall that is measured must be that of the others too.
    short = ~np.isfinite(scores).all(axis=1)
    if short.any():
      ids[short], scores[short] = exact_search(self.keys, queries[short], k)
    order = np.lexsort((ids, -scores), axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes keys, report, checksums and, for a tree, ScaNN's assets with relative paths."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Without its index.json a folder holds no index: nothing half written is ever read.
    (folder / _META).unlink(missing_ok=True)
    np.save(folder / _KEYS, self.keys)
    files = [folder / _KEYS]
    if self.report.kind == 'tree_ah':
      (folder / _ASSETS).mkdir(exist_ok=True)
      self._searcher.serialize(str(folder / _ASSETS), relative_path=True)
      files += sorted((folder / _ASSETS).iterdir())
    workdir_lib.write_json(folder / _META, {
      'report': dataclasses.asdict(self.report), 'options': dataclasses.asdict(self.options),
      'sha256': {str(file.relative_to(folder)): _digest(file) for file in files}})

  @classmethod
  def load(cls, folder: str | os.PathLike) -> 'VectorIndex':
    """Reads what `save` wrote; nothing is built again.

    A tree that ScaNN wrote is searched by approx_max_k on a machine without ScaNN.

    Raises:
      errors.UserError: the folder holds no complete index, or one of its files is torn.
    """
    folder = pathlib.Path(folder)
    try:
      meta = json.loads((folder / _META).read_text())
      report, options = IndexReport(**meta['report']), IndexOptions(**meta['options'])
      digests = dict(meta['sha256'])
    except (OSError, ValueError, TypeError, KeyError):
      raise errors.UserError(f'{folder} holds no complete index; build it again.') from None
    for name, digest in digests.items():
      path = folder / name
      if not path.is_file() or _digest(path) != digest:
        raise errors.UserError(
          f'{path} is torn (missing, or its checksum differs); delete {folder} and build the index '
          'again.')
    keys = np.load(folder / _KEYS)
    if report.kind == 'tree_ah' and _scann() is not None:
      searcher = _scann().scann_ops_pybind.load_searcher(str(folder / _ASSETS))
    else:
      if report.kind == 'tree_ah':
        report = dataclasses.replace(report, kind='approx_max_k')
      searcher = _searcher(keys, report.kind, options)
    return cls(keys, searcher, options, report)


def _check_keys(keys: np.ndarray) -> np.ndarray:
  keys = np.ascontiguousarray(keys, dtype=np.float32)
  if keys.ndim != 2 or not np.isfinite(keys).all():
    raise errors.UserError(
      f'An index needs a finite matrix of keys, not an array of shape {keys.shape}.')
  return keys


def _digest(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _kind(size: int, options: IndexOptions) -> str:
  if size == 0:
    return 'empty'
  if size < options.exact_below:
    return 'exact'
  return 'tree_ah' if _scann() is not None else 'approx_max_k'


@functools.cache
def _import_scann():
  # Imported late: ScaNN takes half a second, which commands that never search should not wait for.
  import scann
  return scann


def _scann():
  """The ScaNN package; None where it is not installed (its wheels are for Linux on x86-64)."""
  try:
    return _import_scann()
  except ImportError:
    return None


class _DeviceSearcher:
  """All keys on the device, and the partial reduction that TPUs do at the speed of the product."""

  def __init__(self, keys: np.ndarray):
    import jax  # what small banks and first checks need not wait for

    def nearest(keys, queries, k):
      scores = jax.numpy.einsum('qd,nd->qn', queries, keys, precision='highest')
      return jax.lax.approx_max_k(scores, k, recall_target=0.99)

    self._keys = jax.numpy.asarray(keys)
    self._nearest = jax.jit(nearest, static_argnames='k')

  def search_batched(
    self, queries: np.ndarray, final_num_neighbors: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [Q, K] and scores float32 [Q, K], best first."""
    parts = [
      self._nearest(self._keys, queries[start:start + _BLOCK_QUERIES], k=final_num_neighbors)
      for start in range(0, len(queries), _BLOCK_QUERIES)]
    scores, ids = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))
    return ids, scores


def _searcher(keys: np.ndarray, kind: str, options: IndexOptions) -> Any:
  """A searcher over `keys` [N, D]; None where `exact_search` does its work.

  That is an empty bank, and exact scoring on a machine without ScaNN.
  """
  if kind == 'approx_max_k':
    return _DeviceSearcher(keys)
  scann = _scann()
  if kind == 'empty' or scann is None:
    return None
  size = len(keys)
  builder = scann.scann_ops_pybind.builder(keys, min(10, size), 'dot_product')
  if kind == 'exact':
    builder = builder.score_brute_force()
  else:
    leaves = max(1, round(size**0.5))
    builder = (
      builder.tree(
        num_leaves=leaves,
        num_leaves_to_search=max(1, round(leaves * options.leaves_searched)),
        training_sample_size=min(size, 250_000))
      .score_ah(2, anisotropic_quantization_threshold=0.2)
      .reorder(min(size, options.reorder)))
  # Keys can be added later only to a searcher whose keys have names.
  return builder.build(docids=list(range(size)))
