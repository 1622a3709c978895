"""The measurement of playing: its replays, its sums, and a small run."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from data import errors
from data.tokenizer import Tokenizer
from experiments.bench import rollout as bench
from experiments.bench import rollout_jax, rollout_page, rollout_torch
from models import decoder, registry, weights
from tests.agents import fakes

CONFIG = registry.shrink(
  registry.get_config('smollm2_135m'), vocab_size=61, embed_dim=32, head_dim=8, mlp_dim=48,
  max_position=256)


def transcripts(count=3, seed=0):
  """Episodes whose turns and lengths differ."""
  rng, found = np.random.default_rng(seed), []
  for number in range(count):
    turns, tokens = [], []
    for _ in range(1 + number % 3):
      new, reply = (rng.integers(0, 61, rng.integers(1, 9)).tolist() for _ in range(2))
      turns.append([new, len(reply)])
      tokens += new + reply
    found.append({'turns': turns, 'tokens': tokens})
  return found


@pytest.fixture(scope='module')
def model():
  return decoder.create(CONFIG, seed=3)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, model):
  path = tmp_path_factory.mktemp('bench_rollout') / 'model'
  weights.export_pretrained(path, CONFIG, jax.device_get(decoder.to_params(model.frozen)))
  return path


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp('bench_rollout') / 'transcripts.json'
  path.write_text(json.dumps(transcripts()))
  return path


class Counting:
  """An engine without a model: a turn takes as many steps as its slot's number."""

  def __init__(self, num_slots):
    self.num_slots, self.left, self.log = num_slots, {}, []

  @property
  def busy(self):
    return len(self.left)

  def submit(self, slot, tokens, count, *, reset, seed):
    assert slot not in self.left
    self.left[slot] = slot + 1
    self.log.append((slot, len(tokens), count, reset, seed))

  def step(self):
    self.left = {slot: n - 1 for slot, n in self.left.items()}
    done = [slot for slot, n in self.left.items() if not n]
    self.left = {slot: n for slot, n in self.left.items() if n}
    return [type('Completion', (), {'slot': slot}) for slot in done]


def test_a_replay_asks_for_every_turn_once_and_in_order():
  given, engine = transcripts(7), Counting(3)
  rollout_jax.drive(engine, given)
  for number, found in enumerate(given):
    own = [entry for entry in engine.log if entry[-1] == number]
    wanted = found['turns']
    assert [(n, count) for _, n, count, _, _ in own] == [(len(new), c) for new, c in wanted]
    assert [reset for *_, reset, _ in own] == [True] + [False] * (len(wanted) - 1)
    assert len({slot for slot, *_ in own}) == 1


def test_more_context_is_each_episode_s_own_and_changes_nothing_else():
  given = transcripts()
  longer = rollout_jax.with_context(given, 40, 61)
  starts = [tuple(t['turns'][0][0][:40]) for t in longer]
  assert len(set(starts)) == len(given)
  for before, after in zip(given, longer):
    assert after['turns'][0][0][40:] == before['turns'][0][0]
    assert after['turns'][1:] == before['turns'][1:]
  assert rollout_jax.longest(longer) == rollout_jax.longest(given) + 40


@pytest.mark.slow
@pytest.mark.parametrize('setting', [
  {'mode': 'reprefill'}, {'mode': 'cached', 'cache': 'dynamic'},
  {'mode': 'cached', 'cache': 'static'}], ids=lambda s: '-'.join(s.values()))
def test_the_peer_does_the_same_work(folder, file, setting):
  record = rollout_torch.replay({
    'folder': str(folder), 'transcripts': str(file), 'dtype': 'float32', 'rows': 2, 'turns': 0,
    **setting})
  given = transcripts()
  new, sampled = (sum(f(turn) for t in given for turn in t['turns'])
                  for f in (lambda turn: len(turn[0]), lambda turn: turn[1]))
  assert record['generated'] == sampled and record['episodes'] == 3
  if setting['mode'] == 'reprefill':
    assert record['prefilled'] == sum(
      sum(len(a) + n for a, n in t['turns'][:i]) + len(t['turns'][i][0])
      for t in given for i in range(len(t['turns'])))
  else:
    # As ours: the last sampled token of a turn is computed with the next one.
    assert record['prefilled'] == new + sum(len(t['turns']) - 1 for t in given)
  assert record['prefill_computed'] >= record['prefilled']
  assert 0 < record['prefill_s'] + record['decode_s'] <= record['wall_s']


def test_a_sample_of_the_episodes_is_as_long_as_all_of_them():
  given = [{'tokens': [0] * length} for length in np.random.default_rng(0).permutation(64)]
  picked = rollout_torch.sample(given, 16)
  assert len({len(found['tokens']) for found in picked}) == 16
  assert abs(np.mean([len(found['tokens']) for found in picked]) - 31.5) <= 0.5
  assert rollout_torch.sample(given, 0) is given and rollout_torch.sample(given, 64) is given


def test_a_kept_cache_with_gaps_samples_what_the_model_alone_does(folder):
  net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  group = [[([7, 8, 9, 10, 11], [0] * 2), ([20, 21], [0] * 5)], [([30], [0] * 4), ([5] * 6, [0])]]
  alone = []
  for own in group:
    tokens = []
    for new, reply in own:
      tokens += new
      for _ in reply:
        logits = net(input_ids=torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
        alone.append(tokens[-1])
  sampled, forward = [], net.forward

  def watched(**inputs):
    result = forward(**inputs)
    sampled.append(result.logits[:, -1].argmax(-1).tolist())
    return result

  net.forward = watched
  with torch.inference_mode():
    rollout_torch._play_cached(net, group, rollout_torch._Clock(), static=False)
  # Four steps of the first turn, five of the second; rows that are done go on unseen.
  rows = [[step[i] for step in sampled] for i in range(2)]
  found = [*rows[0][:2], *rows[0][4:9], *rows[1][:4], rows[1][4]]
  assert found == alone


def test_teacher_forcing_agrees_with_transformers(folder):
  tokens = np.random.default_rng(1).integers(0, 61, 37).tolist()
  job = {'tokens': tokens, 'weights': str(folder), 'folder': str(folder)}
  own, theirs = rollout_jax.exact(job), rollout_torch.exact(job)
  np.testing.assert_allclose(own['logits'], theirs['logits'], atol=1e-4)
  found = rollout_page.agreement(own, theirs)
  assert found['places'] == 37 and found['share'] == 1.0


def test_agreement_tells_near_ties_from_differences():
  logits = [[3.0, 2.995, 1.0]] * 2 + [[3.0, 2.0, 1.0]] * 2
  own = {'ids': [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]], 'logits': logits}
  theirs = {'ids': [[1, 2, 3], [2, 1, 3], [3, 2, 1], [9, 8, 7]], 'logits': logits}
  found = rollout_page.agreement(own, theirs)
  assert (found['share'], found['different'], found['near_ties']) == (0.25, 3, 1)
  assert found['largest_gap'] is None
  closer = rollout_page.agreement(
    *({key: value[:3] for key, value in side.items()} for side in (own, theirs)))
  assert closer['largest_gap'] == 2.0


def record(wall_s, **more):
  return {'wall_s': wall_s, 'prefill_s': wall_s / 4, 'decode_s': wall_s / 2, 'host_s': wall_s / 4,
          'environment_s': 0.0, 'episodes': 4, 'generated': 100, 'prefilled': 300, 'stats': {},
          **more}


def test_sums_and_goals():
  played = record(10.0, env_steps=40, terminations={'step_limit': 4}, compile_first_s=1.0,
                  device_name='cpu')
  one = lambda wall, **more: {
    'setting': 'x', 'tastes': {'a': 99.0}, 'run': record(wall), **more}
  play = rollout_page.summarise_play(
    played, one(10.0, after=0.97, drafts={'a': 0.25}),
    {'cached': one(20.0), 'reprefill': one(90.0)},
    {'transformers': {'share': 0.999, 'places': 1000, 'different': 1, 'near_ties': 1,
                      'largest_gap': 1e-4}})
  assert play['ours']['episodes_per_hour'] == pytest.approx(4 * 3600 / 10)
  assert play['ours']['split']['decode'] == pytest.approx(0.5)
  assert play['peers']['cached']['ratio'] == pytest.approx(2.0)
  assert not play['peers']['cached']['reached'] and play['peers']['reprefill']['reached']
  assert play['peers']['cached']['env_steps_per_s'] == pytest.approx(2.0)
  text = rollout_page.table({'play': play})
  assert '2.00 times' in text and 'NOT reached' in text and '99.90%' in text
  assert 'after the peers: 97% of' in text
  assert 'a: 0.25 tokens of a draft accepted a verifying step' in text


def test_the_plot_leaves_out_what_failed():
  scaling = {
    'slots': [{'slots': 1, 'episodes_per_hour': 12.0}, {'slots': 4, 'episodes_per_hour': 31.0},
              {'slots': 256, 'error': 'MemoryError: 256 slots'}],
    'context': [{'context': 512, 'episodes_per_hour': 20.0}], 'context_slots': 32, 'turns': 8}
  svg = rollout_page.plot(scaling)
  assert svg.count('<circle') == 3 and 'nan' not in svg and '>256<' not in svg
  assert 'not measured: MemoryError' in rollout_page.table({'scaling': scaling})


def test_what_does_not_fit_is_said_before_it_is_tried():
  with pytest.raises(MemoryError, match='4096 slots of 65536 tokens need about'):
    rollout_jax.check_memory(decoder.abstract(registry.get_config('qwen25_7b')), 4096, 65536)


def test_the_bytes_of_a_step_are_weights_once_and_every_slot_s_cache(model):
  params = sum(x.size * 4 for x in decoder.to_params(model.frozen).values())
  cache = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
  assert rollout_jax.step_bytes(model, 5, 10) == params + 5 * 10 * cache


def values(**given):
  return bench.values_of(
    {**bench.config_lib.DEFAULTS},
    **{'peer': 'none', 'llama_python': '', 'parts': 'play', 'device': 'cpu', **given})


def test_what_helps_llama_alone_is_tried_together(tmp_path, monkeypatch):
  seconds = {'default': 10.0, 'unified': 8.0, 'q8_0': 9.0, 'no_flash': 12.0, 'ubatch128': 9.6,
             'ubatch2048': 9.5, 'q8_0+ubatch2048+unified': 7.0}
  tried = []

  def job(module, job, folder, *, python):
    name = '+'.join(sorted(
      {'unified': 'unified', 'cache': 'q8_0', 'flash': 'no_flash'}.get(k, f'{k}{value}')
      for k, value in job['setting'].items())) or 'default'
    tried.append(name)
    return {'wall_s': seconds[name], 'episodes': 4} if name in seconds else {'error': 'no'}

  monkeypatch.setattr(bench.bench_train, 'run_job', job)
  run = bench._Bench(values(), tmp_path)
  best, setting, rates = bench.best_of(run, 'llama_cpp', 'llama')
  assert setting == {'setting': {'unified': True, 'cache': 'q8_0', 'ubatch': 2048}}
  assert rates[best] == max(rates.values()) and len(rates) == 7
  # Kept records are not measured again.
  before = len(tried)
  assert bench.best_of(bench._Bench(values(), tmp_path), 'llama_cpp', 'llama')[0] == best
  assert all(name not in seconds for name in tried[before:])


def test_a_dtype_in_which_the_peer_s_products_are_hopeless_is_not_tried(tmp_path, monkeypatch):
  rates = {'bfloat16': 8e8, 'float32': 1.7e11}
  monkeypatch.setattr(
    bench.bench_train, 'run_job',
    lambda module, job, folder, *, python: {'flops_per_s': rates[job['dtype']]})
  run = bench._Bench(values(peer='transformers'), tmp_path)
  assert bench.peer_dtypes(run) == ['float32']
  rates.clear()
  assert bench.peer_dtypes(run) == ['float32']  # Kept.
  names = bench.settings_of('cached', {**run.values, 'peer_dtypes': ['float32']})
  assert names and all(name.startswith('float32-') for name in names)


@pytest.mark.parametrize('given, says', [
  ({'peer': 'vllm'}, "There is no peer 'vllm'"),
  ({'peer': 'llama_cpp', 'llama_python': '/no/python'}, 'has no llama_cpp; install it: python -m'),
  ({'parts': 'plays'}, '--parts are some of'),
  ({'parts': 'scaling'}, 'give --parts=play,scaling')])
def test_bad_input_is_one_sentence(tmp_path, given, says):
  with pytest.raises(errors.UserError) as raised:
    bench.run(values(**given), tmp_path / 'run')
  assert says in str(raised.value) and not (tmp_path / 'run').exists()


def test_a_list_that_is_none_is_named():
  with pytest.raises(errors.UserError, match='scaling_slots=1,x'):
    bench.values_of({**bench.config_lib.DEFAULTS, 'scaling_slots': '1,x'}, peer='none', parts='')


LLAMA = pathlib.Path(__file__).parents[2] / '.venv-llama' / 'bin' / 'python'


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA.exists(), reason='llama-cpp-python is not there, in .venv-llama')
def test_llama_cpp_does_the_same_work_and_reads_the_same_weights(tmp_path, smollm2_path):
  rng, given = np.random.default_rng(0), transcripts(5)
  for found in given:
    found['tokens'] = rng.integers(300, 20_000, len(found['tokens'])).tolist()
  path = tmp_path / 'transcripts.json'
  path.write_text(json.dumps(given))
  job = {'weights': str(smollm2_path), 'model': 'smollm2_135m', 'transcripts': str(path)}
  run = lambda **more: bench.bench_train.run_job(
    'experiments.bench.rollout_llama', {**job, **more}, tmp_path, python=str(LLAMA))
  for setting in ({}, {'unified': True, 'ubatch': 32, 'batch': 32}):
    record = run(kind='replay', turns=0, slots=3, setting=setting)
    assert record['generated'] == sum(count for t in given for _, count in t['turns'])
    assert record['prefilled'] == sum(
      len(new) for t in given for new, _ in t['turns']) + sum(len(t['turns']) - 1 for t in given)
  text = 'You are in the middle of a room. Looking quickly around you, you see a desk 1.'
  forced = {'kind': 'exact', 'tokens': Tokenizer.load(smollm2_path).encode(text)}
  found = rollout_page.agreement(rollout_jax.exact({**job, **forced}), run(**forced))
  # Its products are of quantised activations.
  assert found['share'] >= 0.8, found


@pytest.mark.slow
def test_a_small_run_and_the_same_again(tmp_path):
  folder = fakes.tokenizer_folder(tmp_path / 'model')
  config = registry.shrink(
    registry.get_config('smollm2_135m'), max_position=2048,
    vocab_size=fakes.make_tokenizer(folder).vocab_size)
  weights.export_pretrained(
    folder, config, jax.device_get(decoder.to_params(decoder.create(config, seed=0).frozen)))
  out = tmp_path / 'out.json'
  command = [
    sys.executable, '-m', 'experiments.bench.rollout', f'--workdir={tmp_path / "run"}',
    f'--out={out}', '--peer=transformers',
    f'--config=configs/bench_rollout.py:model={folder},episodes=2,slots=2,max_env_steps=2,'
    'max_calls=3,max_context=1024,dtypes=float32,peer_dtypes=float32,scaling_turns=2,lookups=0,4,'
    'decode_slots=1,2,decode_contexts=32,decode_tokens=16,scaling_slots=1,2,scaling_contexts=16,'
    'context_slots=2']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('about ')
  found = json.loads(out.read_text())
  play = found['play']
  assert play['agreement']['transformers']['share'] >= 0.995
  assert set(play['peers']) == {'reprefill', 'cached'} and play['ours']['after'] > 0
  assert play['peers']['cached']['generated'] == play['ours']['generated'] == (
    play['free']['generated'])
  ours = play['ours']
  assert {name.partition('-')[2] for name in ours['drafts']} == {'1-lookup4', '2-lookup4'}
  assert play['peers']['cached']['prefilled'] == ours['prefilled'] + ours['copied']
  assert [row['slots'] for row in found['decode']['rows']] == [1, 2]
  assert all(row['share_of_bound'] > 0 and not row['retraced'] and math.isfinite(row['bound_s'])
             for row in found['decode']['rows'])
  assert len(found['scaling']['slots']) == 2 and out.with_suffix('.svg').is_file()
  # Every job's record is kept: nothing runs again but the sums.
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 0 and 'ours.whole' not in again.stdout
  assert json.loads(out.read_text())['play'] == play
