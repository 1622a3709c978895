"""Products for the tests of WebShop."""

from envs.webshop_catalogue import Product
from envs.webshop_reward import Goal


def product(asin='B000000001', title='Oak Coffee Table', **fields) -> Product:
  """A product with what a test does not name filled in."""
  return Product(**{
    'asin': asin, 'title': title, 'description': '', 'bullets': ('',), 'category': 'garden',
    'query': 'coffee tables', 'product_category': 'Home › Furniture › Tables', 'prices': (50.0,),
    'price': 50.0, 'options': {}, 'attributes': (), **fields})


def goal(asin='B000000001', **fields) -> Goal:
  return Goal(**{
    'asin': asin, 'instruction': 'Find me a table', 'attributes': ('solid wood',), 'options': (),
    'price_limit': 60.0, **fields})
