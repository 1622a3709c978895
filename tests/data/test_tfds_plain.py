"""Data sets open with plain TFDS where nothing of this project and no TensorFlow is at hand."""

import json
import subprocess
import sys

import numpy as np

from data import trajectory
from tests.data.test_trajectory import make_episode

# Run elsewhere, with the folder as its argument: what a reader of ours would write.
PROGRAM = """
import importlib.machinery, json, sys

class Finder(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name.partition('.')[0] in ('tensorflow', 'tf_keras', 'torch', 'jax'):
      return None  # as if it were not installed
    return super().find_spec(name, path, target)

sys.meta_path = [
  Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import tensorflow_datasets as tfds

source = tfds.builder_from_directory(sys.argv[1]).as_data_source()['train']
text = lambda value: value.decode()
episodes = []
for episode in source:
  steps = list(episode['steps'])
  episodes.append({
    'id': text(episode['id']),
    'success': bool(episode['success']),
    'score': float(episode['score']),
    'tokens': episode['tokens'].tolist(),
    'kinds': episode['kinds'].tolist(),
    'logprobs': episode['logprobs'].tolist(),
    'dtypes': [str(episode[name].dtype) for name in ('tokens', 'kinds', 'logprobs')],
    'replies': [text(step['reply']) for step in steps],
    'observations': [text(step['observation']) for step in steps],
    'rewards': [float(step['reward']) for step in steps],
    'first': [bool(step['is_first']) for step in steps],
    'last': [bool(step['is_last']) for step in steps],
    'terminal': [bool(step['is_terminal']) for step in steps],
    'hints': [text(hint) for hint in episode['retrieved']['text']],
  })
modules = [module for module in list(sys.modules.values()) if getattr(module, '__file__', None)]
print(json.dumps({
  'length': len(source),
  'episodes': episodes,
  'modules': sorted(sys.modules),
  'files': [module.__file__ for module in modules],
}))
"""


def test_plain_tfds_reads_what_was_written(tmp_path):
  written = [
    make_episode('e0', num_steps=2, num_tokens=12),
    make_episode('e1', num_steps=0, num_tokens=3, retrieved=[]),
    make_episode('é2', num_steps=3, num_tokens=40, success=False, termination='step_limit'),
  ]
  folder = tmp_path / 'run' / trajectory.TFDS_NAME
  trajectory.write_tfds(written, folder)
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  done = subprocess.run(
    [sys.executable, '-I', '-c', PROGRAM, str(folder)], cwd=elsewhere, capture_output=True,
    text=True)
  assert done.returncode == 0, done.stderr
  read = json.loads(done.stdout.splitlines()[-1])

  root = str(trajectory.__file__).rsplit('/', 2)[0]
  ours = [f for f in read['files'] if f.startswith(f'{root}/') and '/site-packages/' not in f]
  assert not ours
  assert 'tensorflow_datasets' in read['modules'] and 'tensorflow' not in read['modules']

  assert read['length'] == len(written)
  for got, want in zip(read['episodes'], written, strict=True):
    assert (got['id'], got['success'], got['score']) == (want.id, want.success, want.score)
    assert got['dtypes'] == ['int32', 'uint8', 'float32']
    for name in ('tokens', 'kinds', 'logprobs'):
      np.testing.assert_array_equal(got[name], getattr(want, name))
    # RLDS: n replies are n + 1 observations, the last of them alone in its step.
    steps = len(want.steps)
    assert got['replies'] == [step.reply for step in want.steps] + ['']
    assert got['observations'] == [want.instruction, *(step.observation for step in want.steps)]
    assert got['rewards'] == [step.reward for step in want.steps] + [0.0]
    assert got['first'] == [True] + [False] * steps and got['last'] == [False] * steps + [True]
    assert got['terminal'] == [False] * steps + [want.termination == 'success']
    assert got['hints'] == [hint['text'] for hint in want.retrieved]
