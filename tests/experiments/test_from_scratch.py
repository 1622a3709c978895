"""A small decoder from random weights: its lessons, its training, its folder, games with it."""

import dataclasses
import json
import math
import re
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
from envs import household_skills
from envs.webshop import WebShopSuite
from experiments import from_scratch
from models import decoder, weights
from training import checkpoint, packing
from training import step as step_lib

TINY = ('vocab_size=420,embed_dim=32,num_layers=2,num_heads=2,num_kv_heads=1,mlp_dim=48,'
        'episodes=24,tokenizer_episodes=30,held_out_episodes=4,drills=6,search_drills=4,'
        'row_len=1024,checkpoint_every=4,dtype=float32')
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
    assert all(0 <= accuracy[key] <= 1 for key in ('rule', 'replies', 'label'))
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


def test_lessons_name_no_state_twice_and_none_of_the_loop(tmp_path):
  lessons = from_scratch.Lessons(config_lib.get_config('max_env_steps=14,max_calls=20'))
  bpe.train([], bpe.MIN_VOCABULARY, tmp_path)
  speller = Tokenizer.load(tmp_path)
  held_out = {
    *household_skills.POOLS['loop'], *household_skills.POOLS['hard'],
    *household_skills.POOLS['warm']}
  pairs = {(r.verb, r.appliance) for pool in ('loop', 'hard')
           for r in household_skills.draw(pool, 0)}
  asked, told = [], 0
  for episode in lessons.play(speller, 'train', 40, hint_share=1.0, rule_share=0.5):
    assert episode.success
    text = speller.decode(episode.tokens)
    assert not held_out & set(re.findall(r'[a-z]+', text))
    state = re.search(r'make an? (\w+) ', episode.instruction)[1]
    asked.append(state)
    hints = re.findall(r'To make \{object\} (\w+), (\w+) it with the (\w+)', text)
    assert len({words[0] for words in hints}) == len(hints)
    assert not pairs & {(verb, appliance) for _, verb, appliance in hints}
    for _, verb, appliance in [words for words in hints if words[0] == state]:
      told += 1
      last = episode.steps[-1].action.split()
      assert (last[0], last[-2]) == (verb, appliance)
      assert 'examine' not in text.partition('Your task')[2]
  assert len(set(asked)) == len(asked)
  assert 10 <= told <= 30


def _shop_lessons(tmp_path, **changes):
  bpe.train([], bpe.MIN_VOCABULARY, tmp_path)
  config = config_lib.get_config('setting=webshop,lesson_options=')
  config.update(changes)
  speller = Tokenizer.load(tmp_path)
  return from_scratch.Lessons(config), speller


def test_a_shopper_forgets_by_category_what_no_hint_reminds_it_of(tmp_path):
  lessons, speller = _shop_lessons(tmp_path)
  suite = rollout.make_suite(lessons._rollout)
  forgetful = {
    task.task_type for task in suite.tasks('train')
    if 'options' in suite.expert(task, error_rate=0.5)._forgets}
  assert 0 < len(forgetful) < 5
  chose, trips = 0, 0
  for share in (0.0, 1.0):
    for episode in lessons.play(speller, 'train', 25, hint_share=share, rule_share=1.0):
      clicked = any('[[' in step.observation for step in episode.steps)
      if share == 0.0 and episode.task_type in forgetful:
        assert not clicked and not episode.success
      else:
        trips, chose = trips + 1, chose + clicked
      text = speller.decode(episode.tokens)
      assert ('before you click buy now' in text) == (share == 1.0)
  # A product that it settles for may not have what was asked for.
  assert 30 < trips < 50 and chose > 0.9 * trips
  # No product of the lessons is one of the loop's.
  loop = rollout.make_suite(rollout_config.make({'env': 'webshop', 'env_seed': 0}))
  assert not {p.title for p in suite.shop.products} & {p.title for p in loop.shop.products}


def test_a_hint_reminds_of_its_share(tmp_path):
  lessons, speller = _shop_lessons(tmp_path)
  told = sum(
    'before you click buy now' in speller.decode(e.tokens)
    for e in lessons.play(speller, 'train', 60, hint_share=1.0, rule_share=0.5))
  assert 18 <= told <= 42


def test_lessons_show_a_solved_task_of_their_type(tmp_path):
  lessons, speller = _shop_lessons(
    tmp_path, warm_hint_share=0.0, experience_share=1.0, expert_error_rate=0.0)
  episodes = list(lessons.play(speller, 'train', 12))
  earlier = {}
  for episode in episodes:
    text = speller.decode(episode.tokens)
    shown = earlier.get(episode.task_type)
    assert text.count('Solved before:') == (shown is not None)
    assert shown is None or ' '.join(shown.split()) in text
    if episode.success:
      earlier[episode.task_type] = episode.instruction
  assert sum(e.task_type in earlier for e in episodes) > 5


def test_a_slow_environment_plays_a_lesson_once():
  class Slow(WebShopSuite):
    own_process, made = True, 0

    def make(self, task):
      Slow.made += 1
      return super().make(task)

  suite, games = Slow(num_products=20), {}
  recorded = from_scratch._Recorded(suite, games)
  task = suite.tasks('train')[0]
  played = []
  for _ in range(2):
    recorded.play(task)
    environment, expert = recorded.make(task), recorded.expert(task)
    observation, steps = environment.reset(), []
    while not (steps and steps[-1].done):
      steps.append(environment.step(expert.act(observation).action))
    played.append(steps)
  assert Slow.made == 1 and played[0] == played[1] and played[0][-1].won


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
    return types.SimpleNamespace(
      tokens=np.array(ids), kinds=np.array(kinds), success=success, steps=steps)

  episodes = [
    episode(True, False, True), episode(True, False, True), episode(False, True, False, True)]
  accuracy = from_scratch.reply_accuracy(model, state, episodes)
  assert accuracy == {'replies': 3 / 7, 'rule': 1, 'label': 1 / 4}


@pytest.mark.parametrize('agent', ['plain', 'react'])
def test_a_search_drill_reads_labels_until_one_tells_the_state(finished, agent):
  tokenizer = Tokenizer.load(finished[0] / 'tokenizer')
  lengths, by_the_alphabet = set(), 0
  for index in range(12):
    example = from_scratch.search_drill(tokenizer, 0, index, agent)
    assert (example.tokens == from_scratch.search_drill(tokenizer, 0, index, agent).tokens).all()
    starts = np.flatnonzero(np.diff(example.loss_mask)) + 1
    room, *parts = (tokenizer.decode(part) for part in np.split(example.tokens, starts))
    replies, labels = parts[::2], parts[1::2]
    wanted, thing = re.search(r'make a (\w+) (\w+)\.', room).groups()
    listed = [name for name in re.findall(r'a (\w+) 1', room)
              if name in household_skills.APPLIANCES]
    assert len(listed) == 5
    by_the_alphabet += listed == sorted(listed)
    told = [re.search(r'On the (\w+) 1, .* reads: (\w+) things here to make them (\w+)\.', label)
            .groups() for label in labels]
    # In the order of the room, up to the one that tells it.
    assert [appliance for appliance, _, _ in told] == listed[:len(told)]
    assert [state == wanted for _, _, state in told] == [False] * (len(told) - 1) + [True]
    for appliance, reply in zip(listed, replies[:-1], strict=False):
      assert reply.splitlines()[-1] == f'go to {appliance} 1'
      assert (f'what makes it {wanted}. I try the {appliance} 1.' in reply) == (agent == 'react')
    appliance, verb, _ = told[-1]
    assert replies[-1].splitlines()[-1] == f'{verb} {thing} 1 with {appliance} 1'
    lengths.add(len(told))
  assert len(lengths) > 2 and by_the_alphabet < 3


@pytest.mark.parametrize('agent', ['plain', 'react'])
def test_a_drill_s_replies_follow_from_the_rules_it_tells(finished, agent):
  tokenizer = Tokenizer.load(finished[0] / 'tokenizer')
  first = from_scratch.drill(tokenizer, 0, 0, agent)
  assert (first.tokens == from_scratch.drill(tokenizer, 0, 0, agent).tokens).all()
  pairs = {(r.verb, r.appliance) for pool in ('loop', 'hard')
           for r in household_skills.draw(pool, 0)}
  for index in range(8):
    example = from_scratch.drill(tokenizer, 0, index, agent)
    starts = np.flatnonzero(np.diff(example.loss_mask)) + 1
    told, *parts = (tokenizer.decode(part) for part in np.split(example.tokens, starts))
    rules = re.findall(r'- To make {object} (\w+), (\w+) it with the (\w+)\.\n', told)
    # Each rule is told once and asked for once; only the replies have a loss.
    replies = parts[::2]
    goals = re.findall(r'make a (\w+) (\w+)\.\n', told + ''.join(parts[1::2]))
    assert sorted(state for state, _ in goals) == sorted(rule[0] for rule in rules)
    assert 1 <= len(rules) == len(replies) <= 4 and not pairs & {rule[1:] for rule in rules}
    assert not example.loss_mask[0] and example.loss_mask[-1]
    known = {state: rest for state, *rest in rules}
    for (state, thing), reply in zip(goals, replies, strict=True):
      verb, appliance = known[state]
      lines = reply.splitlines()
      assert lines[-1] == f'{verb} {thing} 1 with {appliance} 1'
      assert (f'think: To make it {state} I {verb} it with the {appliance}.' in lines) == (
        agent == 'react')


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
