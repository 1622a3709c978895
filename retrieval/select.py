"""Which k hints a task gets: once, at the start of its episode (paper A, section 3, step 3).

Four methods over the hints of the task's own type:
  minilm  sentence embeddings of instruction and first observation, inner product, ScaNN;
  bm25    the same words against the words of the hints;
  fixed   the most frequent hints of the type, the same for every task;
  random  hints of the type drawn at random, seeded per task.
`fixed` and `random` are the controls that show whether retrieval conditions on anything.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data import errors
from retrieval import embed
from retrieval import hints as hints_lib
from retrieval import index as index_lib

METHODS = ('minilm', 'bm25', 'fixed', 'random')

# Share of the instruction: score = w * s(instruction, hint) + (1 - w) * s(first observation, hint).
# The observation names every appliance of the house, and embedded in one text with the instruction
# it drowns the one word that tells which hint is wanted. The hint about the asked state is among
# the first 3 of 32 (24 rules, 8 of procedure; 288 queries, MiniLM): one text 0.83, w = 0.5 0.90,
# 0.7 0.98, 0.8 0.99, 0.9 1.00, 1.0 1.00; first of 32: 0.64, 0.74, 0.88, 0.92, 0.93, 0.93.
INSTRUCTION_WEIGHT = 0.9


@dataclasses.dataclass(frozen=True)
class Query:
  """What is known when the hints are chosen.

  Attributes:
    instruction: the task sentence, e.g. 'Your task is to: make a glazed mug.'
    observation: the first observation, whole; nothing of it is ever cut away.
    task_type: hints of this type only.
    task_id: the task instance; seeds `random` and is what leave-one-out leaves out.
  """

  instruction: str
  observation: str
  task_type: str
  task_id: str


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """One chosen hint; `score` is comparable within one method only."""

  id: str
  score: float
  text: str


@dataclasses.dataclass(frozen=True)
class Selection:
  """The hints for one task, best first.

  Attributes:
    hints: at most k; fewer where the type has fewer.
    retrieval_tokens: tokens that the encoder read to choose them (0 for methods without one).
  """

  hints: tuple[Retrieved, ...]
  retrieval_tokens: int


class HintIndex:
  """A bank made searchable: vectors and BM25 per task type, built when first asked for."""

  def __init__(
    self,
    bank: hints_lib.HintBank,
    encoder: Any = None,
    *,
    vectors_path: str | os.PathLike | None = None,
    instruction_weight: float = INSTRUCTION_WEIGHT,
  ):
    """Takes a bank.

    Args:
      bank: the hints.
      encoder: sentence encoder as in `embed.TextEmbedder`; only 'minilm' needs one.
      vectors_path: .npz file that keeps the vectors of the hints.
      instruction_weight: w of the score, between 0 and 1.
    """
    self.bank = bank
    self.instruction_weight = instruction_weight
    self._embedder = None
    if encoder is not None:
      self._embedder = embed.TextEmbedder(encoder, vectors_path)
      # Queries are not kept in the bank's file.
      self._query_embedder = embed.TextEmbedder(encoder)
    self._hints = {t: bank.of_type(t) for t in bank.task_types}
    self._vectors: dict[str, index_lib.VectorIndex] = {}
    self._bm25: dict[str, Any] = {}

  def hints(self, task_type: str) -> list[hints_lib.Hint]:
    return self._hints.get(task_type, [])

  def vectors(self, task_type: str) -> index_lib.VectorIndex:
    """The index over the embedded hints of a type."""
    if task_type not in self._vectors:
      texts = [h.text for h in self.hints(task_type)]
      self._vectors[task_type] = index_lib.VectorIndex.build(self._embedder(texts))
      self._embedder.save()
    return self._vectors[task_type]

  def bm25(self, task_type: str) -> Any:
    """BM25 over the words of the hints themselves (not of their type's name)."""
    if task_type not in self._bm25:
      import bm25s
      scorer = bm25s.BM25(method='lucene')
      scorer.index([_words(h.text) for h in self.hints(task_type)], show_progress=False)
      self._bm25[task_type] = scorer
    return self._bm25[task_type]

  def embed_queries(self, queries: Sequence[Query]) -> tuple[np.ndarray, list[int]]:
    """One vector per query and the tokens that the encoder read for it.

    The weighted sum of two inner products is the inner product with the weighted sum, so one search
    with an unnormalised vector gives the score of `INSTRUCTION_WEIGHT`'s comment exactly.

    Returns:
      float32 [Q, D] and Q counts.
    """
    instructions = self._query_embedder([q.instruction for q in queries])
    observations = self._query_embedder([q.observation for q in queries])
    weight = np.float32(self.instruction_weight)
    tokens = [
      self._query_embedder.count_tokens(q.instruction)
      + self._query_embedder.count_tokens(q.observation) for q in queries]
    return weight * instructions + (1 - weight) * observations, tokens

  @property
  def has_encoder(self) -> bool:
    return self._embedder is not None


def select(
  query: Query,
  index: HintIndex,
  k: int,
  *,
  method: str = 'minilm',
  seed: int = 0,
  exclude_task_id: str | None = None,
) -> Selection:
  """Chooses the k best hints for one task; see `select_many`."""
  return select_many(
    [query], index, k, method=method, seed=seed, exclude_task_ids=[exclude_task_id])[0]


def select_many(
  queries: Sequence[Query],
  index: HintIndex,
  k: int,
  *,
  method: str = 'minilm',
  seed: int = 0,
  exclude_task_ids: Sequence[str | None] | None = None,
) -> list[Selection]:
  """Chooses the k best hints for every task of a run, embedding all queries in one batch.

  Args:
    queries: Q tasks.
    index: the bank.
    k: hints per task.
    method: one of `METHODS`.
    seed: of `random`; the draw depends on it and on the task id, not on the order of the queries.
    exclude_task_ids: per query a task whose own lessons are left out, or None; a hint is left out
      if that task is its only source. Mandatory where training episodes are retrieved for.

  Returns:
    Q selections.

  Raises:
    errors.UserError: on an unknown method, or 'minilm' without an encoder.
  """
  if method not in METHODS:
    raise errors.UserError(
      f'There is no hint retrieval {method!r}; there are {", ".join(METHODS)}.')
  if method == 'minilm' and not index.has_encoder:
    raise errors.UserError('Hint retrieval minilm needs an encoder; give one or choose bm25.')
  excluded = list(exclude_task_ids) if exclude_task_ids is not None else [None] * len(queries)
  selections: list[Selection | None] = [None] * len(queries)
  by_type: dict[str, list[int]] = {}
  for i, query in enumerate(queries):
    by_type.setdefault(query.task_type, []).append(i)
  for task_type, members in by_type.items():
    hints = index.hints(task_type)
    if not hints or k < 1:
      for i in members:
        selections[i] = Selection((), 0)
      continue
    ranked = _RANKERS[method](index, task_type, [queries[i] for i in members], k, seed, [
      {n for n, h in enumerate(hints) if excluded[i] is not None and h.taught_only_by(excluded[i])}
      for i in members])
    for i, (pairs, tokens) in zip(members, ranked):
      selections[i] = Selection(
        tuple(Retrieved(hints[n].id, float(score), hints[n].text) for n, score in pairs), tokens)
  return selections


def _rank_minilm(index, task_type, queries, k, seed, banned):
  vectors, tokens = index.embed_queries(queries)
  # As many more as may have to be left out, so that leaving out never shortens the answer.
  wanted = k + max(map(len, banned))
  ids, scores = index.vectors(task_type).search(vectors, wanted)
  return [
    ([(n, s) for n, s in zip(row.tolist(), row_scores.tolist()) if n not in out][:k], count)
    for row, row_scores, out, count in zip(ids, scores, banned, tokens)]


def _rank_bm25(index, task_type, queries, k, seed, banned):
  scorer = index.bm25(task_type)
  weight = index.instruction_weight
  answers = []
  for query, out in zip(queries, banned):
    # The observation repeats 'drawer' once per drawer; which words it has is what counts.
    scores = weight * _bm25_scores(scorer, _words(query.instruction))
    scores = scores + (1 - weight) * _bm25_scores(scorer, sorted(set(_words(query.observation))))
    order = [n for n in np.argsort(-scores, kind='stable').tolist() if n not in out]
    answers.append(([(n, float(scores[n])) for n in order[:k]], 0))
  return answers


def _bm25_scores(scorer, words: list[str]) -> np.ndarray:
  """Scores of all hints; bm25s itself fails on a query without words."""
  return scorer.get_scores(words) if words else np.zeros(scorer.scores['num_docs'], np.float32)


def _rank_fixed(index, task_type, queries, k, seed, banned):
  hints = index.hints(task_type)
  return [
    ([(n, float(h.count)) for n, h in enumerate(hints) if n not in out][:k], 0) for out in banned]


def _rank_random(index, task_type, queries, k, seed, banned):
  answers = []
  for query, out in zip(queries, banned):
    digest = hashlib.sha256(f'{seed}\n{query.task_id}'.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], 'big'))
    pool = [n for n in range(len(index.hints(task_type))) if n not in out]
    answers.append(([(pool[i], 0.0) for i in rng.permutation(len(pool))[:k]], 0))
  return answers


_RANKERS = {
  'minilm': _rank_minilm, 'bm25': _rank_bm25, 'fixed': _rank_fixed, 'random': _rank_random}


def _words(text: str) -> list[str]:
  """Lower-case words; a placeholder is its name."""
  return re.findall(r'[a-z0-9]+', text.lower())
