"""WebShop's search: Lucene's analysis by hand, its scores by an own computation of the formula."""

import collections
import itertools
import math

import hypothesis
from hypothesis import strategies as st

from envs import webshop_search
from envs.webshop_search import SearchIndex, analyse
from tests.envs.webshop_products import product


def test_analysis_as_lucene_s_english_one():
  assert analyse("The Women's Running-Shoes") == ['women', 'run', 'shoe']
  assert analyse('10.2 inch, 1,000 mAh (Wi-Fi) U.S. sizes') == [
    '10.2', 'inch', '1,000', 'mah', 'wi', 'fi', 'u.', 'size']
  assert analyse('of and the') == [] == analyse('--- !')
  assert analyse('Crème brûlée 靴') == ['crème', 'brûlée', '靴']


def test_what_is_indexed_of_a_product():
  text = webshop_search.document(product(
    title='Oak Table', description='Made of Oak.', bullets=('First', 'Second'),
    options={'color': ('black', 'white'), 'size': ('s',)}))
  assert text == 'oak table made of oak. first color: black, white, and size: s'


def _lucene_scores(documents, query, k1=0.9, b=0.4):
  """BM25 as Lucene defines it, term by term."""
  counts = [collections.Counter(analyse(text)) for text in documents]
  mean = sum(c.total() for c in counts) / len(counts)
  scores = [0.0] * len(counts)
  for term in analyse(query):
    containing = sum(term in c for c in counts)
    if containing:
      weight = math.log(1 + (len(counts) - containing + 0.5) / (containing + 0.5))
      for i, c in enumerate(counts):
        scores[i] += weight * c[term] / (c[term] + k1 * (1 - b + b * c.total() / mean))
  return scores


_WORDS = st.lists(st.sampled_from(['oak', 'table', 'lamp', 'red', 'chair']), max_size=8)


@hypothesis.given(texts=st.lists(_WORDS, min_size=1, max_size=12), query=_WORDS)
@hypothesis.settings(max_examples=60, deadline=None)
def test_results_are_those_of_the_formula(texts, query):
  texts = [' '.join(words) for words in texts]
  index = SearchIndex.build([product(title=text) for text in texts])
  scores = _lucene_scores(texts, ' '.join(query))
  found = index.search(' '.join(query), 5)
  best = sorted((i for i in range(len(texts)) if scores[i] > 0),
                key=lambda i: (-round(scores[i], 4), i))[:5]
  assert [round(scores[i], 4) for i in found] == [round(scores[i], 4) for i in best]
  # Of the same score the earlier product comes first.
  assert all(a < b for a, b in itertools.pairwise(found) if texts[a].split() == texts[b].split())


def test_a_saved_index_answers_alike(tmp_path):
  products = [product(title=f'{word} table {i}') for i, word in enumerate(['oak', 'steel'] * 20)]
  built = SearchIndex.build(products)
  built.save(tmp_path / 'index')
  loaded = SearchIndex.load(tmp_path / 'index')
  for query in ('oak table', 'steel 7', 'nothing here', ''):
    assert loaded.search(query) == built.search(query)
  assert SearchIndex.build([]).search('oak') == []


def test_words_of_one_and_two_letters_are_no_stems_and_a_lone_s_is_found_by_nothing():
  # Lucene's stemmer leaves them as they are; the library's makes nothing of an s.
  assert analyse('s us XS tv sizes') == ['s', 'us', 'xs', 'tv', 'size']
  index = SearchIndex.build([product(title='Oak table'), product(title='Size XS socks')])
  assert index.search('s') == [] and index.search('s oak') == [0] and index.search('xs') == [1]
