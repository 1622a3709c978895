"""train.py as a user starts it: a whole run, a run that is killed and started again, bad input."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

import train
from agents import policy
from configs import train as train_config
from data import errors, trajectory
from data import workdir as workdir_lib
from data.errors import UserError
from data.tokenizer import Tokenizer
from models import decoder, registry, weights
from models.lora import LoraConfig
from tests.agents import fakes
from training import step as step_lib

KINDS = {name: trajectory.KIND[name] for name in trajectory.KINDS}


def make_episodes(tokenizer: Tokenizer, count=14, fingerprint=None):
  rng = np.random.default_rng(0)
  episodes = []
  for i in range(count):
    parts = [('system', 6), ('memory', 5), ('task', 7)]
    for _ in range(rng.integers(1, 4)):
      parts += [('action', rng.integers(3, 7)), ('observation', rng.integers(4, 9))]
    kinds = np.concatenate([np.full(n, KINDS[kind]) for kind, n in parts])
    episodes.append(
      trajectory.Episode(
        id=f'e{i}',
        task_id=f't{i}',
        env='household',
        task_type='pick',
        split='train',
        instruction='',
        seed=0,
        policy='expert',
        agent='plain',
        memory='hints',
        model='tiny',
        tokenizer=fingerprint or tokenizer.fingerprint,
        # A pattern that can be learnt.
        tokens=5 + np.arange(len(kinds)) * 3 % 40,
        kinds=kinds,
        logprobs=np.zeros(len(kinds)),
        steps=[],
        success=i != 3,
        score=float(i != 3),
        termination='success' if i != 3 else 'step_limit',
      )
    )
  return episodes


@pytest.fixture(scope='module')
def rooms(tmp_path_factory):
  """A tokenizer folder, a journal run and a TFDS run."""
  root = tmp_path_factory.mktemp('train')
  tokenizer = Tokenizer.load(fakes.tokenizer_folder(root / 'tokenizer'))
  episodes = make_episodes(tokenizer)
  journal = trajectory.Journal(root / 'first' / trajectory.JOURNAL_NAME)
  for episode in episodes[:8]:
    journal.append(episode)
  journal.close()
  trajectory.write_tfds(episodes[8:], root / 'second' / trajectory.TFDS_NAME)
  return root


def values(rooms, **changes):
  fields = dict(
    model='smollm2_135m',
    base='random',
    shrink=True,
    tokenizer=str(rooms / 'tokenizer'),
    data=f'{rooms / "first"},{rooms / "second"}',
    row_len=64,
    batch_rows=2,
    rank=4,
    alpha=8.0,
    dropout=0.1,
    learning_rate=1e-2,
    epochs=10,
    dtype='float32',
    checkpoint_every=7,
  )
  return fields | changes


def command(rooms, workdir, **changes):
  pairs = values(rooms, **changes)
  argument = ','.join(f'{key}={value}' for key, value in pairs.items())
  return [
    sys.executable, 'train.py', f'--config=configs/train.py:{argument}', f'--workdir={workdir}',
  ]


def run_command(rooms, workdir, **changes):
  return subprocess.run(
    command(rooms, workdir, **changes), capture_output=True, text=True, check=False
  )


def read_metrics(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(rooms):
  """One uninterrupted run, started as a command."""
  result = run_command(rooms, rooms / 'whole')
  assert result.returncode == 0, result.stderr
  return result, rooms / 'whole'


def test_a_whole_run(rooms, finished):
  result, workdir = finished
  assert {p.name for p in workdir.iterdir()} == {
    'config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints', 'adapter', 'summary.json',
  }
  record = json.loads((workdir / 'summary.json').read_text())
  assert record['episodes'] == {'episodes': 14, 'not_successful': 1, 'kept': 13, 'too_long': 0}
  assert 0.5 < record['packing_efficiency'] <= 1
  assert record['tokens'] > record['loss_tokens'] > 0 and record['wall_s'] > record['train_s'] > 0
  assert record['versions']['jax']
  lines = read_metrics(workdir)
  assert [line['step'] for line in lines] == list(range(1, record['steps'] + 1))
  assert lines[-1]['loss'] < lines[0]['loss'] - 0.5
  assert 'not_successful 1' in result.stderr
  assert re.search(r'^training: 13 examples .* min$', result.stderr, re.MULTILINE)
  assert re.search(r'^attention=blocks: .*for GPUs and TPUs\.$', result.stderr, re.MULTILINE)
  assert result.stderr.count('attention=') == 1 and record['attention'] == 'blocks'
  assert 'adapter in' in result.stdout

  config = registry.shrink(registry.get_config('smollm2_135m'), vocab_size=_vocab(rooms))
  lora, params = weights.load_peft(workdir / 'adapter', config)
  assert (lora.rank, lora.alpha) == (4, 8)
  assert all(np.abs(value).max() > 0 for value in params.values())


def _vocab(rooms):
  return Tokenizer.load(rooms / 'tokenizer').vocab_size


def test_a_killed_run_goes_on_and_ends_bitwise_equal(rooms, finished):
  workdir = rooms / 'killed'
  process = subprocess.Popen(
    command(rooms, workdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  deadline = time.time() + 300
  while not (workdir / 'checkpoints' / '7').is_dir():
    assert process.poll() is None and time.time() < deadline
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (workdir / 'summary.json').exists()
  result = run_command(rooms, workdir, log_every=2)
  assert result.returncode == 0, result.stderr
  record = json.loads((workdir / 'summary.json').read_text())
  assert record['resumed_at'] >= 7
  name = pathlib.Path('adapter') / 'adapter_model.safetensors'
  assert (workdir / name).read_bytes() == (finished[1] / name).read_bytes()
  steps = [line['step'] for line in read_metrics(workdir)]
  assert steps == sorted(set(steps)) and steps[-1] == record['steps']


def test_a_finished_run_is_not_repeated_and_another_config_is_named(rooms, finished):
  config = train_config.make(values(rooms))
  before = (finished[1] / 'summary.json').stat().st_mtime_ns
  assert train.run(config, finished[1])['steps'] > 0
  assert (finished[1] / 'summary.json').stat().st_mtime_ns == before
  with pytest.raises(UserError, match=r'learning_rate \(there 0.01, now 0.5\)'):
    train.run(train_config.make(values(rooms, learning_rate=0.5)), finished[1])


def test_continues_an_adapter_of_the_same_shape_only(rooms, finished, tmp_path):
  adapter = str(finished[1] / 'adapter')
  config = train_config.make(values(rooms, init_adapter=adapter, epochs=1, learning_rate=1e-4))
  record = train.run(config, tmp_path / 'next')
  assert record['loss'] < read_metrics(finished[1])[0]['loss'] - 0.5
  for changes in ({'rank': 8}, {'alpha': 16.0}, {'targets': 'q,v'}):
    with pytest.raises(UserError, match=next(iter(changes))):
      train.run(
        train_config.make(values(rooms, init_adapter=adapter, **changes)),
        tmp_path / next(iter(changes)),
      )
  other = registry.shrink(registry.get_config('smollm2_135m'), vocab_size=_vocab(rooms), mlp_dim=64)
  model = decoder.create(other, LoraConfig(4, 8))
  weights.export_peft(
    tmp_path / 'wide', other, model.lora_config, decoder.to_params(model.lora), 'x'
  )
  with pytest.raises(UserError, match='shape'):
    train.run(
      train_config.make(values(rooms, init_adapter=str(tmp_path / 'wide'))), tmp_path / 'bad'
    )


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_a_quantised_base_trains_plays_and_is_exported(rooms, tmp_path, kind):
  from experiments import export

  folder = tmp_path / 'base'
  shutil.copytree(rooms / 'tokenizer', folder)
  config = registry.shrink(registry.get_config('qwen3_4b'), vocab_size=_vocab(rooms))
  params = {k: np.asarray(v) for k, v in decoder.to_params(decoder.create(config).frozen).items()}
  weights.export_pretrained(folder, config, params)
  given = values(
    rooms, model=str(folder), base='', shrink=False, epochs=3, base_quantization=kind)
  record = train.run(train_config.make(given), tmp_path / 'run')
  assert np.isfinite(record['loss'])
  adapter = safetensors.numpy.load_file(tmp_path / 'run/adapter/adapter_model.safetensors')
  assert all(array.dtype == np.float32 for array in adapter.values())
  base = policy.load_base(str(folder), base_quantization=kind)
  played = base.model(str(tmp_path / 'run/adapter'))
  source = export.from_run(tmp_path / 'run')
  assert source.base_quantization == kind
  export.export('merged', source, tmp_path / 'merged', dtype='float32')
  merged_config, merged = weights.load_pretrained(tmp_path / 'merged')
  want = decoder.to_params(decoder.merge_lora(played).frozen)
  assert merged_config.base_quantization == 'none'
  for name, array in merged.items():
    np.testing.assert_allclose(np.asarray(array), want[name], atol=1e-6)


def test_peft_opens_the_trained_adapter_by_itself(rooms, tmp_path):
  peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
  # A model of one's own, with biases on q, k and v.
  folder = tmp_path / 'my_model'
  shutil.copytree(rooms / 'tokenizer', folder)
  config = registry.shrink(registry.get_config('qwen25_0.5b'), vocab_size=_vocab(rooms))
  rng = np.random.default_rng(0)
  params = {
    name: np.asarray(value) + (0.3 * rng.standard_normal(value.shape) * name.endswith('bias'))
    for name, value in decoder.to_params(decoder.create(config, seed=7).frozen).items()
  }
  params = {name: value.astype(np.float32) for name, value in params.items()}
  weights.export_pretrained(folder, config, params)
  train.run(
    train_config.make(values(rooms, model=str(folder), base='', shrink=False, epochs=3)),
    tmp_path / 'run',
  )

  adapter = tmp_path / 'run' / 'adapter'
  settings = json.loads((adapter / 'adapter_config.json').read_text())
  assert settings['base_model_name_or_path'] == str(folder)
  assert (settings['r'], settings['lora_alpha'], settings['lora_dropout']) == (4, 8, 0.1)
  # The base is found by what adapter_config.json says of it.
  theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
  assert theirs.peft_config['default'].task_type == 'CAUSAL_LM'
  tokens = rng.integers(0, config.vocab_size, (2, 40)).astype(np.int32)

  def theirs_logits(model):
    with torch.no_grad():
      return model(torch.from_numpy(tokens).long()).logits.numpy()

  def our_logits(model):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder.forward(model.graphdef, model.lora, model.frozen, tokens, positions)
    return np.asarray(decoder.logits(model.graphdef, model.frozen, hidden))

  base = policy.load_base(str(folder))
  ours, want = base.model(str(adapter)), theirs_logits(theirs)
  with theirs.disable_adapter():
    plain = theirs_logits(theirs)
  assert np.abs(want - plain).max() > 0.1, 'the adapter has learnt something'
  assert np.abs(our_logits(base.model()) - plain).max() < 1e-4
  assert np.abs(our_logits(ours) - want).max() < 1e-4
  assert np.abs(our_logits(decoder.merge_lora(ours)) - want).max() < 1e-4
  assert np.abs(theirs_logits(theirs.merge_and_unload()) - want).max() < 1e-4


def terminate_after(step):
  """Scores 0; SIGTERM comes while the checkpoint of that step is scored."""

  def score(model):
    score.calls += 1
    if score.calls == step:
      os.kill(os.getpid(), signal.SIGTERM)
    return 0.0

  score.calls = 0
  return score


def test_sigterm_saves_and_the_same_command_goes_on(rooms, finished, tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  config = train_config.make(values(rooms, profile_steps='2,3'))
  with pytest.raises(errors.Preempted, match=r'step 8 of .* start the same command again'):
    train.run(config, tmp_path, score=terminate_after(1))
  assert signal.getsignal(signal.SIGTERM) is before
  assert not (tmp_path / 'summary.json').exists()
  assert (tmp_path / 'checkpoints' / '8').is_dir()
  # The trace is where TensorBoard's profile plugin looks, and holds the steps.
  (trace,) = (tmp_path / 'profile' / 'plugins' / 'profile').glob('*/*.xplane.pb')
  planes = {plane.name for plane in jax.profiler.ProfileData.from_file(str(trace)).planes}
  assert '/host:CPU' in planes
  record = train.run(train_config.make(values(rooms)), tmp_path)
  assert record['resumed_at'] == 8
  name = pathlib.Path('adapter') / 'adapter_model.safetensors'
  assert (tmp_path / name).read_bytes() == (finished[1] / name).read_bytes()


@pytest.mark.slow
def test_sigterm_ends_the_command_with_its_own_exit_code(rooms, tmp_path):
  process = subprocess.Popen(
    command(rooms, tmp_path / 'run', epochs=400), stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE, text=True)
  while not (tmp_path / 'run' / 'checkpoints' / '7').is_dir():
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == errors.EXIT_PREEMPTED == 143
  assert 'start the same command again to go on' in said.splitlines()[-1]
  assert 'Traceback' not in said


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_on_another_machine(rooms, finished, tmp_path, monkeypatch):
  monkeypatch.setattr(
    workdir_lib, '_open_remote', lambda url: epath.Path(tmp_path / url.removeprefix('gs://')))
  config = train_config.make(values(rooms))
  with pytest.raises(errors.Preempted):
    train.run(config, 'gs://bucket/run', score=terminate_after(1))
  assert train.run(config, 'gs://bucket/run')['resumed_at'] == 8
  run, name = tmp_path / 'bucket' / 'run', pathlib.Path('adapter') / 'adapter_model.safetensors'
  assert (run / name).read_bytes() == (finished[1] / name).read_bytes()
  assert [line['step'] for line in read_metrics(run)] == [
    line['step'] for line in read_metrics(finished[1])]
  assert {p.name for p in run.iterdir()} >= {
    'config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints', 'adapter', 'summary.json'}
  # Every step is in one of its event files alone.
  assert [p.stat().st_size > 0 for p in sorted(
    (run / 'tensorboard').iterdir(), key=lambda p: p.stat().st_size)] == [False, True]
  # It is found finished, too.
  assert train.run(config, 'gs://bucket/run')['steps'] > 8


@pytest.mark.slow
def test_a_stop_adds_no_candidate(rooms, finished, tmp_path):
  """Which checkpoints may become the adapter does not depend on where a run was stopped."""
  config = train_config.make(values(rooms))
  with pytest.raises(errors.Preempted):
    train.run(config, tmp_path, score=terminate_after(1))
  score = terminate_after(0)  # Never.
  assert train.run(config, tmp_path, score=score)['resumed_at'] == 8
  steps = json.loads((finished[1] / 'summary.json').read_text())['steps']
  scores = json.loads((tmp_path / 'checkpoints' / 'scores.json').read_text())
  assert sorted(map(int, scores)) == [*range(7, steps, 7), steps]
  assert score.calls == len(scores) - 1


@pytest.mark.slow
def test_goes_on_with_another_mesh(rooms, tmp_path):
  changes = {'batch_rows': 8, 'checkpoint_every': 2, 'epochs': 6}
  whole = train_config.make(values(rooms, mesh='8,1,1', **changes))
  train.run(whole, tmp_path / 'whole')
  with pytest.raises(errors.Preempted):
    train.run(whole, tmp_path / 'run', score=terminate_after(2))
  record = train.run(
    train_config.make(values(rooms, mesh='2,2,2', **changes)), tmp_path / 'run')
  assert 4 < record['resumed_at'] < record['steps']
  a, b = (safetensors.numpy.load_file(tmp_path / name / 'adapter' / 'adapter_model.safetensors')
          for name in ('run', 'whole'))
  for name in a:
    # Adam's steps do not shrink with the gradient: what is noise in it is seen in the adapter.
    assert np.abs(a[name] - b[name]).max() < 1e-3 * np.abs(b[name]).max(), name


@pytest.mark.slow
def test_the_best_checkpoint_becomes_the_adapter(rooms, tmp_path):
  scores, seen = iter([0.1, 0.7, 0.3]), []

  def score(model):
    seen.append(jax.device_get(decoder.to_params(model.lora)))
    return next(scores)

  record = train.run(
    train_config.make(values(rooms, epochs=3, checkpoint_every=5)), tmp_path, score=score)
  assert len(seen) == 3 and record['steps'] > 10
  assert record['best'] == {'step': 10, 'score': 0.7}
  config = registry.shrink(registry.get_config('smollm2_135m'), vocab_size=_vocab(rooms))
  _, adapter = weights.load_peft(tmp_path / 'adapter', config)
  for name, value in adapter.items():
    np.testing.assert_array_equal(value, seen[1][name])
    assert np.abs(value - seen[2][name]).max() > 0


def test_nothing_is_moved_unasked_in_the_loop(rooms, tmp_path, monkeypatch):
  double = jax.jit(lambda x: x * 2)

  def make_train_step(*_, **__):
    return lambda state, frozen, batch: (state, {'loss': double(np.ones(3)).sum()})

  monkeypatch.setattr(step_lib, 'make_train_step', make_train_step)
  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    train.run(train_config.make(values(rooms, remat='none')), tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(rooms, tmp_path):
  config = train_config.make(
    values(rooms, learning_rate=1e30, warmup_fraction=0.0, clip_norm=0.0, checkpoint_every=1)
  )
  with pytest.raises(UserError, match=r'^Step 2: loss'):
    train.run(config, tmp_path)
  assert not (tmp_path / 'adapter').exists()
  kept = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir()]
  assert kept == [1]


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'data': ''}, 'data is empty'),
    ({'data': '/nowhere'}, 'holds no episodes'),
    ({'row_len': 8}, 'row_len=8'),
    ({'row_len': 1}, 'row_len=1'),
    ({'batch_rows': 0}, 'positive'),
    ({'mesh': '3,1'}, 'mesh'),
    ({'mesh': '4,1,1'}, 'batch_rows=2'),
    ({'mesh': '1,1,4'}, 'tensor=4 of the mesh does not divide the 2 key-value heads'),
    ({'mesh': '3,1,1,1'}, 'slice=3'),
    ({'mesh': '64,1,1'}, '64'),
    ({'loss_on': 'thoughts'}, 'loss_on'),
    ({'schedule': 'step'}, 'schedule'),
    ({'remat': 'some'}, 'remat'),
    ({'attention': 'some'}, 'attention'),
    ({'attention': 'kernel'}, 'attention=kernel needs'),
    ({'profile_steps': '3'}, 'profile_steps'),
    ({'profile_steps': '3,2'}, 'profile_steps'),
    ({'init_adapter': '/nowhere'}, '/nowhere'),
  ],
)
def test_bad_input_is_one_sentence(rooms, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    train.run(train_config.make(values(rooms, **changes)), tmp_path)
  # The corrected command may use the same folder.
  assert not (tmp_path / 'config.json').exists()


def test_episodes_of_another_tokenizer_are_refused(rooms, tmp_path):
  journal = trajectory.Journal(tmp_path / 'other' / trajectory.JOURNAL_NAME)
  journal.append(make_episodes(None, 1, fingerprint='f' * 64)[0])
  with pytest.raises(UserError, match='f' * 12):
    train.run(train_config.make(values(rooms, data=str(tmp_path / 'other'))), tmp_path / 'run')


def test_a_too_long_episode_is_counted(rooms, tmp_path, capsys):
  record = train.run(train_config.make(values(rooms, row_len=40, epochs=0.5)), tmp_path)
  count = record['episodes']['too_long']
  assert count > 0
  shown = ''.join(capsys.readouterr())
  assert f'{count} episodes are longer than row_len=40 and left out; the longest has ' in shown


def test_an_adapter_for_a_model_that_reads_images_too(rooms, tmp_path):
  config = values(rooms, model='gemma3_4b', epochs=0.5)
  assert config['base'] == 'random' and config['shrink']
  train.run(train_config.make(config), tmp_path)
  settings = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
  # As it is published, its layers lie deeper, and those for images have the same names.
  assert settings['base_model_name_or_path'] == 'google/gemma-3-4b-it'
  assert 'language_model' in settings['target_modules']
  names = safetensors.numpy.load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
  assert names and all('.language_model.layers.' in name for name in names)


@pytest.mark.slow
def test_rows_of_a_length_that_packs_well(rooms, tmp_path):
  record = train.run(train_config.make(values(rooms, row_len=0, epochs=0.5)), tmp_path)
  assert record['episodes']['too_long'] == 0
  assert record['row_len'] % 128 == 0


@pytest.mark.parametrize(
  'argument,code,message',
  [('learning_rat=1', 2, 'learning_rate'), ('data=/nowhere', 1, 'holds no episodes')],
)
def test_a_mistake_in_the_command_is_told_without_a_traceback(tmp_path, argument, code, message):
  result = subprocess.run(
    [sys.executable, 'train.py', f'--config=configs/train.py:{argument}', f'--workdir={tmp_path}'],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ,
  )
  assert result.returncode == code and message in result.stderr
  assert 'Traceback' not in result.stderr
