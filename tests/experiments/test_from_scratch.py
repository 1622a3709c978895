"""A small decoder from random weights: its lessons, its training, its folder, games with it."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest

import rollout
from configs import from_scratch as config_lib
from configs import rollout as rollout_config
from data import bpe, trajectory
from data.errors import UserError
from data.tokenizer import Tokenizer
from experiments import from_scratch
from models import decoder, weights
from training import checkpoint, packing
from training import step as step_lib

TINY = ('vocab_size=420,embed_dim=32,num_layers=2,num_heads=2,num_kv_heads=1,mlp_dim=48,'
        'episodes=24,tokenizer_episodes=30,held_out_episodes=4,drills=4,search_drills=2,'
        'match_drills=1,label_drills=1,room_drills=1,game_drills=1,row_len=1024,checkpoint_every=4,'
        'dtype=float32,optimizer=muon')
HOSTILE = 'Wo liegt "Gießkanne" 12?\n\n<|im_end|>\t🙂 cafe\u0301\x00'


class Killed(Exception):
  pass


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """One uninterrupted run: its folder and its record."""
  workdir = tmp_path_factory.mktemp('scratch') / 'run'
  return workdir, from_scratch.run(config_lib.get_config(TINY), workdir)


def test_a_run_goes_on_from_a_decoder_in_its_shape_and_tokens(finished, tmp_path):
  start = finished[0] / 'small_decoder'
  config = config_lib.get_config(f'{TINY},start_decoder={start}')
  config.vocab_size, config.embed_dim = 500, 64  # Without effect.
  record = from_scratch.run(config, tmp_path / 'run')
  assert record['start_decoder'] == str(start) and record['parameters'] == finished[1]['parameters']
  folder = tmp_path / 'run' / 'small_decoder'
  assert (folder / 'tokenizer.json').read_bytes() == (start / 'tokenizer.json').read_bytes()
  (_, before), (_, after) = weights.load_pretrained(start), weights.load_pretrained(folder)
  change = {key: np.abs(np.asarray(after[key]) - np.asarray(before[key])).max() for key in before}
  assert before.keys() == after.keys() and all(0 < value < 0.1 for value in change.values())
  with pytest.raises(UserError, match='nowhere'):
    from_scratch.run(
      config_lib.get_config(f'{TINY},start_decoder={tmp_path}/nowhere'), tmp_path / 'other')


def test_a_run_makes_a_folder_and_is_finished_then(finished, capsys):
  workdir, record = finished
  folder = workdir / 'small_decoder'
  assert {p.name for p in folder.iterdir()} == {
    'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
  _, params = weights.load_pretrained(folder)
  assert record['parameters'] == sum(math.prod(value.shape) for value in params.values())
  assert record['vocabulary'] == Tokenizer.load(folder).vocab_size == 420
  assert record['steps'] == json.loads(
    (workdir / 'metrics.jsonl').read_text().splitlines()[-1])['step']
  assert record['too_long'] == 0 and record['tokens'] > 24 * 200
  # All 24 lessons and 10 drills are in the sample of the prediction.
  assert record['predicted']['tokens'] == pytest.approx(record['tokens'])
  assert record['predicted']['minutes'] > 0
  for accuracy in record['held_out'].values():
    assert all(0 <= accuracy[key] <= 1 for key in ('rule', 'replies', 'label', 'goal_label'))
  assert from_scratch.run(config_lib.get_config(TINY), workdir) == record
  assert 'finished already' in capsys.readouterr().err
  with pytest.raises(UserError, match='episodes'):
    from_scratch.run(config_lib.get_config(TINY.replace('episodes=24', 'episodes=25')), workdir)


@pytest.mark.parametrize('setting', list(config_lib.SETTINGS))
def test_every_setting_is_good_as_it_stands(setting):
  config = config_lib.get_config(f'setting={setting}')
  from_scratch.check(config)
  assert config.dtype in ('auto', 'float32')  # It is settled where the run begins, not here.


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch):
  workdir, record = finished
  save = checkpoint.Checkpoints.save

  def save_and_die(self, state):
    save(self, state)
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, 'save', save_and_die)
    with pytest.raises(Killed):
      from_scratch.run(config_lib.get_config(TINY), tmp_path / 'run')
  resumed = from_scratch.run(config_lib.get_config(TINY), tmp_path / 'run')
  assert resumed['resumed_at'] == 4 < record['steps']
  for name in ('model.safetensors', 'tokenizer.json'):
    whole = (workdir / 'small_decoder' / name).read_bytes()
    assert (tmp_path / 'run' / 'small_decoder' / name).read_bytes() == whole


def test_transformers_opens_the_folder_with_equal_logits(finished):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  folder = finished[0] / 'small_decoder'
  ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
  messages = [
    {'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'go to kiln 1'}]
  text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  assert text == ours.render_chat(messages, add_generation_prompt=True)
  ids = theirs(text)['input_ids']
  assert ids == ours.encode(text, allow_special=True)
  assert theirs.eos_token_id == ours.chat.end_of_turn in ours.stop_ids
  config, params = weights.load_pretrained(folder)
  model = decoder.from_params(config, params)
  tokens = np.array([ids], np.int32)
  hidden = decoder.forward(
    model.graphdef, model.lora, model.frozen, tokens, np.arange(len(ids))[None])
  got = decoder.logits(model.graphdef, model.frozen, hidden)
  loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  with torch.no_grad():
    want = loaded(torch.tensor(tokens)).logits.numpy()
  assert np.abs(got - want).max() < 1e-4


def test_random_weights_keep_tokens_apart(finished):
  config = dataclasses.replace(
    weights.load_pretrained(finished[0] / 'small_decoder')[0], frozen=False)
  model = from_scratch.initial_model(config, 0, None)
  params = decoder.to_params(model.lora)
  for name, value in params.items():
    if value.ndim == 3:
      want = value.shape[1] ** -0.5
      if name.endswith(('.o.kernel', '.down.kernel')):
        want /= (2 * config.num_layers) ** 0.5
      assert abs(float(value.std()) / want - 1) < 0.1, name
    elif name not in ('embed.embedding', 'final_norm.scale'):
      assert (value == 1).all(), name
  table = params['embed.embedding']
  assert abs(float(table.std()) - 1) < 1e-3
  tokens = np.arange(60, dtype=np.int32)[None]
  hidden = decoder.forward(model.graphdef, model.lora, model.frozen, tokens, tokens)
  assert 0.5 < float((hidden @ table.T).std()) < 2


def test_every_parameter_gets_torch_s_gradient(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = decoder.DecoderConfig(
    name='model', family='llama', vocab_size=50, embed_dim=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=12, mlp_dim=40, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
    frozen=False)
  model = decoder.create(config, seed=1)
  assert not jax.tree.leaves(model.frozen)
  rng = np.random.default_rng(0)
  example = packing.Example(rng.integers(0, 50, 20).astype(np.int32), rng.random(20) < 0.7, 'a')
  batch = jax.tree.map(
    lambda x: x[0], packing.Batches(packing.pack([example], 24), batch_rows=1)[0])
  loss = lambda trained: step_lib.batch_loss(model.graphdef, trained, model.frozen, batch)[0]
  value, grads = jax.jit(jax.value_and_grad(loss))(model.lora)

  params = {name: np.asarray(array) for name, array in decoder.to_params(model.lora).items()}
  weights.export_pretrained(tmp_path / 'model', config, params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'model')
  labels = np.where(example.loss_mask, example.tokens, -100)[1:]
  logits = theirs(torch.tensor(example.tokens[None].astype(np.int64))).logits[0, :-1]
  want = torch.nn.functional.cross_entropy(
    logits, torch.tensor(labels.astype(np.int64)), ignore_index=-100, reduction='sum')
  want.backward()
  np.testing.assert_allclose(value, want.item(), rtol=1e-5)
  # Their gradients in our layout: what a folder of them loads as.
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.copy_(parameter.grad)
  theirs.save_pretrained(tmp_path / 'gradients')
  _, wanted = weights.load_pretrained(tmp_path / 'gradients')
  got = decoder.to_params(grads)
  assert got.keys() == wanted.keys()
  for name, grad in wanted.items():
    assert np.abs(grad).max() > 0
    assert np.abs(got[name] - grad).max() < 1e-4 * np.abs(grad).max(), name


def test_the_folder_plays_episodes(finished, tmp_path):
  folder = finished[0] / 'small_decoder'
  config = rollout_config.make(dict(
    model=str(folder), skills='loop', task_types='make_state', agent='plain', max_env_steps=3,
    max_calls=4, max_new_tokens=6, max_context=400, split='valid_unseen', episodes=2, slots=2))
  rollout.run(config, tmp_path / 'played')
  episodes = trajectory.load_episodes(tmp_path / 'played')
  fingerprint = Tokenizer.load(folder).fingerprint
  assert len(episodes) == 2
  assert all(e.model == 'small_decoder' and e.tokenizer == fingerprint for e in episodes)
  assert all(e.model_calls > 0 for e in episodes)


def test_reply_accuracy_counts_whole_replies(finished):
  config = dataclasses.replace(
    weights.load_pretrained(finished[0] / 'small_decoder')[0], frozen=False)
  model = decoder.create(config, seed=3)
  state = step_lib.TrainState(model.lora, None, 0)

  forward = jax.jit(lambda tokens: decoder.forward(
    model.graphdef, model.lora, model.frozen, tokens, np.arange(24)[None]))

  def likeliest(ids):
    tokens = np.zeros((1, 24), np.int32)
    tokens[0, :len(ids)] = ids
    state = forward(tokens)[0, len(ids) - 1]
    return int((state @ decoder.output_kernel(model.lora, config).T).argmax())

  def reply(ids, wrong):
    """Three greedy tokens, the last one changed where it is to be wrong."""
    for _ in range(3):
      ids = [*ids, likeliest(ids)]
    return [*ids[:-1], (ids[-1] + wrong) % 420]

  def episode(success, *wrongs):
    ids, kinds = [5, 6, 7], [trajectory.KIND['task']] * 3
    for wrong in wrongs:
      ids = [*reply(ids, wrong), 9, 10]
      kinds += [trajectory.KIND['action']] * 3 + [trajectory.KIND['observation']] * 2
    # Every reply but the first is one to a label; the last but one is the first to say the verb.
    steps = [types.SimpleNamespace(observation='On it, a mug 1. A label reads: so',
                                   action=None, reply='think: I unfold it.') for _ in wrongs]
    steps[-2].reply = 'think: To make it flat I fold it.'
    steps[-1].action = steps[-1].reply = 'fold mug 1 with press 1'
    steps[0].observation = 'On it, a mug 1. A label reads: fold things here to make them flat.'
    return types.SimpleNamespace(
      instruction='make a flat mug.', tokens=np.array(ids), kinds=np.array(kinds),
      success=success, steps=steps)

  episodes = [
    episode(True, False, True), episode(True, False, True), episode(False, True, False, True)]
  accuracy = from_scratch.reply_accuracy(model, state, episodes)
  assert accuracy == {
    'replies': 3 / 7, 'rule': 1, 'label': 1 / 4, 'goal_label': 1 / 3}


@pytest.mark.parametrize('vocab_size', [bpe.MIN_VOCABULARY, 300])
def test_a_trained_tokenizer_spells_any_text(vocab_size, tmp_path):
  texts = ['go to kiln 1', 'print mug 1 with loom 2', f'{bpe.OPEN}go to loom 1{bpe.CLOSE}'] * 5
  bpe.train(texts, vocab_size, tmp_path / 'a')
  bpe.train(texts, vocab_size, tmp_path / 'b')
  tokenizer = Tokenizer.load(tmp_path / 'a')
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
  assert tokenizer.vocab_size <= vocab_size
  for text in (*texts[:2], HOSTILE, ''):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not set(ids) & tokenizer.special_ids
  learnt = len(tokenizer.encode('go to kiln 1')) < len('go to kiln 1')
  assert learnt == (vocab_size > bpe.MIN_VOCABULARY)
  assert len(tokenizer.special_ids) == 3
  assert tokenizer.chat.end_of_turn == tokenizer.encode(bpe.CLOSE, allow_special=True)[0]


@pytest.mark.parametrize('change, words', [
  ('vocab_size=100', 'vocab_size=100 is too small'), ('num_heads=5', 'does not divide'),
  ('num_layers=0', 'num_layers must be at least 1'), ('episodes=0', 'episodes, tokenizer_episodes'),
  ('env=webshop', 'drills are about houses'), ('experience_format=prose', 'format'),
  ('row_len=50', 'row_len=50'), ('schedule=steep', 'schedule')])
def test_bad_input_is_one_sentence(change, words, tmp_path):
  key = change.partition('=')[0]
  values = ','.join(p for p in TINY.split(',') if not p.startswith(f'{key}='))
  with pytest.raises(UserError, match=words):
    from_scratch.run(config_lib.get_config(f'{values},{change}'), tmp_path / 'run')
  # Whether a row is long enough for an episode is known only when one has been played.
  assert (tmp_path / 'run').exists() == (key == 'row_len')
