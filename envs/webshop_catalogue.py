"""WebShop's products: the official files, read as they are, in memory or on disk.

A folder holds, of either catalogue (the one of 1,000 products, or all 1.18 million):

  items_shuffle_1000.json   or  items_shuffle.json    products
  items_ins_v2_1000.json    or  items_ins_v2.json     attributes and synthetic instructions
  items_human_ins.json                                instructions that people wrote

Normalised as the original does it (Yao et al., arXiv 2207.01206): ids longer than ten characters,
repeated ids and the id 'nan' are left out and counted; a product without a price costs 100 dollars;
of a range of prices one is drawn.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.errors import UserError

PRICE_SEED = 42
DEFAULT_PRICE = 100.0
# Larger product files are converted once to lines on disk and read from there.
IN_MEMORY_BYTES = 64 * 2**20
_CHUNK = 4 * 2**20
_MONEY = re.compile(r'[^\d.]')
_TEXTS = ('name', 'category', 'query', 'product_category')  # what every product has
_PRODUCT_FILES = ('items_shuffle.json', 'items_shuffle_1000.json')


@dataclasses.dataclass(frozen=True)
class Product:
  """One product.

  Attributes:
    asin: its id, ten characters.
    title: as shown.
    description: as shown, may be empty.
    bullets: the features.
    category: 'beauty', 'electronics', 'fashion', 'grocery' or 'garden'.
    query: the search that it was collected by, lower case.
    product_category: a path of categories, parts separated by '›'.
    prices: dollars: one, or the ends of a range.
    price: dollars, what it costs.
    options: name -> values, lower case.
    attributes: hidden words that the reward knows.
    instruction: a synthetic instruction without options and price, or ''.
    instruction_attributes: those that it asks for.
    human: [{'instruction', 'attributes', 'options'}], what people wrote.
  """

  asin: str
  title: str
  description: str
  bullets: tuple[str, ...]
  category: str
  query: str
  product_category: str
  prices: tuple[float, ...]
  price: float
  options: Mapping[str, tuple[str, ...]]
  attributes: tuple[str, ...]
  instruction: str = ''
  instruction_attributes: tuple[str, ...] = ()
  human: tuple[Mapping[str, Any], ...] = ()

  @property
  def price_tag(self) -> str:
    """The price as shown: a range where the product has one."""
    return ' to '.join(f'${price}' for price in self.prices)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, record: Mapping[str, Any]) -> Product:
    fields = dict(record)
    for name in ('bullets', 'prices', 'attributes', 'instruction_attributes', 'human'):
      fields[name] = tuple(fields[name])
    fields['options'] = {name: tuple(values) for name, values in fields['options'].items()}
    return cls(**fields)


# The official files.


def _stream(path: pathlib.Path) -> Iterator[Any]:
  """The elements of a JSON array, one at a time: the file is never whole in memory."""
  decoder, buffer, place = json.JSONDecoder(), '', 0
  with path.open(encoding='utf-8') as file:
    def more() -> bool:
      nonlocal buffer, place
      chunk = file.read(_CHUNK)
      buffer, place = buffer[place:] + chunk, 0
      return bool(chunk)

    more()
    if not buffer.lstrip().startswith('['):
      raise UserError(f'{path} is not a list of products; take the official file.')
    place = buffer.index('[') + 1
    while True:
      while place < len(buffer) and buffer[place] in ' \t\r\n,':
        place += 1
      if place < len(buffer) and buffer[place] == ']':
        return
      try:
        value, place = decoder.raw_decode(buffer, place)
      except json.JSONDecodeError as error:
        # Half of an element, or broken: with all of the file read it is the latter.
        if not more():
          raise UserError(
            f'{path} ends in the middle of a product or is broken ({error.msg}); fetch it again.'
          ) from None
        continue
      yield value


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path} is missing; it belongs beside the products.') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f'{path} cannot be read as JSON ({error}); fetch it again.') from None


def parse_prices(pricing: str | None) -> tuple[float, ...]:
  """Dollars of a price tag such as '$5.99' or '$10.00 $25.00'; the default where there is none."""
  if not pricing:
    return (DEFAULT_PRICE,)
  found = [_MONEY.sub('', part) for part in pricing.split('$')[1:]]
  try:
    prices = tuple(float(part) for part in found if part)[:2]
  except ValueError:
    prices = ()
  return prices or (DEFAULT_PRICE,)


def parse_options(customisation: Any) -> dict[str, tuple[str, ...]]:
  """Options by name; values as the pages show them."""
  if not isinstance(customisation, dict):
    return {}
  return {
    name.lower(): tuple(
      str(value['value']).strip().replace('/', ' | ').lower() for value in values)
    for name, values in customisation.items() if values is not None}


def _product(
  raw: Mapping[str, Any], attributes: Mapping[str, Any], human: Mapping[str, Any],
  rng: random.Random,
) -> Product:
  """Raises KeyError for a field that is missing, others for one of another kind."""
  asin = raw['asin']
  for name in _TEXTS:
    if not isinstance(raw[name], str):
      raise KeyError(name)
  bullets = raw['small_description']
  prices = parse_prices(raw.get('pricing'))
  known = attributes.get(asin, {})
  return Product(
    asin=asin, title=raw['name'], description=raw['full_description'] or '',
    bullets=tuple(bullets) if isinstance(bullets, list) else (bullets or '',),
    category=raw['category'], query=raw['query'].lower().strip(),
    product_category=raw['product_category'], prices=prices,
    price=prices[0] if len(prices) == 1 else rng.uniform(*prices),
    options=parse_options(raw.get('customization_options')),
    # The original's word for none; it matches nothing that a goal asks for.
    attributes=tuple(known.get('attributes', ('DUMMY_ATTR',))),
    instruction=known.get('instruction') or '',
    instruction_attributes=tuple(known.get('instruction_attributes') or ()),
    human=tuple(
      {'instruction': entry['instruction'], 'attributes': entry['instruction_attributes'],
       'options': entry['instruction_options']} for entry in human.get(asin, ())))


def read_products(
  folder: pathlib.Path, path: pathlib.Path, skipped: collections.Counter[str]
) -> Iterator[Product]:
  """The products of the official files, in their order.

  Args:
    folder: holds the other files.
    path: the product file.
    skipped: counts what is left out, by reason.
  """
  small = path.stem.endswith('_1000')
  attributes = _read_json(folder / ('items_ins_v2_1000.json' if small else 'items_ins_v2.json'))
  human_path = folder / 'items_human_ins.json'
  human = _read_json(human_path) if human_path.exists() else {}
  rng, seen = random.Random(PRICE_SEED), set()
  for index, raw in enumerate(_stream(path)):
    asin = raw.get('asin', 'nan') if isinstance(raw, dict) else 'nan'
    if asin == 'nan' or len(asin) > 10:
      skipped['without a usable id'] += 1
    elif asin in seen:
      skipped['repeated'] += 1
    else:
      seen.add(asin)
      try:
        yield _product(raw, attributes, human, rng)
      except KeyError as error:
        raise UserError(
          f'{path}: product {index} ({asin}) has no {error.args[0]}; take the official file.'
        ) from None
      except (AttributeError, TypeError) as error:
        raise UserError(
          f'{path}: product {index} ({asin}) has a field that is of another kind than it has to be '
          f'({error}); take the official file.') from None


def product_file(folder: str | pathlib.Path) -> pathlib.Path:
  """The product file in a folder, the larger one where both are there.

  Raises:
    UserError: there is none.
  """
  for name in _PRODUCT_FILES:
    if (pathlib.Path(folder) / name).is_file():
      return pathlib.Path(folder) / name
  raise UserError(
    f'{folder} holds no {" or ".join(_PRODUCT_FILES)}; give WebShop\'s data folder, or '
    'data=generated.')


# Sequences of products.


class ProductLines(Sequence):
  """Products in a file of JSON lines, read where they are wanted (memory-mapped)."""

  def __init__(self, folder: pathlib.Path):
    self._offsets = np.load(folder / 'offsets.npy', mmap_mode='r')
    with (folder / 'products.jsonl').open('rb') as file:
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(index)
    index %= len(self)
    line = self._map[int(self._offsets[index]):int(self._offsets[index + 1])]
    return Product.from_json(json.loads(line))

  @classmethod
  def write(cls, folder: pathlib.Path, products: Iterator[Product]) -> ProductLines:
    """Writes the products and returns them as they lie on disk."""
    offsets = [0]
    with (folder / 'products.jsonl').open('wb') as file:
      for product in products:
        offsets.append(offsets[-1] + file.write(
          json.dumps(product.to_json(), separators=(',', ':')).encode() + b'\n'))
    np.save(folder / 'offsets.npy', np.array(offsets, np.int64))
    return cls(folder)


def cache_folder(path: pathlib.Path) -> pathlib.Path:
  """Where what is made from a product file lies: beside it, by its size and time of change."""
  stat = path.stat()
  digest = hashlib.sha256(f'{path.name} {stat.st_size} {stat.st_mtime_ns}'.encode()).hexdigest()
  return path.parent / f'.hintsight-{digest[:12]}'


def load_products(
  folder: str | pathlib.Path, *, in_memory_bytes: int = IN_MEMORY_BYTES
) -> tuple[Sequence[Product], collections.Counter[str], pathlib.Path | None]:
  """The products of a data folder.

  Args:
    folder: with the official files.
    in_memory_bytes: larger product files are converted to lines on disk, once.

  Returns:
    (products, what was left out by reason, the folder for an index on disk or None).

  Raises:
    UserError: a file is missing or broken, or the folder cannot be written for a large catalogue.
  """
  folder = pathlib.Path(folder)
  path, skipped = product_file(folder), collections.Counter()
  if path.stat().st_size <= in_memory_bytes:
    return list(read_products(folder, path, skipped)), skipped, None
  cache = cache_folder(path)
  if not (cache / 'skipped.json').exists():
    partial = cache.with_name(f'{cache.name}.{os.getpid()}')
    try:
      partial.mkdir(exist_ok=True)
    except OSError as error:
      raise UserError(
        f'{folder} cannot be written ({error.strerror}), and a catalogue of this size is indexed '
        'there once; copy it to a folder of your own.') from None
    ProductLines.write(partial, read_products(folder, path, skipped))
    (partial / 'skipped.json').write_text(json.dumps(skipped))
    if not cache.exists():
      partial.rename(cache)
  skipped.update(json.loads((cache / 'skipped.json').read_text()))
  return ProductLines(cache), skipped, cache
