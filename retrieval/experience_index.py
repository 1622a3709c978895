"""A bank of experiences made searchable, and kept: vectors and ScaNN, or BM25.

Two ways to ask (arXiv 2603.18272):
  static   the task's sentence against the tasks' sentences;
  dynamic  task and history so far against whole trajectories.

Axis legend: N experiences, Q queries, D embedding width.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data import errors
from data import workdir as workdir_lib
from retrieval import embed, encoders, hint_rules
from retrieval import experience as experience_lib
from retrieval import index as index_lib

QUERIES = ('static', 'dynamic')
# What ranks: an encoder, BM25 over words, or chance, the control of whether retrieval matters.
METHODS = (*encoders.ENCODERS, 'bm25', 'random')
_META = 'experience_index.json'
_REMEMBERED = 10_000  # vectors of queries


def key_text(experience: experience_lib.Experience, query: str) -> str:
  """What a query of that kind is compared with."""
  if query == 'static':
    return hint_rules.bare_instruction(experience.instruction)
  return experience_lib.flat_text(experience.task, experience.turns)


class _DenseKeys:
  """Keys as vectors of an encoder."""

  def __init__(self, encoder: Any, options: dict[str, Any]):
    self.encoder = encoder
    self._texts = embed.TextEmbedder(encoder)
    self._queries = embed.TextEmbedder(encoder, queries=True)
    self.vectors = index_lib.VectorIndex.build(np.zeros((0, 0), np.float32), **options)

  def add(self, texts: Sequence[str]) -> None:
    self.vectors.add(self._texts(texts))

  def search(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    if len(self._queries) > _REMEMBERED:
      # Dynamic queries are never the same again.
      self._queries = embed.TextEmbedder(self.encoder, queries=True)
    ids, scores = self.vectors.search(self._queries(texts), k)
    return ids, scores, [self._queries.count_tokens(text) for text in texts]

  def similarity(self, one: int, others: Sequence[int]) -> np.ndarray:
    keys = self.vectors.keys
    return keys[np.asarray(others, int)] @ keys[one]


class _WordKeys:
  """Keys as bags of words, ranked by BM25 (Lucene's variant)."""

  def __init__(self):
    self._words: list[list[str]] = []
    self._scorer: Any = None

  def add(self, texts: Sequence[str]) -> None:
    import bm25s
    self._words += [_words(text) for text in texts]
    # Its weights are those of the whole collection: a word's worth changes with every text.
    self._scorer = bm25s.BM25(method='lucene')
    self._scorer.index(self._words, show_progress=False)

  def search(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    ids, scores = [], []
    for text in texts:
      words = _words(text)
      found = self._scorer.get_scores(words) if words else np.zeros(len(self._words))
      order = np.argsort(-found, kind='stable')[:k]
      ids.append(order)
      scores.append(found[order])
    return np.asarray(ids, np.int32), np.asarray(scores, np.float32), [0] * len(texts)

  def similarity(self, one: int, others: Sequence[int]) -> np.ndarray:
    own = set(self._words[one])
    sets = [set(self._words[other]) for other in others]
    return np.array([len(own & s) / max(1, len(own | s)) for s in sets], np.float32)


class ExperienceIndex:
  """A bank and its keys; grows with the bank.

  Attributes:
    bank: the experiences; row n of the keys is experience n.
    method: one of `METHODS`.
    query: one of `QUERIES`.
  """

  def __init__(
    self, bank: experience_lib.ExperienceBank, method: str = 'minilm', query: str = 'static',
    encoder: Any = None, **options,
  ):
    """Indexes a bank.

    Args:
      bank: may be empty, and may grow by `add`.
      method: an encoder's name, 'bm25' or 'random'.
      query: 'static' or 'dynamic'.
      encoder: one that is loaded already; None loads the one named.
      **options: of `retrieval.index.IndexOptions`.

    Raises:
      errors.UserError: an unknown method or query, or a recall that is too low.
    """
    check(method, query)
    self.bank, self.method, self.query = bank, method, query
    self._keys: Any = None
    if method == 'bm25':
      self._keys = _WordKeys()
    elif method != 'random':
      self._keys = _DenseKeys(encoder or encoders.load(method), options)
    self._add_keys(bank.experiences)

  @property
  def report(self) -> index_lib.IndexReport:
    """What was built; BM25 and chance score everything."""
    if isinstance(self._keys, _DenseKeys):
      return self._keys.vectors.report
    return index_lib.IndexReport('exact' if len(self.bank) else 'empty', len(self.bank), 1.0, 1)

  def _add_keys(self, experiences: Sequence[experience_lib.Experience]) -> None:
    if self._keys is not None and experiences:
      self._keys.add([key_text(e, self.query) for e in experiences])

  def add(self, experiences: Sequence[experience_lib.Experience]) -> None:
    """Indexes experiences that the bank was just given (`ExperienceBank.add_episodes`)."""
    self._add_keys(experiences)

  def search(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The k nearest of every query.

    Args:
      texts: Q queries.
      k: neighbours wanted.

    Returns:
      ids int [Q, min(k, N)], scores float32 of the same shape, best first, and the tokens that the
      encoder read for each query.
    """
    k = min(k, len(self.bank))
    if not k or not len(texts):
      empty = np.zeros((len(texts), 0), np.int32)
      return empty, empty.astype(np.float32), [0] * len(texts)
    return self._keys.search(texts, k)

  def similarity(self, one: int, others: Sequence[int]) -> np.ndarray:
    """How alike the keys of experiences are, float32 [len(others)]; 1 is the same."""
    if self._keys is None:
      return np.zeros(len(others), np.float32)
    return self._keys.similarity(one, others)

  def save(self, folder: str | os.PathLike) -> None:
    """Keeps the vectors and ScaNN's files; BM25 and chance have nothing that takes time."""
    if not isinstance(self._keys, _DenseKeys):
      return
    folder = pathlib.Path(folder)
    self._keys.vectors.save(folder)
    workdir_lib.write_json(folder / _META, {
      'method': self.method, 'query': self.query, 'encoder': self._keys.encoder.fingerprint,
      'experiences': len(self.bank), 'ids': _ids_digest(self.bank, len(self.bank))})

  @classmethod
  def open(
    cls, folder: str | os.PathLike, bank: experience_lib.ExperienceBank, method: str = 'minilm',
    query: str = 'static', encoder: Any = None, **options,
  ) -> 'ExperienceIndex':
    """Loads the index kept in a folder, adds what the bank has gained since, and keeps that.

    Args:
      folder: of `save`; where it holds no index one is built.
      bank, method, query, encoder, options: as for the constructor.

    Raises:
      errors.UserError: the folder's index is torn, of another encoder or kind of query, or of
        another bank.
    """
    folder = pathlib.Path(folder)
    check(method, query)
    if method in ('bm25', 'random') or not (folder / _META).exists():
      index = cls(bank, method, query, encoder, **options)
      index.save(folder)
      return index
    try:
      meta = json.loads((folder / _META).read_text())
      known, digest = int(meta['experiences']), meta['ids']
      made = (meta['method'], meta['query'], meta['encoder'])
    except (OSError, ValueError, TypeError, KeyError):
      raise errors.UserError(
        f'{folder / _META} is torn; delete {folder} and build the index again.') from None
    vectors = index_lib.VectorIndex.load(folder)
    encoder = encoder or encoders.load(method)
    if vectors.size and vectors.keys.shape[1] != encoder.dim:
      raise errors.UserError(
        f'The index {folder} has keys of width {vectors.keys.shape[1]} and the encoder {method} '
        f'gives {encoder.dim}; use {made[0]}, or delete {folder} to build it again.')
    if made != (method, query, encoder.fingerprint):
      raise errors.UserError(
        f'The index {folder} was built by {made[0]} ({made[2][:12]}) for {made[1]} queries, not by '
        f'{method} ({encoder.fingerprint[:12]}) for {query} ones; delete it to build it again.')
    if known != vectors.size or known > len(bank) or _ids_digest(bank, known) != digest:
      raise errors.UserError(
        f'The index {folder} is of another bank ({known} experiences that are not the first of '
        f"this bank's {len(bank)}); delete it to build it again.")
    index = cls(experience_lib.ExperienceBank(), method, query, encoder, **options)
    index.bank = bank
    index._keys.vectors = vectors
    if known < len(bank):
      index._add_keys(bank.experiences[known:])
      index.save(folder)
    return index


def check(method: str, query: str) -> None:
  """Raises errors.UserError for a method or kind of query that does not exist."""
  if method not in METHODS:
    raise errors.UserError(
      f'There is no experience retrieval {method!r}; there are {", ".join(METHODS)}.')
  if query not in QUERIES:
    raise errors.UserError(f'query is {" or ".join(QUERIES)}, not {query!r}.')


def _ids_digest(bank: experience_lib.ExperienceBank, count: int) -> str:
  ids = json.dumps([e.id for e in bank.experiences[:count]])
  return hashlib.sha256(ids.encode()).hexdigest()


def _words(text: str) -> list[str]:
  return re.findall(r'[a-z0-9]+', text.lower())
