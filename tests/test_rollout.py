"""The entry point as a user runs it: whole runs, a killed and resumed one, and bad input."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest

import rollout as rollout_lib
from agents import policy, shares
from configs import rollout as config_lib
from data import errors, trajectory
from envs import household_files, household_official
from models import decoder, weights
from models.lora import LoraConfig
from tests import programs
from tests.agents import fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent
# float32: its runs are compared token by token, and in bfloat16 a product of many rows may be
# XLA's, and of few a kernel's of our own.
TINY = (
  'base=random,shrink=true,dtype=float32,slots=2,max_context=512,max_new_tokens=8,max_env_steps=3')


def command(workdir, arg, *flags):
  return [sys.executable, 'rollout.py', f'--config=configs/rollout.py:{arg}',
          f'--workdir={workdir}', *flags]


def rollout(workdir, arg, *flags):
  return subprocess.run(
    command(workdir, arg, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300,
    env=programs.environment())


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
    stdout=subprocess.DEVNULL, env=programs.environment()) as process:
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


def expert_config(tokenizer, **values):
  return config_lib.make({
    'agent': 'expert', 'base': 'random', 'tokenizer': str(tokenizer), 'skills': 'loop',
    'split': 'train', 'episodes': 4, 'env_options': 'num_train:4', **values})


def test_a_finished_run_is_shown_again_and_left_alone(tmp_path, tokenizer, monkeypatch, capsys):
  config = expert_config(tokenizer)
  rollout_lib.run(config, tmp_path)
  table = capsys.readouterr().out
  written = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob('*') if p.is_file()}
  monkeypatch.setattr('agents.policy.load_tokenizer', lambda *_: pytest.fail('loaded again'))
  rollout_lib.run(config, tmp_path)
  assert capsys.readouterr().out == table and 'ended by: success 4' in table
  assert written == {
    p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob('*') if p.is_file()}
  monkeypatch.undo()

  # A summary beside a journal that lacks an episode is not the end of the run.
  journal = tmp_path / trajectory.JOURNAL_NAME
  journal.write_bytes(b''.join(journal.read_bytes().splitlines(keepends=True)[:-1]))
  rollout_lib.run(config, tmp_path)
  assert len(trajectory.Journal(journal).read()) == 4


def test_wall_seconds_add_up_over_starts(tmp_path, tokenizer, monkeypatch):
  config = expert_config(tokenizer)
  play = rollout_lib.expert_episodes.expert_episode
  tasks = []

  def stopped(suite, task, *args, **options):
    tasks.append(task)
    if len(tasks) == 3:
      raise KeyboardInterrupt
    return play(suite, task, *args, **options)

  with monkeypatch.context() as patch:
    patch.setattr(rollout_lib.expert_episodes, 'expert_episode', stopped)
    with pytest.raises(KeyboardInterrupt):
      rollout_lib.run(config, tmp_path)
  path = tmp_path / 'counts.json'
  before = json.loads(path.read_text())['wall_s']
  assert 0 < before < 600
  path.write_text(json.dumps({'wall_s': before + 1000}))
  rollout_lib.run(config, tmp_path)
  seconds = json.loads((tmp_path / 'summary.json').read_text())['wall_s']['rollout']
  assert before + 1000 < seconds < before + 1600


def test_counters_are_those_of_all_starts(tmp_path, tokenizer, monkeypatch):
  config = mesh_config(tokenizer, slots=2, slot_groups=2, env_workers=1, share_prefixes=False)
  rollout_lib.run(mesh_config(tokenizer, share_prefixes=False), tmp_path / 'whole')
  append, kept = trajectory.Journal.append, []

  def stopped(journal, episode):
    if len(kept) == 3:
      raise KeyboardInterrupt
    kept.append(episode)
    append(journal, episode)

  with monkeypatch.context() as patch:
    patch.setattr(trajectory.Journal, 'append', stopped)
    with pytest.raises(KeyboardInterrupt):
      rollout_lib.run(config, tmp_path / 'run')
  before = json.loads((tmp_path / 'run' / 'counts.json').read_text())
  rollout_lib.run(config, tmp_path / 'run')
  # Two groups, and the environments in a process of their own, play the same.
  check_same(*(trajectory.load_episodes(tmp_path / name) for name in ('run', 'whole')))
  after, whole = (
    json.loads((tmp_path / name / 'summary.json').read_text()) for name in ('run', 'whole'))
  assert 0 < before['engine']['generated'] < after['engine']['generated']
  # What the stopped start had of episodes that are not kept was played twice.
  for count in ('prefilled', 'generated'):
    assert after['engine'][count] >= whole['engine'][count]
    assert after['engine'][count] - before['engine'][count] < whole['engine'][count]
  assert after['env_workers']['started'] == 2 and before['env_workers']['started'] == 1
  assert after['engine']['padded_share'] < 1


def test_a_corrected_command_is_not_another_config(tmp_path, tokenizer):
  config = expert_config(
    tokenizer, split='valid_seen', episodes=1, task_types='make_state', few_shots=3,
    env_options='num_train:2')
  with pytest.raises(errors.UserError, match='ask for fewer few_shots'):
    rollout_lib.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  with config.unlocked():
    config.few_shots = 2
  rollout_lib.run(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'summary.json').exists()


@pytest.mark.parametrize('context, says', [
  (64, r'first prompt has \d+ tokens .* 8 .*max_context=64.* or more'),
  (9000, r'max_context=9000 .* 8192 positions'),
])
def test_a_context_that_cannot_work(tmp_path, tokenizer, context, says):
  arg = TINY.replace('max_context=512', f'max_context={context}')
  done = rollout(tmp_path / 'run', f'{arg},tokenizer={tokenizer},skills=loop,episodes=2')
  check_one_sentence(done)
  assert re.search(says, done.stderr), done.stderr
  assert not (tmp_path / 'run').exists()


def check_one_sentence(done, code=1):
  assert done.returncode == code, done.stderr
  assert 'Traceback' not in done.stderr
  assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1, done.stderr


def truncated_game(folder):
  game = household_official.official_game(0, 'train', 0)
  path = household_files.write_game(folder, game, ['look']) / household_files.GAME_FILE
  path.write_bytes(path.read_bytes()[:500])
  return f'data={folder},split=train,episodes=1', str(path)


def missing_data(folder):
  return f'data={folder},split=train,episodes=1', f'{folder} holds no'


def file_as_workdir(folder):
  folder.parent.joinpath('run').write_text('notes')
  return 'skills=loop,episodes=1', 'run is a file'


def mamba_weights(folder):
  path = folder.parent / 'mamba.gguf'
  writer = gguf.GGUFWriter(path, 'mamba')
  writer.add_tensor('token_embd.weight', np.zeros((4, 8), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return f'base={path},skills=loop,episodes=1', "mamba.gguf is of architecture 'mamba'"


@pytest.mark.parametrize(
  'prepare', [truncated_game, missing_data, file_as_workdir, mamba_weights])
def test_broken_files_are_one_sentence_on_the_terminal(tmp_path, prepare):
  arg, says = prepare(tmp_path / 'data')
  done = rollout(tmp_path / 'run', arg)
  check_one_sentence(done)
  assert says in done.stderr and not (tmp_path / 'run').is_dir()


@pytest.mark.parametrize('arg, flags, code, says', [
  ('agent=reakt', (), 1, "no agent format 'reakt'"),
  ('agemt=react', (), 2, 'agent'),
  ('agent=react', ('--config.epsodes=3',), 2, 'episodes'),
  ('memory=hints,bank=/nowhere/bank.json,episodes=1,skills=loop', (), 1, '/nowhere/bank.json'),
])
def test_bad_input_is_one_sentence_on_the_terminal(tmp_path, arg, flags, code, says):
  done = rollout(tmp_path / 'run', arg, *flags)
  check_one_sentence(done, code)
  assert says in done.stderr


@pytest.mark.parametrize('arg, says', [
  ('slots=0', 'slots'),
  ('slot_groups=0', 'slot_groups'),
  ('cache_dtype=int4', 'float32, bfloat16 or int8'),
  ('dtype=float16', 'choose auto, bfloat16, float32'),
  ('lookup=-1', 'lookup=-1'),
  ('constrained=true,agent=expert', 'needs another agent'),
  ('constrained=true,agent=stateact', 'more than a command'),
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
  ('max_calls=-1', 'max_calls'),
  ('env_options=houses', 'key:value'),
  ('env_options=num_thing:3', 'num_things'),
  ('env_options=num_train:abc', "num_train must be a whole number from 0 on (0 is all), not 'abc'"),
  ('env_options=num_train:-1', 'num_train must be a whole number from 0 on (0 is all), not -1'),
  ('env_options=num_train:1-2', 'num_train must be'),
  ('env_options=precondition_rate:high', "precondition_rate must be a number in 0..1, not 'high'"),
  ('env_options=task_types:make_stat', "not ['make_stat']"),
  ('env_options=seed:abc', 'seed must be a whole number'),
  ('env_options=data:/nowhere', 'env_options cannot set data'),
  ('env_options=name:household', 'env_options cannot set name'),
])
def test_bad_input(tmp_path, arg, says):
  if 'data=' not in arg and 'split=' not in arg:
    arg += ',skills=loop,episodes=1'
  with pytest.raises(errors.UserError) as raised:
    rollout_lib.run(config_lib.get_config(arg), tmp_path / 'run')
  assert says in str(raised.value)
  # A command that was wrong leaves nothing behind that would block the right one.
  assert not (tmp_path / 'run').exists()


def mesh_config(tokenizer, **values):
  # float32: bfloat16 rounds otherwise on a mesh, or where an adapter is not merged.
  return config_lib.make({
    'base': 'random', 'shrink': True, 'tokenizer': str(tokenizer), 'dtype': 'float32',
    'skills': 'loop', 'slots': 4, 'max_context': 256, 'max_new_tokens': 8, 'max_calls': 3,
    'episodes': 6, **values})


def test_what_it_multiplies_in_is_settled_when_a_run_begins(tmp_path, tokenizer, capsys):
  config = mesh_config(tokenizer, dtype='auto', episodes=1)
  rollout_lib.run(config, tmp_path)
  shown = capsys.readouterr().out
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert stored['dtype'] in ('bfloat16', 'float32') and config.dtype == 'auto'
  # The same command again finds the same config.
  rollout_lib.run(config, tmp_path)
  assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_a_mesh_plays_the_same_greedy_episodes_as_one_device(tmp_path, tokenizer):
  rollout_lib.run(mesh_config(tokenizer), tmp_path / 'one')
  one = trajectory.load_episodes(tmp_path / 'one')
  for mesh in ('4,1,1', '2,2,2', '1,4,2'):
    rollout_lib.run(mesh_config(tokenizer, mesh=mesh), tmp_path / mesh)
    check_same(trajectory.load_episodes(tmp_path / mesh), one)


@pytest.fixture(scope='module')
def adapter(tokenizer, tmp_path_factory):
  """One with an effect, for the model of `mesh_config`."""
  base = policy.load_base(
    'smollm2_135m', 'random', tokenizer=str(tokenizer), shrink=True)
  lora = LoraConfig(4, 64.0)
  rng = np.random.default_rng(0)
  params = {
    name: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    for name, x in decoder.to_params(decoder.abstract(base.config, lora).lora).items()}
  folder = tmp_path_factory.mktemp('adapter') / 'adapter'
  weights.export_peft(folder, base.config, lora, params, 'tiny')
  return folder


def test_adapters_side_by_side_play_what_each_plays_alone(tmp_path, tokenizer, adapter, capsys):
  both = mesh_config(tokenizer, adapters=f'student:{adapter};plain:', episodes=4)
  rollout_lib.run(both, tmp_path / 'both')
  shown = capsys.readouterr().out
  episodes = trajectory.load_episodes(tmp_path / 'both')
  assert [(e.policy, e.task_id) for e in episodes[:2]] == [
    ('student', episodes[0].task_id), ('plain', episodes[0].task_id)]
  alone = mesh_config(tokenizer, adapter=str(adapter), policy='student', episodes=4)
  rollout_lib.run(alone, tmp_path / 'alone')
  own = {name: [e for e in episodes if e.policy == name] for name in ('student', 'plain')}
  replies = [[step.reply for e in played for step in e.steps] for played in own.values()]
  assert replies[0] != replies[1]
  check_same(own['student'], trajectory.load_episodes(tmp_path / 'alone'))

  written = json.loads((tmp_path / 'both' / 'summary.json').read_text())
  assert [(row['id'], row['n']) for row in written['rows']] == [('student', 4), ('plain', 4)]
  (pair,) = written['paired']
  assert (pair['a'], pair['b'], pair['n']) == ('plain', 'student', 4) and len(pair['ci95']) == 2
  assert 'plain - student: ' in shown and 'student ended by: ' in shown
  # A finished run is shown again; one that lacks a game of one policy goes on with that one.
  capsys.readouterr()
  rollout_lib.run(both, tmp_path / 'both')
  assert capsys.readouterr().out == shown
  journal = tmp_path / 'both' / trajectory.JOURNAL_NAME
  journal.write_bytes(b''.join(journal.read_bytes().splitlines(keepends=True)[:-1]))
  rollout_lib.run(both, tmp_path / 'both', share=shares.Share(1, 2))
  rollout_lib.run(both, tmp_path / 'both', share=shares.Share(0, 2))
  again = trajectory.Journal(journal).read()
  assert len(again) == 8
  check_same(again, episodes)


@pytest.mark.parametrize('values, says', [
  ({'adapters': 'a'}, "'a' is not of the form NAME:FOLDER (NAME: alone is the base)"),
  ({'adapters': 'a:'}, 'adapters=a: names one policy'),
  ({'adapters': 'a:;b:'}, 'names the base twice'),
  ({'adapters': 'a:x;a:y'}, "gives the name 'a' to two policies; take another"),
  ({'adapters': 'a:;b:/nowhere'}, '/nowhere is no PEFT adapter folder'),
  ({'adapters': 'a:;b:x', 'adapter': 'y'}, 'and adapter does not go with it'),
  ({'adapters': 'a:;b:x', 'policy': 'y'}, 'and policy does not go with it'),
  ({'adapters': 'a:;b:x', 'agent': 'expert'}, 'and agent=expert does not go with it'),
  ({'adapters': 'a:;b:x', 'grow': 2, 'memory': 'experience'}, 'and grow does not go with it')])
def test_adapters_that_cannot_play_side_by_side_are_one_sentence(
    tmp_path, tokenizer, values, says):
  with pytest.raises(errors.UserError, match=re.escape(says)):
    rollout_lib.run(mesh_config(tokenizer, **values), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('values, says', [
  ({'mesh': '3,1,1'}, 'slots=4 does not divide into the 3 data shards of the mesh.'),
  ({'mesh': '4,1,1', 'slot_groups': 2},
   'slots=4 in 2 groups does not divide into the 4 data shards of the mesh.'),
  ({'mesh': '1,1,4'}, 'tensor=4 of the mesh does not divide the 2 key-value heads'),
  ({'mesh': '64,1,1', 'slots': 64}, 'does not fit 8 devices'),
  ({'mesh': 'two'}, "mesh='two': give three sizes")])
def test_a_mesh_that_does_not_divide_is_one_sentence(tmp_path, tokenizer, values, says):
  with pytest.raises(errors.UserError, match=re.escape(says)):
    rollout_lib.run(mesh_config(tokenizer, **values), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def check_joined(folder, whole):
  """One journal with every episode once, one store, one row, and no parts."""
  episodes = trajectory.Journal(folder / trajectory.JOURNAL_NAME).read()
  assert len(episodes) == len({e.id for e in episodes})
  check_same(episodes, trajectory.load_episodes(whole))
  stored = trajectory.read_tfds(folder / trajectory.TFDS_NAME)
  assert [e.id for e in stored] == [
    e.id for e in trajectory.read_tfds(whole / trajectory.TFDS_NAME)]
  rows = [json.loads((f / 'summary.json').read_text())['rows'] for f in (folder, whole)]
  assert rows[0] == rows[1]
  assert not (folder / 'parts').exists()


def test_several_processes_play_one_run(tmp_path, tokenizer, capsys):
  config = expert_config(tokenizer)
  rollout_lib.run(config, tmp_path / 'whole')
  play = lambda name, *share: rollout_lib.run(
    config, tmp_path / name, share=shares.Share(*share))
  play('two', 1, 2)
  assert not (tmp_path / 'two' / 'summary.json').exists()
  assert 'process 1 of 2 has played its 2 episodes; others are left' in capsys.readouterr().err
  play('two', 0, 2)
  check_joined(tmp_path / 'two', tmp_path / 'whole')
  summary = json.loads((tmp_path / 'two' / 'summary.json').read_text())
  assert len(summary['processes']) == 2
  # Another number of processes goes on, and so does a single one.
  play('three', 0, 2)
  for index in range(3):
    play('three', index, 3)
  check_joined(tmp_path / 'three', tmp_path / 'whole')
  play('one', 0, 4)
  rollout_lib.run(config, tmp_path / 'one')
  check_joined(tmp_path / 'one', tmp_path / 'whole')


def test_a_process_that_is_still_at_work_is_waited_for(tmp_path, tokenizer):
  config = expert_config(tokenizer)
  playing = shares.Playing(tmp_path / 'parts' / '1')
  with pytest.raises(errors.UserError, match='parts/1 is being played by another process'):
    rollout_lib.run(config, tmp_path, share=shares.Share(1, 2))
  with pytest.raises(errors.UserError, match='parts/1 is being played by another process'):
    rollout_lib.run(config, tmp_path)
  playing.end()
  rollout_lib.run(config, tmp_path, share=shares.Share(1, 2))
  # All episodes are there, and another process has not said yet that it is ready.
  late = shares.Playing(tmp_path / 'parts' / '7')
  rollout_lib.run(config, tmp_path, share=shares.Share(0, 2))
  assert not (tmp_path / 'summary.json').exists()
  late.end()
  rollout_lib.run(config, tmp_path, share=shares.Share(0, 2))
  assert json.loads((tmp_path / 'summary.json').read_text())['rows'][0]['n'] == 4


@pytest.mark.parametrize('index, count', [(2, 2), (-1, 2), (0, 0)])
def test_a_process_s_number_is_below_that_of_all(index, count):
  with pytest.raises(errors.UserError, match='give a number from 0'):
    shares.Share(index, count)


@pytest.mark.slow
def test_two_processes_one_of_them_killed_lose_and_double_nothing(tmp_path, tokenizer):
  arg = f'{TINY},tokenizer={tokenizer},skills=loop,split=valid_seen,episodes=12,max_calls=4'
  start = lambda i: subprocess.Popen(
    command(tmp_path / 'two', arg, '--num_processes=2', f'--process_id={i}'), cwd=ROOT,
    env=programs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  both = [start(0), start(1)]
  journal = tmp_path / 'two' / 'parts' / '1' / trajectory.JOURNAL_NAME
  while both[1].poll() is None and not (journal.exists() and journal.stat().st_size):
    time.sleep(0.002)
  both[1].send_signal(signal.SIGKILL)
  both[1].communicate()
  both[1] = start(1)
  for process in both:
    assert process.wait(600) == 0, process.stderr.read()
    process.stderr.close()
  whole = rollout(tmp_path / 'whole', arg)
  assert whole.returncode == 0, whole.stderr
  check_joined(tmp_path / 'two', tmp_path / 'whole')
