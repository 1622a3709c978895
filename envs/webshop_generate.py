"""A generated catalogue: five categories, with attributes, options and prices of their own.

Every attribute of a product is said on one of its pages, so that a shopper can know it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

from envs.webshop_catalogue import Product


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A kind of product: its path below the category, attributes, option names, price in dollars."""

  path: str
  attributes: tuple[str, ...]
  options: tuple[str, ...]
  price: tuple[int, int]


def _kind(path: str, attributes: str, options: str, low: int, high: int) -> _Kind:
  phrases = tuple(' '.join(phrase.split()) for phrase in attributes.split(','))
  return _Kind(path, phrases, tuple(options.split()), (low, high))


_SKIN = """cruelty free, paraben free, fragrance free, sensitive skin, dry skin, long lasting,
travel size, natural ingredients, dermatologist tested"""
_DEVICE = """fast charging, high speed, easy to install, noise cancelling, long lasting,
water resistant, light weight, plug and play, high resolution, heavy duty"""
_CLOTHES = """machine wash, slim fit, quick drying, long sleeve, moisture wicking, stretchy fabric,
hand wash, classic fit, loose fit, polyester spandex"""
_EDIBLE = """gluten free, sugar free, non gmo, plant based, low sodium, dairy free, keto friendly,
individually wrapped, nut free, usda organic"""
_HOME = """easy to assemble, easy to clean, solid wood, space saving, mid century, heavy duty,
storage space, non slip, metal legs, eco friendly"""

_KINDS: Mapping[str, Mapping[str, _Kind]] = {
  'beauty': {
    'lipsticks': _kind('Makeup › Lips', _SKIN, 'color', 5, 40),
    'face creams': _kind('Skin Care › Face', _SKIN, 'size scent', 8, 90),
    'shampoos': _kind('Hair Care › Shampoo', _SKIN, 'size scent', 6, 45),
    'nail polishes': _kind('Foot & Hand Care › Nails', _SKIN, 'color', 4, 20),
    'makeup brushes': _kind('Tools & Accessories › Brushes', _SKIN, 'color set', 7, 60),
    'body lotions': _kind('Skin Care › Body', _SKIN, 'size scent', 6, 50),
    'hair masks': _kind('Hair Care › Treatments', _SKIN, 'size', 9, 60)},
  'electronics': {
    'headphones': _kind('Audio › Headphones', _DEVICE, 'color', 15, 280),
    'phone chargers': _kind('Accessories › Chargers', _DEVICE, 'color length', 6, 60),
    'tablet cases': _kind('Accessories › Cases', _DEVICE, 'color fit', 9, 70),
    'bluetooth speakers': _kind('Audio › Speakers', _DEVICE, 'color', 18, 300),
    'security cameras': _kind('Cameras › Surveillance', _DEVICE, 'set storage', 25, 400),
    'computer keyboards': _kind('Computers › Keyboards', _DEVICE, 'color', 12, 180),
    'hdmi cables': _kind('Accessories › Cables', _DEVICE, 'length', 5, 45)},
  'fashion': {
    "men's shirts": _kind('Men › Shirts', _CLOTHES, 'color size', 12, 80),
    "women's dresses": _kind('Women › Dresses', _CLOTHES, 'color size', 18, 160),
    'running shoes': _kind('Shoes › Athletic', _CLOTHES, 'color shoe', 30, 190),
    'rain jackets': _kind('Outerwear › Jackets', _CLOTHES, 'color size', 25, 220),
    'wool socks': _kind('Accessories › Socks', _CLOTHES, 'color set', 6, 35),
    'yoga pants': _kind('Women › Active', _CLOTHES, 'color size', 14, 95),
    'winter hats': _kind('Accessories › Hats', _CLOTHES, 'color', 8, 50)},
  'food': {
    'protein bars': _kind('Snacks › Bars', _EDIBLE, 'flavor count', 8, 50),
    'green teas': _kind('Beverages › Tea', _EDIBLE, 'flavor count', 5, 40),
    'dried fruits': _kind('Snacks › Fruit', _EDIBLE, 'flavor size', 6, 45),
    'pasta sauces': _kind('Pantry › Sauces', _EDIBLE, 'flavor size', 4, 30),
    'almond milks': _kind('Beverages › Milk', _EDIBLE, 'flavor count', 5, 40),
    'popcorn snacks': _kind('Snacks › Popcorn', _EDIBLE, 'flavor count', 6, 38),
    'granola cereals': _kind('Breakfast › Cereal', _EDIBLE, 'flavor size', 5, 32)},
  'furniture': {
    'coffee tables': _kind('Living Room › Tables', _HOME, 'color', 60, 600),
    'office chairs': _kind('Office › Chairs', _HOME, 'color material', 70, 500),
    'bookcases': _kind('Storage › Shelves', _HOME, 'color tiers', 40, 350),
    'bed frames': _kind('Bedroom › Beds', _HOME, 'color bed', 90, 800),
    'floor lamps': _kind('Lighting › Lamps', _HOME, 'color', 25, 240),
    'shower curtains': _kind('Bath › Curtains', _HOME, 'color size', 12, 60),
    'bar stools': _kind('Dining › Stools', _HOME, 'color material', 45, 320)},
}
# Option -> (its name on the page, values). Some values hide a colour of the reward's list.
_OPTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
  'color': ('color', (
    'black', 'white', 'navy blue', 'rose red', 'olive green', 'charcoal', 'beige', 'mint', 'purple',
    'golden oak', 'coral', 'slate')),
  'size': ('size', ('small', 'medium', 'large', 'x-large', 'xx-large')),
  'scent': ('scent', ('unscented', 'vanilla bean', 'eucalyptus', 'jasmine', 'cedar')),
  'set': ('number of pieces', ('pack of 1', 'pack of 2', 'pack of 4', 'pack of 8')),
  'length': ('length', ('3 feet', '6 feet', '10 feet', '16 feet')),
  'fit': ('fits', ('8 inch', '10.2 inch', '11 inch', '12.9 inch')),
  'storage': ('storage', ('32gb', '64gb', '128gb')),
  'shoe': ('shoe size', ('7', '8', '9', '9.5', '10', '11')),
  'flavor': ('flavor name', (
    'original', 'dark chocolate', 'wild berry', 'peanut butter', 'lemon ginger', 'sea salt')),
  'count': ('count', ('6 count', '12 count', '24 count', '48 count')),
  'material': ('material', ('faux leather', 'linen', 'velvet', 'bamboo')),
  'tiers': ('tiers', ('3 tier', '4 tier', '5 tier')),
  'bed': ('bed size', ('twin', 'full', 'queen', 'king')),
}
_BRANDS = (
  'Aldermoor', 'Brightvale', 'Corvane', 'Duskfield', 'Elmworth', 'Farrow', 'Glenmark', 'Hollis',
  'Ironbay', 'Juniper', 'Kestrel', 'Larkspur', 'Marlowe', 'Northam', 'Oakrest', 'Pinecrest')
_SERIES = (
  'Aura', 'Basin', 'Cinder', 'Delta', 'Ember', 'Fjord', 'Grove', 'Harbor', 'Isle', 'Jetty', 'Kite',
  'Lumen', 'Mesa', 'Nova', 'Orbit', 'Prairie')
_SENTENCES = (
  'It is {}.', 'Made to be {}.', 'You get {}, without compromise.', 'Chosen for being {}.')
_REMARKS = (
  'Ships within two days.', 'A gift for every season.', 'Contact us with any question.',
  'Our best seller of last year.', 'Thirty days to return it.')


def product(seed: int, index: int) -> Product:
  """The product of that index: the same one in a catalogue of any size."""
  rng = random.Random(f'product {seed} {index}')
  category = rng.choice(tuple(_KINDS))
  query = rng.choice(tuple(_KINDS[category]))
  kind = _KINDS[category][query]
  attributes = rng.sample(kind.attributes, rng.randint(2, 5))
  asked = rng.sample(attributes, rng.randint(1, min(3, len(attributes))))
  options = {}
  for option in kind.options:
    name, values = _OPTIONS[option]
    chosen = rng.sample(values, rng.randint(2, min(5, len(values))))
    options[name] = tuple(value for value in values if value in chosen)
  low, high = kind.price
  price = round(rng.uniform(low, high), 2)
  brand, series = rng.choice(_BRANDS), rng.choice(_SERIES)
  title = f'{brand} {query.title()} {series} {rng.randint(100, 999)}, {attributes[0].title()}'
  sentences = [rng.choice(_SENTENCES).format(attribute) for attribute in attributes]
  # Features and description tell an attribute each in turns; the search reads the first feature.
  return Product(
    asin=f'B{seed % 1000:03d}{index:06d}', title=title,
    description=' '.join([f'{brand} has made {query} for years.', *sentences[1::2]]),
    bullets=(' '.join(sentences[::2]), *rng.sample(_REMARKS, 2)), category=category, query=query,
    product_category=f'{category.title()} › {kind.path}', prices=(price,), price=price,
    options=options, attributes=tuple(attributes),
    instruction=f'Find me {", ".join(asked)} {query}', instruction_attributes=tuple(asked))


def products(seed: int, count: int) -> list[Product]:
  """A catalogue of so many products."""
  return [product(seed, index) for index in range(count)]
