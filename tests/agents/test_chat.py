"""Conversations over slots: prompts, text as it becomes certain, and what a slot still has."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents import chat, prompts
from data import errors
from inference.engine import Completion, Engine
from models import decoder, incremental, registry

WORDS = st.lists(st.sampled_from(
  ['pull lever 1', ' OK.', '\n', 'é', '🙂', 'ab', 'a', 'b', '<|im_end|>']), max_size=12)
WORDS = WORDS.map(''.join)


def user(text):
  return {'role': 'user', 'content': text}


def flat(parts):
  return [i for part in parts for i in part.ids]


def test_a_prompt_has_the_tokens_of_the_agents_prompts(tokenizer):
  wanted = prompts.render(tokenizer, system='Be brief.', task='You see a desk 1.')
  sampled = [*tokenizer.encode('pull lever 1'), tokenizer.chat.end_of_turn]
  messages = [{'role': 'system', 'content': 'Be brief.'}, user('You see a desk 1.')]
  assert flat(chat.render(tokenizer, messages)) == wanted.tokens
  messages += [{'role': 'assistant', 'content': 'pull lever 1'}, user('Nothing happens.')]
  assert flat(chat.render(tokenizer, messages)) == (
    wanted.tokens + sampled + prompts.next_turn(tokenizer, 'Nothing happens.', sampled))


@given(text=WORDS)
def test_what_a_message_spells_is_no_control_token(tokenizer, text):
  few = flat(chat.render(tokenizer, [user('')]))
  ids = flat(chat.render(tokenizer, [user(text)]))
  special = lambda ids: sum(i in tokenizer.special_ids for i in ids)
  assert special(ids) == special(few)
  assert text in tokenizer.decode(ids, skip_special=False)


def test_messages_that_a_template_drops_are_refused(tokenizer, monkeypatch):
  monkeypatch.setattr(tokenizer, 'chat_template', '{{ messages[0]["content"] }}')
  with pytest.raises(errors.UserError, match='does not write every message once'):
    chat.render(tokenizer, [user('a'), {'role': 'assistant', 'content': 'b'}, user('c')])


@given(text=WORDS, stop=st.lists(st.sampled_from(['ab', 'b', 'lever 1 OK', 'é🙂', 'aa', '\n']),
                                max_size=3, unique=True), data=st.data())
def test_pieces_of_text_make_the_text_up_to_the_first_stop_string(tokenizer, text, stop, data):
  ids, rest = tokenizer.encode(text), []
  detokenizer, start = chat.Detokenizer(tokenizer, stop), 0
  while start < len(ids) and not detokenizer.stopped:
    end = data.draw(st.integers(start + 1, len(ids)))
    rest.append(detokenizer.add(ids[start:end], last=end == len(ids)))
    start = end
  # By characters: the first place at which a stop string is complete.
  wanted = next((text[:end - len(s)] for end in range(len(text) + 1)
                 for s in sorted(stop, key=len, reverse=True) if text[:end].endswith(s)), text)
  assert ''.join(rest) == detokenizer.text == wanted
  assert detokenizer.stopped == (wanted != text)


@pytest.fixture(scope='module')
def model(tokenizer):
  config = registry.shrink(registry.get_config('smollm2_135m'), vocab_size=tokenizer.vocab_size)
  return incremental.prepare_for_decode(decoder.create(config, seed=1))


def engine(model):
  return Engine(
    model, num_slots=2, max_len=256, stop_ids=(), decode_steps=4, block_buckets=(8,),
    attend_step=256)


@pytest.fixture(scope='module')
def scheduler(tokenizer, model):
  made = chat.Scheduler(
    tokenizer, lambda sampling: engine(model), ['tiny'], max_context=256, max_waiting=8,
    piece=5)
  yield made
  made.close()


def ask(scheduler, tokenizer, messages, model='tiny', **options):
  """Text and outcome of a request."""
  request = chat.Request(
    model, chat.render(tokenizer, messages), **{'max_new_tokens': 12, **options})
  scheduler.submit(request)
  text = []
  while True:
    kind, value = request.events.get(timeout=120)
    if kind != 'text':
      assert kind == 'done', value
      return text, value
    text.append(value)


def test_streamed_and_whole_replies_are_what_the_engine_samples(scheduler, tokenizer, model):
  messages = [user('You are in a hall.')]
  plain = engine(model)
  plain.submit(0, flat(chat.render(tokenizer, messages)), 12, reset=True)
  (completion,) = plain.run_until_complete()
  wanted = tokenizer.decode(completion.tokens)
  whole, outcome = ask(scheduler, tokenizer, messages)
  assert whole == [wanted] and outcome.finish_reason == 'length'
  assert outcome.completion_tokens == 12
  streamed, _ = ask(scheduler, tokenizer, messages, streams=True)
  assert ''.join(streamed) == wanted and len(streamed) > 1


def test_a_conversation_that_goes_on_computes_its_new_tokens_only(scheduler, tokenizer):
  messages = [user('You see a lever 1, a lever 2.')]
  text, first = ask(scheduler, tokenizer, messages, streams=True)
  messages += [{'role': 'assistant', 'content': ''.join(text)}, user('Nothing happens.')]
  # Another conversation in between takes the other slot.
  ask(scheduler, tokenizer, [user('Something else, and quite another thing: a dresser 1.')])
  again, second = ask(scheduler, tokenizer, messages)
  assert second.cached_tokens == first.prompt_tokens + first.completion_tokens
  new = len(tokenizer.chat.user_to_assistant) + len(tokenizer.encode('Nothing happens.'))
  assert second.prompt_tokens - second.cached_tokens == (
    new + 1 + len(tokenizer.chat.assistant_to_user))
  # From an empty slot it is the same reply.
  for _ in range(2):
    ask(scheduler, tokenizer, [user('x' * 40), {'role': 'assistant', 'content': 'y'}, user('z')])
    ask(scheduler, tokenizer, [user('q' * 40)])
  fresh, third = ask(scheduler, tokenizer, messages)
  assert third.cached_tokens < second.cached_tokens and ''.join(fresh) == ''.join(again)


def test_a_stop_string_ends_a_reply_in_the_middle_of_its_tokens(scheduler, tokenizer):
  messages = [user('You arrive at shelf 1.')]
  text = ''.join(ask(scheduler, tokenizer, messages)[0])
  stop = text[3:7]
  assert stop and stop not in text[:6]
  cut, outcome = ask(scheduler, tokenizer, messages, stop=(stop,))
  assert ''.join(cut) == text[:3] and outcome.finish_reason == 'stop'
  assert outcome.completion_tokens <= 12


def test_a_cancelled_request_frees_its_slot(scheduler, tokenizer):
  request = chat.Request('tiny', chat.render(tokenizer, [user('a')]), 200, streams=True)
  scheduler.submit(request)
  assert request.events.get(timeout=60)[0] == 'text'
  request.cancelled = True
  while (event := request.events.get(timeout=60))[0] == 'text':
    pass
  assert event[0] == 'done' and event[1].completion_tokens < 200
  assert ask(scheduler, tokenizer, [user('b')])[1].completion_tokens == 12


def test_a_full_queue_and_an_engine_that_cannot_be_made_are_told(tokenizer):
  begun, go = threading.Event(), threading.Event()

  def make(sampling):
    begun.set()
    go.wait(60)
    raise RuntimeError('no memory')

  scheduler = chat.Scheduler(
    tokenizer, make, ['tiny'], max_context=256, max_waiting=1)
  parts = chat.render(tokenizer, [user('a')])
  first = chat.Request('tiny', parts, 4)
  scheduler.submit(first)
  assert begun.wait(60)
  with pytest.raises(chat.Busy, match='1 requests are waiting'):
    scheduler.submit(chat.Request('tiny', parts, 4))
  go.set()
  kind, text = first.events.get(timeout=60)
  assert kind == 'error' and 'RuntimeError' in text
  later = chat.Request('tiny', parts, 4)
  scheduler.submit(later)
  assert later.events.get(timeout=60)[0] == 'error'
  scheduler.close()


class OneToken:
  """An engine that answers every turn with one token, or with all that were asked for.

  Attributes:
    budgets: tokens that the turns asked for.
  """

  num_slots = 2

  def __init__(self, obliging=False):
    self.asked, self.budgets, self.policies, self.obliging = {}, [], [], obliging

  @property
  def busy(self):
    return len(self.asked)

  def submit(self, slot, tokens, max_new_tokens, *, policy=None, **_):
    self.policies.append(policy)
    self.asked[slot] = len(tokens), max_new_tokens if self.obliging else 1
    self.budgets.append(max_new_tokens)

  def step(self):
    asked, self.asked = self.asked, {}
    return [
      Completion(slot, np.full(m, 65, np.int32), np.zeros(m, np.float32), 'length', n, n)
      for slot, (n, m) in asked.items()]


@pytest.mark.parametrize('options, budgets', [
  ({'streams': True}, [1, 3, 12, 16, 8]), ({'stop': ('never',)}, [16, 16, 8]), ({}, [40])])
def test_a_stream_s_first_token_waits_for_no_second_one(tokenizer, options, budgets):
  engine = OneToken(obliging=True)
  scheduler = chat.Scheduler(
    tokenizer, lambda sampling: engine, ['tiny'], max_context=256, max_waiting=4, piece=16)
  text, outcome = ask(scheduler, tokenizer, [user('a')], max_new_tokens=40, **options)
  scheduler.close()
  assert engine.budgets == budgets and outcome.completion_tokens == 40
  assert ''.join(text) == tokenizer.decode([65] * 40)
  if options.get('streams'):
    assert text[0] == tokenizer.decode([65])


@pytest.mark.parametrize('streams', [False, True])
def test_an_empty_generation_is_an_empty_reply(tokenizer, monkeypatch, streams):
  end, engine = tokenizer.chat.end_of_turn, OneToken()
  monkeypatch.setattr(engine, 'step', lambda: [
    Completion(slot, np.array([end], np.int32), np.zeros(1, np.float32), 'stop', n, n)
    for slot, (n, _) in [engine.asked.popitem()]])
  scheduler = chat.Scheduler(
    tokenizer, lambda sampling: engine, ['tiny'], max_context=256, max_waiting=4)
  text, outcome = ask(scheduler, tokenizer, [user('a')], streams=streams)
  scheduler.close()
  assert text == [] and outcome.finish_reason == 'stop' and outcome.completion_tokens == 1


def test_engines_that_are_idle_make_room_for_others(tokenizer):
  made = []

  def make(sampling):
    made.append(sampling.temperature)
    return OneToken()

  scheduler = chat.Scheduler(
    tokenizer, make, ['tiny'], max_context=256, max_waiting=4, max_engines=1)
  for temperature in (0.0, 0.0, 0.5, 0.0):
    ask(scheduler, tokenizer, [user('a')], sampling=chat.Sampling(temperature), max_new_tokens=1)
  assert made == [0.0, 0.5, 0.0]
  scheduler.close()


def test_an_engine_that_cannot_be_made_takes_no_other_with_it(tokenizer):
  def make(sampling):
    if sampling.temperature:
      raise MemoryError
    return OneToken()

  scheduler = chat.Scheduler(tokenizer, make, ['tiny'], max_context=256, max_waiting=4)
  for temperature in (0.0, 0.5, 0.0):
    request = chat.Request(
      'tiny', chat.render(tokenizer, [user('a')]), 1, sampling=chat.Sampling(temperature))
    scheduler.submit(request)
    kind, value = request.events.get(timeout=60)
    assert (kind == 'error' and 'MemoryError' in value) == bool(temperature)
  scheduler.close()


def test_an_engine_that_breaks_is_told_to_all(tokenizer, monkeypatch):
  engine = OneToken()
  monkeypatch.setattr(engine, 'step', lambda: 1 / 0)
  scheduler = chat.Scheduler(
    tokenizer, lambda sampling: engine, ['tiny'], max_context=256, max_waiting=4)
  for _ in range(2):
    request = chat.Request('tiny', chat.render(tokenizer, [user('a')]), 1)
    scheduler.submit(request)
    assert request.events.get(timeout=60) == (
      'error', 'the engine has failed (ZeroDivisionError); start the server again')
  scheduler.close()


def test_models_are_the_policies_of_one_engine_and_find_only_their_own_conversations(tokenizer):
  made = []

  def make(sampling):
    made.append(OneToken())
    return made[-1]

  scheduler = chat.Scheduler(
    tokenizer, make, ['tiny', 'student'], max_context=256, max_waiting=4)
  messages = [user('You see a desk 1.')]
  cached = [
    ask(scheduler, tokenizer, messages, model, max_new_tokens=1)[1].cached_tokens > 0
    for model in ('tiny', 'student', 'tiny', 'student')]
  # A third conversation takes the slot of the first; that with the other model stays.
  other = [user('Something else.')]
  cached += [
    ask(scheduler, tokenizer, asked, model, max_new_tokens=1)[1].cached_tokens > 0
    for asked, model in ((other, 'student'), (messages, 'student'), (messages, 'tiny'))]
  scheduler.close()
  assert cached == [False, False, True, True, False, True, False]
  assert len(made) == 1 and made[0].policies == [0, 1, 0, 1, 1, 1, 0]
