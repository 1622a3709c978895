"""Nearest neighbours by inner product: exact for small banks, tree and quantisation for large.

Axis legend: N keys, Q queries, D embedding width, K neighbours.
"""

import dataclasses
import json
import os
import pathlib

import numpy as np

from data import errors

# ScaNN's own advice (docs/algorithms.md) is to score banks below 20,000 points exhaustively.
EXACT_BELOW = 20_000
_META = 'index.json'
_KEYS = 'keys.npy'
_ASSETS = 'scann'
_RECALL_QUERIES = 200


@dataclasses.dataclass(frozen=True)
class IndexReport:
  """What was built and how close it comes to exact search.

  Attributes:
    kind: 'empty', 'exact' or 'tree_ah'.
    size: number of keys N.
    recall: recall@k against exact search, mean over a sample of the keys as queries.
    recall_k: the k of that recall.
  """

  kind: str
  size: int
  recall: float
  recall_k: int


def exact_search(keys: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Reference search: all inner products, best first, ties by lower id.

  Args:
    keys: float32 [N, D].
    queries: float32 [Q, D].
    k: neighbours wanted; min(k, N) are returned.

  Returns:
    ids int32 [Q, min(k, N)] and scores float32 of the same shape.
  """
  scores = queries.astype(np.float32) @ keys.astype(np.float32).T
  ids = np.argsort(-scores, axis=1, kind='stable')[:, :k].astype(np.int32)
  return ids, np.take_along_axis(scores, ids, axis=1).astype(np.float32)


class VectorIndex:
  """A read-only index over N vectors: ScaNN's, or NumPy's for exact scoring without ScaNN."""

  def __init__(self, keys: np.ndarray, searcher, report: IndexReport):
    self._keys = keys
    self._searcher = searcher
    self.report = report

  @property
  def size(self) -> int:
    return self.report.size

  @classmethod
  def build(
    cls,
    keys: np.ndarray,
    *,
    exact_below: int = EXACT_BELOW,
    leaves_searched: float = 0.2,
    recall_k: int = 10,
  ) -> 'VectorIndex':
    """Builds an index: exact scoring below `exact_below` keys, tree and hashing from there.

    Args:
      keys: float32 [N, D]; N may be 0.
      exact_below: number of keys from which the approximate index is used.
      leaves_searched: share of the tree's leaves that a query visits.
      recall_k: k at which recall against exact search is reported.

    Raises:
      errors.UserError: if the keys are not a finite matrix, or a tree is wanted without ScaNN.
    """
    keys = np.ascontiguousarray(keys, dtype=np.float32)
    if keys.ndim != 2 or not np.isfinite(keys).all():
      raise errors.UserError(
        f'An index needs a finite matrix of keys, not an array of shape {keys.shape}.')
    size = len(keys)
    recall_k = max(1, min(recall_k, size))
    if size == 0:
      return cls(keys, None, IndexReport('empty', 0, 1.0, recall_k))
    kind = 'exact' if size < exact_below else 'tree_ah'
    report = IndexReport(kind, size, 1.0, recall_k)
    index = cls(keys, _searcher(keys, kind, leaves_searched), report)
    index.report = dataclasses.replace(report, recall=index._measure_recall(recall_k))
    return index

  def _measure_recall(self, k: int) -> float:
    sample = np.linspace(0, self.size - 1, min(self.size, _RECALL_QUERIES)).astype(int)
    queries = self._keys[sample]
    found, scores = self.search(queries, k)
    _, exact = exact_search(self._keys, queries, k)
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
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    # ScaNN answers a k beyond the bank with id 0 and NaN.
    k = max(0, min(k, self.size))
    if k == 0 or len(queries) == 0:
      return np.zeros((len(queries), k), np.int32), np.zeros((len(queries), k), np.float32)
    if self._searcher is None:
      return exact_search(self._keys, queries, k)
    ids, scores = self._searcher.search_batched(queries, final_num_neighbors=k)
    ids, scores = np.asarray(ids).astype(np.int32), np.asarray(scores, np.float32)
    if not np.isfinite(scores).all():
      # The visited leaves held fewer than k keys; answering short would be a silent cut.
      return exact_search(self._keys, queries, k)
    order = np.lexsort((ids, -scores), axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the keys, the report and, for a tree, ScaNN's assets with relative paths."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / _KEYS, self._keys)
    if self.report.kind == 'tree_ah':
      (folder / _ASSETS).mkdir(exist_ok=True)
      self._searcher.serialize(str(folder / _ASSETS), relative_path=True)
    # Written last: a folder without it is an index whose writing was interrupted.
    temporary = folder / f'{_META}.tmp'
    temporary.write_text(json.dumps(dataclasses.asdict(self.report), indent=2) + '\n')
    os.replace(temporary, folder / _META)

  @classmethod
  def load(cls, folder: str | os.PathLike) -> 'VectorIndex':
    """Reads what `save` wrote.

    Raises:
      errors.UserError: if the folder holds no complete index, or a tree and ScaNN is missing.
    """
    folder = pathlib.Path(folder)
    try:
      report = IndexReport(**json.loads((folder / _META).read_text()))
      keys = np.load(folder / _KEYS)
      if len(keys) != report.size:
        raise ValueError
    except (OSError, ValueError, TypeError):
      raise errors.UserError(f'{folder} holds no complete index; build it again.') from None
    if report.kind == 'tree_ah':
      searcher = _scann_for_tree(report.size).scann_ops_pybind.load_searcher(str(folder / _ASSETS))
    else:
      searcher = _searcher(keys, report.kind, 1.0)
    return cls(keys, searcher, report)


def _scann():
  """The ScaNN package; None where it is not installed (its wheels are for Linux on x86-64)."""
  # Imported late: ScaNN takes half a second, which commands that never search should not wait for.
  try:
    import scann
  except ImportError:
    return None
  return scann


def _scann_for_tree(size: int):
  scann = _scann()
  if scann is None:
    raise errors.UserError(
      f'A tree over {size} keys needs the package scann, which is not installed; pip install it '
      '(it has wheels for Linux on x86-64), or build the index with exact_below above that number.')
  return scann


def _searcher(keys: np.ndarray, kind: str, leaves_searched: float):
  """Returns a ScaNN searcher over `keys` [N, D]; None where `exact_search` does its work.

  That is an empty bank, and exact scoring on a machine without ScaNN.
  """
  if kind == 'empty':
    return None
  size = len(keys)
  scann = _scann() if kind == 'exact' else _scann_for_tree(size)
  if scann is None:
    return None
  builder = scann.scann_ops_pybind.builder(keys, min(10, size), 'dot_product')
  if kind == 'exact':
    return builder.score_brute_force().build()
  leaves = max(1, round(size**0.5))
  return (
    builder.tree(
      num_leaves=leaves,
      num_leaves_to_search=max(1, round(leaves * leaves_searched)),
      training_sample_size=min(size, 250_000))
    .score_ah(2, anisotropic_quantization_threshold=0.2)
    .reorder(min(size, 200))
    .build())
