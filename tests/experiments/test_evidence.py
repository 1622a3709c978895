"""The named experiments: that each can start, goes on, and is filed."""

import json
import pathlib
import subprocess
import sys

import numpy as np
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
  if experiment.method == 'from_scratch':
    return
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


def test_the_small_decoder_learns_as_the_loop_plays():
  lessons = evidence.EXPERIMENTS['small_decoder'].read_config(_ROOT)
  for name in ('small', 'experience_seed0'):
    config = evidence.EXPERIMENTS[name].read_config(_ROOT)
    assert config.model == scratch_config.PUBLISHED and not config.get('warm_episodes', 0)
    for key in ('agent', 'prompt', 'max_new_tokens', 'max_context'):
      assert config[key] == lessons[key], (name, key)


def test_a_trained_decoder_is_published_and_filed(tmp_path, monkeypatch):
  monkeypatch.setattr(results_table, 'RESULTS', tmp_path / 'results')
  published = []
  monkeypatch.setattr(evidence, 'publish', published.append)

  def run(config, folder):
    folder.mkdir()
    (folder / 'summary.json').write_text(json.dumps({'start_decoder': config.start_decoder}))

  monkeypatch.setattr(from_scratch, 'run', run)
  with pytest.raises(errors.UserError, match='run small_decoder_lines first'):
    evidence.run('small_decoder', tmp_path, 'a machine')
  for name in ('small_decoder_words', 'small_decoder_lines', 'small_decoder'):
    evidence.run(name, tmp_path, 'a machine')
  # Only the finished one, and where it began is told for any machine.
  assert published == [tmp_path / 'small_decoder' / from_scratch.MODEL_FOLDER]
  filed = json.loads((tmp_path / 'results' / 'from_scratch_small_decoder.json').read_text())
  assert filed['start_decoder'] == '${workdir}/../small_decoder_lines/small_decoder'


def test_the_published_decoder_is_the_trained_one_in_bfloat16(tmp_path):
  from models import weights
  source = _ROOT / scratch_config.PUBLISHED
  evidence.publish(source, tmp_path / 'again')
  config, params = weights.load_pretrained(tmp_path / 'again', 'float32')
  _, before = weights.load_pretrained(source, 'float32')
  assert config.num_layers == 4 and params.keys() == before.keys()
  assert all(np.array_equal(params[name], before[name]) for name in params)
  sizes = [path.stat().st_size for path in (tmp_path / 'again').iterdir()]
  assert sum(sizes) < 4.5e6  # It lies in the repository.
  assert (tmp_path / 'again' / 'tokenizer.json').is_file()


def test_a_wrong_name_is_one_sentence(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.evidence', '--run=nothing', '--machine=m',
     f'--workdir={tmp_path}'], cwd=_ROOT, capture_output=True, text=True)
  assert done.returncode == 1
  assert 'no experiment nothing' in done.stderr and 'Traceback' not in done.stderr
