"""The server as the official client sees it, and what it refuses."""

import concurrent.futures
import http.client
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import openai
import pytest

import serve
from agents import policy
from configs import serve as config_lib
from data import errors
from data.tokenizer import Tokenizer
from models import decoder, registry, weights
from models.lora import LoraConfig
from tests import programs
from tests.agents import fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMITS = {'slots': 3, 'max_context': 256, 'max_new_tokens': 24, 'max_request_bytes': 20_000,
          'max_connections': 12, 'queue': 16, 'port': 0, 'piece': 4, 'decode_steps': 4}


def make_config(**values):
  return config_lib.common.with_values(config_lib.DEFAULTS, {**LIMITS, **values})


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  folder = fakes.tokenizer_folder(tmp_path_factory.mktemp('serve') / 'tokenizer')
  tokenizer = Tokenizer.load(folder)
  config = registry.shrink(
    registry.get_config('smollm2_135m'), vocab_size=tokenizer.vocab_size, max_position=256)
  base = policy.Base('tiny', config, tokenizer, None, seed=1)
  lora = LoraConfig(4, 64.0)
  params = jax.device_get(decoder.to_params(base.with_adapter(lora, seed=2).lora))
  # B is zero at first: give the adapter an effect.
  rng = np.random.default_rng(0)
  params = {name: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
            for name, x in params.items()}
  adapter = tmp_path_factory.mktemp('serve') / 'adapter'
  weights.export_peft(adapter, config, lora, params, 'tiny')
  made = serve.make_server(make_config(adapters=f'student:{adapter}'), base)
  thread = threading.Thread(target=made.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()
  yield made
  made.shutdown()
  thread.join()
  made.server_close()
  made.scheduler.close()


@pytest.fixture
def client(server):
  with openai.OpenAI(
    base_url=f'http://127.0.0.1:{server.server_port}/v1', api_key='none', max_retries=0,
    timeout=300) as made:
    yield made


def user(text):
  return {'role': 'user', 'content': text}


def create(client, *messages, model='tiny', **options):
  return client.chat.completions.create(
    model=model, messages=list(messages), **{'max_tokens': 12, **options})


def test_the_official_client_gets_models_replies_and_streams(client):
  assert [m.id for m in client.models.list()] == ['tiny', 'student']
  assert client.models.retrieve('student').id == 'student'
  whole = create(client, user('You see a lever 1.'))
  (choice,) = whole.choices
  assert choice.message.role == 'assistant' and choice.finish_reason in ('length', 'stop')
  assert whole.usage.completion_tokens <= 12
  assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
  chunks = list(create(
    client, user('You see a lever 1.'), stream=True, stream_options={'include_usage': True}))
  text = ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices)
  assert text == choice.message.content
  assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
  assert chunks[-2].choices[0].finish_reason == choice.finish_reason
  assert len({c.id for c in chunks}) == 1


def test_an_adapter_is_chosen_by_the_model_s_name(client):
  message = user('You are in a hall.')
  base, student = (
    create(client, message, model=name).choices[0].message.content for name in ('tiny', 'student'))
  assert base != student


def test_requests_at_the_same_time_get_what_they_get_alone(client):
  asked = [(user(f'You arrive at shelf {i // 2}.'), ('tiny', 'student')[i % 2]) for i in range(6)]
  reply = lambda pair: create(client, pair[0], model=pair[1]).choices[0].message.content
  alone = [reply(pair) for pair in asked]
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    together = list(pool.map(reply, asked))
  assert together == alone and len(set(alone)) > 2


def test_a_stop_string_and_a_kept_conversation(client):
  first = create(client, user('You see a desk 1.'))
  text = first.choices[0].message.content
  cut = create(client, user('You see a desk 1.'), stop=[text[3:6]], stream=True)
  streamed = list(cut)
  assert ''.join(c.choices[0].delta.content or '' for c in streamed) == (
    text[:text.index(text[3:6])])
  assert streamed[-1].choices[0].finish_reason == 'stop'
  again = create(client, user('You see a desk 1.'))
  second = create(
    client, user('You see a desk 1.'),
    {'role': 'assistant', 'content': again.choices[0].message.content}, user('OK.'))
  details = second.usage.prompt_tokens_details
  assert details.cached_tokens >= again.usage.total_tokens - 1


@pytest.mark.parametrize('options, status, says', [
  ({'model': 'other'}, 404, "There is no model 'other'; there are tiny, student."),
  ({'max_tokens': 25}, 400, 'at most 24 tokens here, and 25 are asked for'),
  ({'max_tokens': 0}, 400, 'max_tokens must be a whole number from 1'),
  ({'temperature': 3}, 400, 'temperature must be a number from 0 to 2'),
  ({'n': 2}, 400, 'n is not supported'),
  ({'stop': ['']}, 400, 'stop must be a string'),
  ({'tools': [{'type': 'function', 'function': {'name': 'f'}}]}, 400, 'tools is not supported'),
  ({'extra_body': {'best': 1}}, 400, "The field 'best' is not known here"),
  ({'messages': []}, 400, 'at least one message'),
  ({'messages': [{'role': 'tool', 'content': 'x', 'tool_call_id': '1'}]}, 400, 'messages[0]'),
  ({'messages': [user('x'), {'role': 'assistant', 'content': 'y'}]}, 400, 'must be of the user'),
  ({'messages': [user([{'type': 'image_url', 'image_url': {'url': 'file:///etc/passwd'}}])]}, 400,
   'parts of type text only'),
  ({'messages': [user('word ' * 300)]}, 400, 'together they may have 256')])
def test_bad_requests_are_one_clear_error(client, options, status, says):
  with pytest.raises(openai.APIStatusError) as raised:
    client.chat.completions.create(**{'model': 'tiny', 'messages': [user('x')], **options})
  assert raised.value.status_code == status and says in raised.value.body['message']


def raw(server, method, path, body=b'', **headers):
  connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=60)
  connection.request(method, path, body, {
    'Content-Type': 'application/json', **{k.replace('_', '-'): v for k, v in headers.items()}})
  answer = connection.getresponse()
  content = answer.read()
  connection.close()
  return answer.status, json.loads(content)['error']['message'] if content else ''


@pytest.mark.parametrize('method, path, body, headers, status', [
  ('POST', '/v1/chat/completions', b'{"a":', {}, 400),
  ('POST', '/v1/chat/completions', b'[]', {}, 400),
  ('POST', '/v1/chat/completions', b'[' * 15_000, {}, 400),
  ('POST', '/v1/chat/completions', b'{}', {'Content_Type': 'text/plain'}, 415),
  ('POST', '/v1/chat/completions', b'x' * 20_001, {}, 413),
  ('POST', '/v1/chat/completions', b'', {'Content_Length': '9' * 5_000}, 413),
  ('POST', '/v1/chat/completions', b'', {'Content_Length': '-5'}, 411),
  ('GET', '/v1/chat/completions', b'', {}, 405),
  ('DELETE', '/v1/models', b'', {}, 405),
  ('GET', '/../../etc/passwd', b'', {}, 404),
  ('GET', '/v1/models/../serve.py', b'', {}, 404),
  ('POST', '/v1/files', b'{}', {}, 404),
  ('GET', '/v1/models', b'', {'Host': 'evil.example'}, 403)])
def test_what_is_no_request_is_refused(server, method, path, body, headers, status):
  found, says = raw(server, method, path, body, **headers)
  assert found == status and says.endswith(('.', ').'))


def test_a_full_queue_is_429(server, client, monkeypatch):
  def full(request):
    raise serve_chat.Busy('16 requests are waiting; try again later.')

  from agents import chat as serve_chat
  monkeypatch.setattr(server.scheduler, 'submit', full)
  with pytest.raises(openai.RateLimitError, match='16 requests are waiting'):
    create(client, user('x'))


def test_more_connections_than_places_are_503(server):
  held = [socket.create_connection(('127.0.0.1', server.server_port)) for _ in range(12)]
  for connection in held:
    connection.sendall(b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\n')
  extra = socket.create_connection(('127.0.0.1', server.server_port), timeout=30)
  assert extra.recv(100).startswith(b'HTTP/1.1 503')
  for connection in [*held, extra]:
    connection.close()


def test_a_client_that_goes_away_leaves_the_server_working(server, client):
  connection = http.client.HTTPConnection('127.0.0.1', server.server_port)
  connection.request(
    'POST', '/v1/chat/completions', json.dumps(
      {'model': 'tiny', 'messages': [user('x')], 'stream': True}),
    {'Content-Type': 'application/json'})
  connection.getresponse().read(10)
  connection.close()
  assert create(client, user('y')).choices


@pytest.mark.parametrize('values, says', [
  ({'adapters': 'student'}, "'student' is not of the form NAME:FOLDER"),
  ({'adapters': 'a:x;a:y'}, "gives the name 'a' to two policies"),
  ({'adapters': 'a:nowhere'}, 'nowhere is no PEFT adapter folder'),
  ({'host': 'localhost'}, 'host=localhost is no IPv4 address'),
  ({'max_new_tokens': 256}, 'leaves no room'),
  ({'slots': 0}, 'slots must be at least 1'),
  ({'lookup': -1}, 'lookup=-1 is negative'),
  ({'cache_dtype': 'int4'}, 'cache_dtype=int4 is not float32, bfloat16 or int8')])
def test_a_wrong_config_is_one_sentence(values, says):
  with pytest.raises(errors.UserError, match=says):
    serve.make_server(make_config(**values))


@pytest.mark.slow
def test_the_program_serves_until_it_is_told_to_stop(tmp_path):
  folder = fakes.tokenizer_folder(tmp_path / 'tokenizer')
  arg = f'base=random,shrink=true,tokenizer={folder},port=0,max_context=256,max_new_tokens=8'
  arg += ',lookup=2,cache_dtype=int8'
  with subprocess.Popen(
    [sys.executable, 'serve.py', f'--config=configs/serve.py:{arg}'], cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=programs.environment(),
  ) as process:
    line = process.stdout.readline()
    assert line.startswith('serving smollm2_135m_tiny at http://127.0.0.1:')
    with openai.OpenAI(base_url=line.split()[-1], api_key='none') as client:
      answer = create(client, user('Hello'), model='smollm2_135m_tiny', max_tokens=4)
      assert answer.usage.completion_tokens <= 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, process.stderr.read()
    assert 'Traceback' not in process.stderr.read()
