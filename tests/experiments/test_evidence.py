"""The named experiments: that each can start, goes on, and is filed."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import experience_retrieval as experience_config
from configs import from_scratch as scratch_config
from configs import hint_distillation as config_lib
from data import errors
from experiments import (
  evaluation_rows,
  evidence,
  experience_rows,
  from_scratch,
  hint_distillation,
  results_table,
)

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('name', evidence.EXPERIMENTS)
def test_every_experiment_has_a_config_that_is_right(name, tmp_path, monkeypatch):
  monkeypatch.setenv('HINTSIGHT_DATA', str(tmp_path))
  experiment = evidence.EXPERIMENTS[name]
  for other in experiment.after:
    for stage in ('base', 'hints', 'distilled'):
      (tmp_path / other / stage).mkdir(parents=True)
      (tmp_path / other / stage / 'done.json').write_text('{}')
  config = experiment.read_config(tmp_path)
  rows = experience_rows if experiment.method == 'experience_retrieval' else evaluation_rows
  assert {'distilled', 'exprag_lora'} & {row.policy for row in rows.parse(config.evaluate)}


def test_ablations_change_one_factor():
  reference = experience_config.get_config(evidence.EXPERIMENTS['experience_seed0'].config)
  for name, experiment in evidence.EXPERIMENTS.items():
    if not name.startswith('experience_'):
      continue
    config = experience_config.get_config(experiment.config)
    changed = {key for key, value in config.items() if value != reference[key]} - {'evaluate'}
    assert changed <= {'rank', 'alpha'} or len(changed) == 1, name
    assert bool(changed) == (name != 'experience_seed0')


def test_the_seeds_differ_in_nothing_else():
  configs = [config_lib.get_config(evidence.EXPERIMENTS[name].config).to_dict()
             for name in results_table._SEEDS]
  assert [config.pop('seed') for config in configs] == [0, 1, 2]
  for config in configs:
    config.pop('evaluate')
  assert configs[0] == configs[1] == configs[2]
  assert configs[0]['sft_examples'] == 'matched'


def test_a_finished_experiment_is_filed_and_what_it_needs_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(results_table, 'RESULTS', tmp_path / 'results')

  class Loop:
    def __init__(self, config, workdir):
      self.workdir = workdir

    def run(self):
      self.workdir.mkdir()
      (self.workdir / 'summary.json').write_text('{"rows": []}')

  monkeypatch.setattr(hint_distillation, 'Loop', Loop)
  with pytest.raises(errors.UserError, match='run seed0 first'):
    evidence.run('round2', tmp_path, 'a machine')
  evidence.run('seed1', tmp_path, 'a machine')
  filed = json.loads((tmp_path / 'results' / 'hint_distillation_seed1.json').read_text())
  assert filed['measured']['machine'] == 'a machine'
  assert filed['measured']['command'] == 'python -m experiments.evidence --run=seed1'


def test_a_decoder_of_its_own_is_trained_first_and_learns_as_the_loop_plays(tmp_path, monkeypatch):
  experiment, done, filed = evidence.EXPERIMENTS['small'], [], []
  monkeypatch.setattr(results_table, 'file_run', lambda folder, name, **options: filed.append(
    (folder.name, name, options.get('method'))))
  monkeypatch.setattr(from_scratch, 'run', lambda *args: done.append(args))
  loop = type('Loop', (), {
    '__init__': lambda self, config, _: done.append(config), 'run': lambda self: None})
  monkeypatch.setattr(hint_distillation, 'Loop', loop)
  evidence.run('small', tmp_path, 'a machine')
  (lessons, folder), config = done
  assert lessons == scratch_config.get_config(experiment.decoder)
  assert filed == [('scratch', 'small', 'from_scratch'), ('small', 'small', None)]
  assert config.model == str(folder / from_scratch.MODEL_FOLDER) and not config.warm_episodes
  assert {key: config[key] for key in scratch_config._OF_THE_LOOP} == {
    key: lessons[key] for key in scratch_config._OF_THE_LOOP}


def test_a_wrong_name_is_one_sentence(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.evidence', '--run=nothing', '--machine=m',
     f'--workdir={tmp_path}'], cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 1
  assert 'no experiment nothing' in done.stderr and 'Traceback' not in done.stderr
