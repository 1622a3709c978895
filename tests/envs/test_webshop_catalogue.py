"""WebShop's files: read as they are, broken ones named, in memory and on disk alike."""

import collections
import json

import pytest

from data.errors import UserError
from envs import webshop_catalogue as catalogue
from envs.webshop import WebShopSuite


def _raw(asin, **fields):
  return {
    'asin': asin, 'name': f'Table {asin}', 'full_description': 'Oak.', 'pricing': '$20.00',
    'small_description': ['Solid wood'], 'category': 'garden', 'query': 'Tables ',
    'product_category': 'Home › Tables', 'customization_options': '', 'images': [], **fields}


def _write(folder, products, attributes=None, human=None):
  folder.mkdir(exist_ok=True)
  (folder / 'items_shuffle_1000.json').write_text(json.dumps(products))
  (folder / 'items_ins_v2_1000.json').write_text(json.dumps(attributes or {}))
  if human is not None:
    (folder / 'items_human_ins.json').write_text(json.dumps(human))
  return folder


def test_prices_and_options():
  assert catalogue.parse_prices('$1,234.50') == (1234.5,)
  assert catalogue.parse_prices('$5.99 $10.00 $12.00') == (5.99, 10.0)
  assert catalogue.parse_prices('') == catalogue.parse_prices('call us') == (100.0,)
  assert catalogue.parse_prices(None) == (100.0,)
  options = catalogue.parse_options({
    'Color': [{'value': ' Red/Blue '}], 'Size': None, 'Fit': [{'value': 'Größe 7'}]})
  assert options == {'color': ('red | blue',), 'fit': ('größe 7',)}
  assert catalogue.parse_options('') == {}


def test_what_is_left_out_is_counted(tmp_path):
  folder = _write(tmp_path / 'shop', [
    _raw('B1'), _raw('B1'), _raw('nan'), _raw('B' * 11), _raw('B2', pricing='$5 $9'), 7])
  products, skipped, on_disk = catalogue.load_products(folder)
  assert [p.asin for p in products] == ['B1', 'B2'] and on_disk is None
  assert skipped == {'repeated': 1, 'without a usable id': 3}
  assert 5 <= products[1].price <= 9 and products[1].price_tag == '$5.0 to $9.0'
  assert products[0].query == 'tables' and products[0].attributes == ('DUMMY_ATTR',)


@pytest.mark.parametrize('content, sentence', [
  ('{"a": 1}', 'is not a list of products'),
  ('[{"asin": "B1", "name": "cut', 'ends in the middle'),
  ('[{"asin": "B1"}]', r'product 0 \(B1\) has no'),
  ('', 'is not a list of products'),
  (json.dumps([_raw('B1', name=None)]), r'product 0 \(B1\) has no name'),
  (json.dumps([_raw('B1', query=7)]), r'product 0 \(B1\) has no query'),
  (json.dumps([_raw('B1', customization_options={'size': [7]})]), r'0 \(B1\) has a field that'),
])
def test_a_broken_file_is_named(tmp_path, content, sentence):
  folder = _write(tmp_path / 'shop', [])
  (folder / 'items_shuffle_1000.json').write_text(content)
  with pytest.raises(UserError, match=sentence):
    catalogue.load_products(folder)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(UserError, match='holds no items_shuffle'):
    catalogue.load_products(tmp_path)
  folder = _write(tmp_path / 'shop', [_raw('B1')])
  (folder / 'items_ins_v2_1000.json').unlink()
  with pytest.raises(UserError, match=r'items_ins_v2_1000\.json is missing'):
    catalogue.load_products(folder)


def test_a_stream_in_small_pieces_is_the_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(catalogue, '_CHUNK', 7)
  folder = _write(tmp_path / 'shop', [_raw(f'B{i}', name='Tisch „Größe“ ☃') for i in range(5)])
  found = list(catalogue._stream(folder / 'items_shuffle_1000.json'))
  assert [p['asin'] for p in found] == ['B0', 'B1', 'B2', 'B3', 'B4']
  assert found[4]['name'] == 'Tisch „Größe“ ☃'


def test_on_disk_is_as_in_memory(tmp_path):
  attributes = {f'B{i}': {
    'attributes': ['solid wood'], 'instruction': 'Find me tables',
    'instruction_attributes': ['solid wood']} for i in range(30)}
  folder = _write(tmp_path / 'shop', [
    _raw(f'B{i}', customization_options={'Color': [{'value': 'red'}]}) for i in range(30)],
    attributes, {'B3': [{
      'instruction': 'a table', 'instruction_attributes': ['oak'], 'instruction_options': []}]})
  memory, *_ = catalogue.load_products(folder)
  for _ in range(2):  # made, then opened
    disk, skipped, on_disk = catalogue.load_products(folder, in_memory_bytes=0)
    assert list(disk) == memory and disk[-1] == memory[-1] and disk[2:4] == memory[2:4]
    assert skipped == collections.Counter() and on_disk.parent == folder
  with pytest.raises(IndexError):
    disk[30]


def test_the_real_products(hintsight_data):
  products, skipped, _ = catalogue.load_products(hintsight_data / 'webshop')
  assert len(products) == 1000 and not skipped
  # The prices that the original draws with its seed.
  prices = json.loads((hintsight_data / 'webshop' / 'product_prices_seed42.json').read_text())
  assert {p.asin: p.price for p in products} == pytest.approx(prices)


def test_the_original_s_protocol_needs_its_full_catalogue(hintsight_data):
  suite = WebShopSuite(str(hintsight_data / 'webshop'), goals='human', split_by='goal')
  with pytest.raises(UserError, match='needs 1501 goals'):
    suite.tasks('test')
