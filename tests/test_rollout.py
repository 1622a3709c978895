"""The entry point as a user runs it: whole runs, a killed and resumed one, and bad input."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import rollout as rollout_lib
from configs import rollout as config_lib
from data import errors, trajectory
from tests.agents import fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = 'base=random,shrink=true,slots=2,max_context=512,max_new_tokens=8,max_env_steps=3'


def command(workdir, arg, *flags):
  return [sys.executable, 'rollout.py', f'--config=configs/rollout.py:{arg}',
          f'--workdir={workdir}', *flags]


def rollout(workdir, arg, *flags):
  return subprocess.run(
    command(workdir, arg, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300,
    env=environment())


def environment():
  # One device, as a user has it: the eight of conftest.py are for meshes.
  return {**os.environ, 'XLA_FLAGS': '', 'PYTHONUNBUFFERED': '1'}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return fakes.tokenizer_folder(tmp_path_factory.mktemp('rollout') / 'tokenizer')


def check_same(episodes, others):
  """Same conversations; log-probabilities to rounding, which depends on what else is in a batch."""
  others = {episode.id: episode for episode in others}
  assert sorted(e.id for e in episodes) == sorted(others)
  for episode in episodes:
    other = others[episode.id]
    np.testing.assert_allclose(episode.logprobs, other.logprobs, atol=1e-4)
    other.logprobs, other.wall_s = episode.logprobs, episode.wall_s
    assert episode == other


def test_a_killed_run_goes_on_to_the_same_episodes(tmp_path, tokenizer):
  arg = f'{TINY},tokenizer={tokenizer},skills=loop,split=valid_seen,episodes=14,max_calls=4'
  whole = rollout(tmp_path / 'whole', arg)
  assert whole.returncode == 0, whole.stderr
  assert '14 episodes, about ' in whole.stderr and 'success %' in whole.stdout
  summary = json.loads((tmp_path / 'whole' / 'summary.json').read_text())
  row = summary['rows'][0]
  assert row['id'] == 'base' and row['n'] == 14 and sum(row['terminations'].values()) == 14
  assert row['prompt_tokens_mean'] > row['prefilled_tokens_mean'] > 0

  journal = tmp_path / 'killed' / trajectory.JOURNAL_NAME
  with subprocess.Popen(
    command(tmp_path / 'killed', arg), cwd=ROOT, stderr=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL, env=environment()) as process:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
      if journal.exists() and journal.stat().st_size:
        break
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
  kept = trajectory.Journal(journal).ids()
  assert kept
  again = rollout(tmp_path / 'killed', arg, '--config.slots=3')  # speed may differ
  assert again.returncode == 0, again.stderr
  resumed = trajectory.Journal(journal).read()
  assert len(resumed) == 14
  check_same(resumed, trajectory.load_episodes(tmp_path / 'whole'))
  stored = trajectory.read_tfds(tmp_path / 'killed' / trajectory.TFDS_NAME)
  assert {e.id for e in stored} == {e.id for e in resumed}

  other = rollout(tmp_path / 'whole', arg, '--config.seed=3')
  assert other.returncode == 1 and 'seed (there 0, now 3)' in other.stderr
  assert 'Traceback' not in other.stderr


def test_expert_episodes_with_hints_and_few_shots(tmp_path, tokenizer):
  from retrieval import hints
  bank = tmp_path / 'bank.json'
  hints.HintBank([hints.Hint(
    'h1', 'Read the label of the {appliance}.', 'make_state', 1, [], 'rules')]).save(bank)
  done = rollout(
    tmp_path / 'run', 'agent=expert,expert_format=stateact,skills=warm,task_types=make_state,'
    f'split=train,episodes=3,memory=hints,retrieval=fixed,bank={bank},few_shots=1,base=random,'
    f'tokenizer={tokenizer},env_seed=5', '--config.env_options=num_things:2-2')
  assert done.returncode == 0, done.stderr
  episodes = trajectory.load_episodes(tmp_path / 'run')
  assert len(episodes) == 3 and all(e.success and e.agent == 'stateact' for e in episodes)
  kinds = set(episodes[0].kinds.tolist())
  assert {trajectory.KIND['memory'], trajectory.KIND['few_shot']} <= kinds
  assert episodes[0].retrieved[0]['text'].startswith('Read the label')
  assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['rows'][0]['id'] == (
    'expert+hints')


@pytest.mark.parametrize('arg, flags, code, says', [
  ('agent=reakt', (), 1, "no agent format 'reakt'"),
  ('agemt=react', (), 2, 'agent'),
  ('agent=react', ('--config.epsodes=3',), 2, 'episodes'),
  ('memory=hints,bank=/nowhere/bank.json,episodes=1,skills=loop', (), 1, '/nowhere/bank.json'),
])
def test_bad_input_is_one_sentence_on_the_terminal(tmp_path, arg, flags, code, says):
  done = rollout(tmp_path / 'run', arg, *flags)
  assert done.returncode == code, done.stderr
  assert says in done.stderr and 'Traceback' not in done.stderr
  assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1, done.stderr


@pytest.mark.parametrize('arg, says', [
  ('slots=0', 'slots'),
  ('memory=hints', 'bank=FILE'),
  ('memory=dreams', "no memory 'dreams'"),
  ('data=/nowhere', '/nowhere'),
  ('env=chess', 'chess'),
  ('split=test,skills=loop', "no split 'test'"),
  ('model=smollm3', 'smollm2_135m'),
  ('model=qwen25_7b', 'base=FOLDER'),
  ('shrink=true', 'base=random'),
  ('base=/nowhere/model.gguf', '/nowhere/model.gguf'),
  ('adapter=/nowhere/adapter', '/nowhere/adapter'),
  ('layout=paper_c', 'paper_c'),
  ('max_calls=0', 'max_calls'),
  ('env_options=houses', 'key:value'),
  ('env_options=num_thing:3', 'num_things'),
])
def test_bad_input(tmp_path, arg, says):
  if 'data=' not in arg and 'split=' not in arg:
    arg += ',skills=loop,episodes=1'
  with pytest.raises(errors.UserError) as raised:
    rollout_lib.run(config_lib.get_config(arg), tmp_path / 'run')
  assert says in str(raised.value)
  # A command that was wrong leaves nothing behind that would block the right one.
  assert not (tmp_path / 'run').exists()
