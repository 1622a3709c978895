"""The measurements of WebShop on real products, here on a small generated catalogue."""

import json
import subprocess
import sys

import pytest

from envs import webshop, webshop_reward
from experiments.bench import env_rows
from experiments.bench import webshop as bench


@pytest.fixture(scope='module')
def suite():
  return webshop.WebShopSuite(num_products=60)


def test_the_same_tagger_changes_nothing_and_another_one_does(suite):
  same = bench.tagger_row(suite, webshop_reward.nouns)
  assert same['r_type_differs'] == same['reward_change_mean'] == same['reward_change_max'] == 0
  # Without nouns nothing is known to be another kind of product.
  none = bench.tagger_row(suite, bench.none)
  assert same['n'] == none['n'] > 300 and none['r_type_differs'] > 0.1
  assert none['ci95'][0] < none['r_type_differs'] < none['ci95'][1]
  assert 0 < none['reward_change_mean'] <= none['reward_change_max'] <= 1


def test_rows_are_of_all_goals(suite):
  goals = sum(len(suite.tasks(split)) for split in suite.splits)
  one = bench.expert_row(suite, max_steps=1)
  # In one step nothing can be bought.
  assert (one['n'], one['success_rate'], one['score_mean']) == (goals, 0.0, 0.0)
  row = bench.expert_row(suite, max_steps=15)
  assert row['success_rate'] > 0.9 and row['steps_per_cpu_s'] > 100 and row['steps_mean'] > 3
  category = bench.category_row(suite)
  assert category['n'] == len(suite.tasks('test')) + len(suite.tasks('valid'))
  assert 0.5 < category['accuracy'] <= 1


@pytest.mark.slow
def test_a_run_is_written_and_bad_input_is_a_sentence(tmp_path):
  env_rows.write_catalogue(tmp_path / 'shop', 40)
  command = [sys.executable, '-m', 'experiments.bench.webshop', f'--out={tmp_path / "out.json"}']
  done = subprocess.run(
    [*command, f'--data={tmp_path / "shop"}'], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / 'out.json').read_text())
  assert record['products'] == 40 and 0 < record['load_s'] < 60
  assert 'nouns by no word' in done.stdout
  for flag, words in (
      ('--data=nowhere', 'are not there'), ('--spacy_model=none', '--spacy_model=none cannot be')):
    data = [] if flag.startswith('--data') else [f'--data={tmp_path / "shop"}']
    done = subprocess.run([*command, *data, flag], capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and 'Traceback' not in done.stderr
