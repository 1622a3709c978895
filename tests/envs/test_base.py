"""One's own environment by name: what is loaded, and what is told where it cannot be."""

import pytest

import rollout
from configs import rollout as config_lib
from data import errors
from envs import base

_MODULE = '''
from envs.base import StepResult, Task

class Suite:
  name, splits, action_templates = 'doors', ('train',), ['go']
  def __init__(self, doors=2, seed=0, data='generated'):
    self.doors, self.seed, self.data = doors, seed, data
  def tasks(self, split):
    return [Task(f'{split}/{i}', 'doors', split, 'go', 'go.', {}) for i in range(self.doors)]
  def make(self, task):
    raise NotImplementedError

def bare():
  return Suite(doors=1)

class NoSuite:
  name = 'half'

level = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / 'my_doors.py').write_text(_MODULE)
  (tmp_path / 'my_broken.py').write_text('import no_such_package_at_all\n')
  monkeypatch.syspath_prepend(tmp_path)


def suite(**values):
  return rollout.make_suite(config_lib.make({'split': 'train', **values}))


def test_an_own_suite_gets_the_options_that_it_takes(module):
  made = suite(env='my_doors:Suite', env_options='doors:5', env_seed=7, data='somewhere')
  assert (made.doors, made.seed, made.data) == (5, 7, 'somewhere')
  assert len(made.tasks('train')) == 5
  assert suite(env='my_doors:bare', env_seed=7).doors == 1  # it takes no seed and needs none


@pytest.mark.parametrize('values, words', [
  ({'env': 'doors'},
   "Unknown environment 'doors'; there is household, webshop, scienceworld, or your own as"),
  ({'env': 'my_doors:'}, 'MODULE:NAME'),
  ({'env': 'no_doors:Suite'}, 'there is no module no_doors'),
  ({'env': 'my_doors.inner:Suite'}, r'no module my_doors\.inner'),
  ({'env': 'my_doors:Suit'}, 'has no class or function Suit; it has Suite'),
  ({'env': 'my_doors:level'}, 'has no class or function level'),
  ({'env': 'my_doors:NoSuite'}, 'a NoSuite has no splits, action_templates, tasks, make'),
  ({'env': 'my_doors:Suite', 'env_options': 'door:5'}, "Unknown option 'door'.* near: doors"),
  ({'env': 'my_doors:bare', 'env_options': 'doors:5'}, 'it takes none'),
  ({'env': 'my_doors:bare', 'data': '/games'}, 'takes no data'),
  ({'env': 'my_doors:Suite', 'skills': 'loop'}, 'skills=loop is for env=household'),
  ({'env': 'my_doors:Suite', 'task_types': 'a'}, 'task_types=a is for env=household'),
  ({'env': 'my_doors:Suite', 'agent': 'expert'}, 'need a scripted expert'),
  ({'env': 'my_doors:Suite', 'few_shots': 2}, 'need a scripted expert'),
])
def test_what_cannot_be_made_is_told_in_a_sentence(module, values, words):
  with pytest.raises(errors.UserError, match=words):
    suite(**values)


def test_a_mistake_inside_an_own_module_keeps_its_traceback(module):
  with pytest.raises(ModuleNotFoundError, match='no_such_package_at_all'):
    suite(env='my_broken:Suite')


def test_the_household_takes_its_own_options_only():
  with pytest.raises(errors.UserError, match='near: num_things'):
    base.get_suite('household', num_thing=3)


def test_rules_are_nothing_where_a_suite_has_none(module):
  own = suite(env='my_doors:Suite')
  assert base.rules_of(own, own.tasks('train')[0]) == ()
  house = base.get_suite('household', skills='loop', num_train=1)
  assert base.rules_of(house, house.tasks('train')[0])
