"""Texts to vectors, each text once: vectors are kept beside the bank they belong to.

Axis legend: N texts, D embedding width.
"""

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np


class TextEmbedder:
  """A sentence encoder with a memory of what it has read.

  Attributes:
    tokens_read: tokens that the encoder has read so far; texts answered from memory cost none.
  """

  def __init__(
    self, encoder: Any, path: str | os.PathLike | None = None, *, queries: bool = False
  ):
    """Wraps an encoder.

    Args:
      encoder: as `retrieval.encoders` says.
      path: .npz file that keeps the vectors between runs; None keeps them in memory only. Vectors
        of another encoder in it are not used.
      queries: the texts are queries, which some encoders read differently.
    """
    self._encoder = encoder
    self._encode, self._count = encoder.encode, encoder.count_tokens
    if queries:
      self._encode = getattr(encoder, 'encode_queries', encoder.encode)
      self._count = getattr(encoder, 'count_query_tokens', encoder.count_tokens)
    self._path = pathlib.Path(path) if path is not None else None
    self._vectors: dict[str, np.ndarray] = {}
    self.tokens_read = 0
    if self._path is not None and self._path.exists():
      self._load()

  def _load(self) -> None:
    try:
      with np.load(self._path, allow_pickle=False) as stored:
        if str(stored['fingerprint']) == self._encoder.fingerprint:
          self._vectors = dict(zip(stored['keys'].tolist(), stored['vectors']))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
      # A cache is made again from the texts, so a torn one costs time and nothing else.
      print(f'{self._path} is not a readable vector file; the texts are embedded again.')

  def __len__(self) -> int:
    """How many texts are remembered."""
    return len(self._vectors)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds texts, in one batch those that are new.

    Returns:
      float32 [N, D], L2-normalised, in the order of `texts`.
    """
    keys = [_key(text) for text in texts]
    new = {k: t for k, t in zip(keys, texts) if k not in self._vectors}
    if new:
      vectors = np.asarray(self._encode(list(new.values())), np.float32)
      self._vectors.update(zip(new, vectors))
      self.tokens_read += sum(self.count_tokens(t) for t in new.values())
    if not keys:
      return np.zeros((0, 0), np.float32)
    return np.stack([self._vectors[k] for k in keys])

  def count_tokens(self, text: str) -> int:
    """Tokens that the encoder reads for `text`."""
    return self._count(text)

  def save(self) -> None:
    """Writes all vectors to `path`, whole or not at all."""
    if self._path is None or not self._vectors:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    temporary = self._path.with_name(f'{self._path.name}.tmp')
    with open(temporary, 'wb') as f:
      np.savez(
        f, fingerprint=np.asarray(self._encoder.fingerprint), keys=np.asarray(list(self._vectors)),
        vectors=np.stack(list(self._vectors.values())))
    os.replace(temporary, self._path)


def _key(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
