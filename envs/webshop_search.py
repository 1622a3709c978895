"""WebShop's search: BM25 as Lucene computes it, over the fields that the original indexes.

Text is taken apart as Lucene's English analyser does: words by Unicode's rules for word boundaries,
possessives and capitals removed, stop words left out, Porter's stems.
"""

from __future__ import annotations

import functools
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

import bm25s
import numpy as np
import Stemmer

from envs.webshop_catalogue import Product

# It tells of every index that it builds.
logging.getLogger('bm25s').setLevel(logging.WARNING)
RESULTS = 50
K1, B = 0.9, 0.4
_STOP_WORDS = '''
a an and are as at be but by for if in into is it no not of on or such that the their then there
these they this to was will with
'''
STOP_WORDS = frozenset(_STOP_WORDS.split())
# Unicode's word boundaries (UAX 29) for what occurs in titles: an apostrophe or a dot joins
# letters, a comma or a dot joins digits, an underscore joins anything.
_WORD = re.compile(
  r"\w+(?:(?:(?<=[^\W\d_])['’.:·](?=[^\W\d_])|(?<=\d)[.,;'’](?=\d))\w+)*")
_POSSESSIVE = re.compile(r"['’][sS]$")
_stemmer = Stemmer.Stemmer('porter')


@functools.lru_cache(maxsize=200_000)
def _stem(word: str) -> str:
  """As Lucene's Porter stemmer, which leaves words of one and two letters as they are."""
  return _stemmer.stemWord(word) if len(word) > 2 else word


def analyse(text: str) -> list[str]:
  """The terms of a text or a query."""
  words = (_POSSESSIVE.sub('', word).lower() for word in _WORD.findall(text))
  return [_stem(word) for word in words if word and word not in STOP_WORDS]


def document(product: Product) -> str:
  """What is searched of a product: title, description, first feature and options."""
  options = ', and '.join(
    f'{name}: {", ".join(values)}' for name, values in product.options.items())
  bullet = product.bullets[0] if product.bullets else ''
  return ' '.join([product.title, product.description, bullet, options]).lower()


class SearchIndex:
  """BM25 over products, in their order."""

  def __init__(self, scorer: bm25s.BM25 | None, size: int):
    self._scorer, self._size = scorer, size

  @classmethod
  def build(cls, products: Iterable[Product]) -> SearchIndex:
    """Indexes products; all terms are in memory as numbers while it works."""
    vocabulary: dict[str, int] = {}
    ids = [
      np.fromiter(
        (vocabulary.setdefault(term, len(vocabulary)) for term in analyse(document(product))),
        np.int32) for product in products]
    if not vocabulary:
      return cls(None, len(ids))
    scorer = bm25s.BM25(method='lucene', k1=K1, b=B)
    scorer.index((ids, vocabulary), show_progress=False)
    return cls(scorer, len(ids))

  def save(self, folder: pathlib.Path) -> None:
    self._scorer.save(str(folder))
    (folder / 'size.json').write_text(json.dumps(self._size))

  @classmethod
  def load(cls, folder: pathlib.Path) -> SearchIndex:
    """Opens a saved index memory-mapped."""
    scorer = bm25s.BM25.load(str(folder), mmap=True)
    return cls(scorer, json.loads((folder / 'size.json').read_text()))

  def search(self, query: str, count: int = RESULTS) -> list[int]:
    """Places of the best products, best first; of equal scores the earlier one, as in Lucene.

    Products that share no term with the query are not results.
    """
    if self._scorer is None:
      return []
    terms = [term for term in analyse(query) if term in self._scorer.vocab_dict]
    if not terms:
      return []
    scores = self._scorer.get_scores(terms)
    found = np.flatnonzero(scores > 0)
    if len(found) > count:
      # All that reach the last place's score stay, so that ties are decided by place.
      least = np.partition(scores[found], -count)[-count]
      found = found[scores[found] >= least]
    return found[np.argsort(-scores[found], kind='stable')][:count].tolist()


def open_index(products: Sequence[Product], folder: pathlib.Path | None) -> SearchIndex:
  """The index of a catalogue: built in memory, or built once in `folder` and opened there."""
  if folder is None:
    return SearchIndex.build(products)
  target = folder / 'index'
  if not (target / 'size.json').exists():
    index = SearchIndex.build(products)
    target.mkdir(exist_ok=True)
    index.save(target)
  return SearchIndex.load(target)
