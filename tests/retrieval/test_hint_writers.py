"""The writers with a model: parsing, counting, going on, a real local server."""

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import types
import typing
import urllib.error
import urllib.request

import pytest

from data import errors
from retrieval import hint_writers, hints
from tests.retrieval.episodes import EFFECT, LABELLED, episode

GOOD = json.dumps({'hints': ['Open the kiln 1 before you sort the mug with it.', 'Take {object}.']})


@pytest.mark.parametrize('reply, texts', [
  ('{"hints": ["A.", "B."]}', ['A.', 'B.']),
  ('```json\n["A."]\n```', ['A.']),
  ('Here it is: {"hints": ["A."]} as asked', ['A.']),
  ('- A one.\n- B two.\n', ['A one.', 'B two.']),
  ('1. A one.\n2) B two.', ['A one.', 'B two.']),
  ('{"hints": []}', []),
  ('{"hints": "A."}', None),
  ('{"rules": ["A."]}', None),
  ('I cannot say.', None),
  ('', None),
])
def test_replies(reply, texts):
  assert hint_writers.parse_reply(reply) == texts


def test_requests_hold_the_whole_trace():
  long = [(f'go to shelf {i}', f'You arrive at shelf {i}.') for i in range(300)]
  text = hint_writers.hint_messages(episode(long), as_json=True)[1]['content']
  assert all(f'> go to shelf {i}\n' in text for i in range(300))


def test_the_policy_writes_and_what_is_dropped_is_counted(tmp_path):
  replies = iter([
    GOOD, 'no idea', None, json.dumps({'hints': ['x' * 121, *(f'Rule {c}.' for c in 'abcde')]})])
  asked = []

  def generate(chats):
    asked.extend(chats)
    return [next(replies) for _ in chats]

  failures = [episode(LABELLED, id=f'e{i}', instruction=f'make a dotted {t}.')
              for i, t in enumerate(('mug', 'cup', 'pen', 'box'))]
  path = tmp_path / 'answers.jsonl'
  writer = hint_writers.PolicyWriter(generate, model='tiny', answers_path=path, batch=3)
  written = writer.write(failures)
  assert written == [
    ['Open the kiln before you sort {object} with it.', 'Take {object}.'], [], [],
    ['Rule a.', 'Rule b.', 'Rule c.', 'Rule d.']]
  assert writer.counts['malformed_replies'] == 1 and writer.counts['context_overflow'] == 1
  assert writer.counts['hints_too_long'] == 1 and writer.counts['hints_beyond_four'] == 1
  # A second call asks only for what is missing, also behind a torn line.
  with open(path, 'a') as f:
    f.write('{"key": "ab')
  again = hint_writers.PolicyWriter(lambda chats: ['- Take {object}.'] * len(chats), model='tiny',
                                    answers_path=path)
  assert again.write(failures)[2] == ['Take {object}.']
  assert again.counts['replies_from_an_earlier_call'] == 3
  silent = lambda chats: [''] * len(chats)
  third = hint_writers.PolicyWriter(silent, model='tiny', answers_path=path)
  third.write(failures)
  assert third.counts['replies_from_an_earlier_call'] == 4
  # Another model's replies are not its own.
  other = hint_writers.PolicyWriter(silent, model='big', answers_path=path)
  other.write(failures)
  assert other.counts['replies_from_an_earlier_call'] == 0


class _Server(http.server.BaseHTTPRequestHandler):
  """Answers each request with the next (status, body) of `script`; the last one stays."""

  def do_POST(self):
    server = self.server
    body = self.rfile.read(int(self.headers['Content-Length']))
    server.requests.append((self.path, dict(self.headers), json.loads(body)))
    status, answer = server.script.pop(0) if len(server.script) > 1 else server.script[0]
    self.send_response(status)
    self.end_headers()
    self.wfile.write(answer.encode())

  def log_message(self, *args):
    pass


@pytest.fixture
def server():
  httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Server)
  httpd.script, httpd.requests = [], []
  httpd.url = f'http://127.0.0.1:{httpd.server_port}/v1'
  thread = threading.Thread(target=httpd.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()
  yield httpd
  httpd.shutdown()
  thread.join()
  httpd.server_close()


def _completion(text, **message):
  """A chat completion with every field that the protocol requires."""
  return json.dumps({
    'id': 'chatcmpl-1', 'object': 'chat.completion', 'created': 1_900_000_000, 'model': 'strong',
    'choices': [{
      'index': 0, 'finish_reason': 'stop', 'logprobs': None,
      'message': {'role': 'assistant', 'content': text, 'refusal': None} | message}],
    'usage': {'prompt_tokens': 9, 'completion_tokens': 3, 'total_tokens': 12}})


def _error(message, kind='server_error', code=None):
  """An error body as the protocol has it."""
  return json.dumps({'error': {'message': message, 'type': kind, 'param': None, 'code': code}})


def _writer(server, path=None, **options):
  options = dict(timeout_s=5, backoff_s=0.001, show=lambda _: None) | options
  return hint_writers.OpenAIWriter(server.url, 'strong', answers_path=path, **options)


def test_a_server_of_the_protocol(server, monkeypatch):
  monkeypatch.setenv('OPENAI_API_KEY', 'secret')
  server.script = [(200, _completion(GOOD))]
  writer = _writer(server)
  bank = hints.distil([episode(LABELLED)], writer)
  assert [h.text for h in bank.hints] == [
    'Open the kiln before you sort {object} with it.', 'Take {object}.']
  path, headers, body = server.requests[0]
  assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret'
  assert body['temperature'] == 0 and body['model'] == 'strong'
  assert body['response_format'] == {'type': 'json_object'}
  assert 'secret' not in json.dumps(bank.provenance)


def test_retries_are_bounded_counted_and_shown(server, monkeypatch):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  server.script = [
    (503, _error('The engine is overloaded.')), (429, _error('Too fast.', 'requests')),
    (200, _completion('nonsense'))]
  shown = []
  writer = _writer(server, show=shown.append)
  assert writer.write([episode(LABELLED)]) == [[]]
  assert writer.counts['retries'] == 2 and len(shown) == 2 and '503' in shown[0]
  assert writer.counts['malformed_replies'] == 1
  assert 'Authorization' not in server.requests[0][1]


def test_what_came_is_kept_when_the_server_fails(server, tmp_path):
  failures = [episode(LABELLED, id='a'), episode(EFFECT, id='b')]
  server.script = [(200, _completion(GOOD)), (500, _error('down'))]
  with pytest.raises(errors.UserError, match=r'3 attempts.*1 of 2 episodes'):
    _writer(server, tmp_path / 'a.jsonl', retries=2).write(failures)
  assert len(server.requests) == 4
  server.script = [(200, _completion(GOOD))]
  second = _writer(server, tmp_path / 'a.jsonl')
  assert all(second.write(failures)) and len(server.requests) == 5
  assert second.counts['replies_from_an_earlier_call'] == 1


@pytest.mark.parametrize('answer, message', [
  ((401, _error('Incorrect API key provided.', 'invalid_request_error', 'invalid_api_key')),
   r'refused: 401.*Incorrect API key provided'),
  ((404, _error('The model `strong` does not exist.', 'invalid_request_error')),
   r'refused: 404.*`strong` does not exist'),
  ((200, '<html>'), 'OpenAI chat protocol'),
  ((200, '{"choices": []}'), 'OpenAI chat protocol'),
])
def test_answers_that_repeating_does_not_mend(server, answer, message):
  server.script = [answer]
  with pytest.raises(errors.UserError, match=message):
    _writer(server).write([episode(LABELLED)])
  assert len(server.requests) == 1


def test_a_model_that_declines_is_counted_and_the_others_are_asked(server, monkeypatch):
  # `content` may be null: a refusal, or all tokens spent on what is not shown.
  server.script = [
    (200, _completion(None, refusal='I cannot help.')), (200, _completion(GOOD))]
  writer = _writer(server)
  first, second = writer.write([episode(LABELLED, id='a'), episode(EFFECT, id='b')])
  assert first == [] and len(second) == 2
  assert writer.counts['malformed_replies'] == 1


def test_the_request_is_the_one_of_the_official_client(server, monkeypatch):
  openai = pytest.importorskip('openai')
  import pydantic
  from openai.types.chat import ChatCompletion, completion_create_params
  monkeypatch.setenv('OPENAI_API_KEY', 'secret')
  server.script = [(200, _completion(GOOD))]
  _writer(server).write([episode(LABELLED)])
  path, headers, body = server.requests[0]
  # Nothing in it that the protocol does not know, and every value of its type.
  protocol = completion_create_params.CompletionCreateParamsNonStreaming
  assert set(body) <= set(typing.get_type_hints(protocol))
  pydantic.TypeAdapter(protocol).validate_python(body)

  # Their client, asked for the same, sends the same and understands this test's server.
  client = openai.OpenAI(base_url=server.url, max_retries=0)
  reply = client.chat.completions.create(**body)
  assert reply.choices[0].message.content == GOOD and reply.usage.total_tokens == 12
  ChatCompletion.model_validate(json.loads(_completion(GOOD)), strict=True)
  assert server.requests[1][0] == path and server.requests[1][2] == body
  lowered = [{name.lower(): value for name, value in found.items()}
             for found in (headers, server.requests[1][1])]
  for name in ('authorization', 'content-type', 'host'):
    assert lowered[0][name] == lowered[1][name]
  for status, kind in (
      (401, openai.AuthenticationError), (404, openai.NotFoundError),
      (429, openai.RateLimitError), (503, openai.InternalServerError)):
    server.script = [(status, _error('no'))]
    with pytest.raises(kind) as caught:
      client.chat.completions.create(**body)
    assert caught.value.body['message'] == 'no'


@pytest.fixture(scope='module')
def transformers_server(tmp_path_factory):
  """`transformers serve` with a tiny model: (base URL, model folder)."""
  for name in ('torch', 'transformers', 'fastapi', 'uvicorn', 'openai'):
    pytest.importorskip(name)
  import torch
  import transformers

  from tests.agents import fakes
  folder = fakes.tokenizer_folder(tmp_path_factory.mktemp('served'))
  settings = json.loads((folder / 'tokenizer_config.json').read_text())
  settings['tokenizer_class'] = 'PreTrainedTokenizerFast'
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=48, max_position_embeddings=4096,
    initializer_range=0.5, bos_token_id=0, eos_token_id=2, pad_token_id=0,
  )).save_pretrained(folder)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  log = folder.with_name('server.log')
  with open(log, 'w') as out:
    process = subprocess.Popen(
      [sys.executable, '-c', 'from transformers.cli.transformers import main; main()', 'serve',
       str(folder), '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu',
       '--dtype', 'float32'], stdout=out, stderr=subprocess.STDOUT)
  try:
    for _ in range(1200):
      assert process.poll() is None, log.read_text()[-2000:]
      try:
        urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5).close()
        break
      except (urllib.error.URLError, TimeoutError):
        time.sleep(0.25)
    yield f'http://127.0.0.1:{port}/v1', folder
  finally:
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_a_real_server_of_the_protocol(transformers_server, tmp_path):
  import torch
  import transformers
  url, folder = transformers_server
  failures = [episode(LABELLED, id='a'), episode(EFFECT, id='b')]
  writer = hint_writers.OpenAIWriter(
    url, str(folder), answers_path=tmp_path / 'a.jsonl', timeout_s=120)
  bank = hints.distil(failures, writer)
  assert writer.counts['retries'] == 0
  assert bank.provenance['writer'] == {'name': 'openai', 'model': str(folder), 'base_url': url}

  # The replies are what that model says to these chats.
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  stored = [json.loads(line) for line in (tmp_path / 'a.jsonl').read_text().splitlines()]
  assert [answer['episode_id'] for answer in stored] == ['a', 'b']
  for failure, answer in zip(failures, stored, strict=True):
    messages = hint_writers.hint_messages(failure, as_json=True)
    prompt = tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    with torch.no_grad():
      ids = model.generate(**prompt, max_new_tokens=400, do_sample=False)
    reply = tokenizer.decode(ids[0, prompt['input_ids'].shape[1]:], skip_special_tokens=True)
    assert answer['reply'] == reply and reply

  # What it refuses is told in its own words, at once.
  with pytest.raises(errors.UserError, match=r'refused: 400.*Server is pinned to'):
    hint_writers.OpenAIWriter(url, 'another-model').write(failures)
  with pytest.raises(errors.UserError, match='refused: 404'):
    hint_writers.OpenAIWriter(url.removesuffix('/v1'), str(folder)).write(failures)


def test_no_server_and_no_address():
  with pytest.raises(errors.UserError, match='2 attempts'):
    hint_writers.OpenAIWriter(
      'http://127.0.0.1:9/v1', 'm', retries=1, backoff_s=0.001, show=lambda _: None,
    ).write([episode(LABELLED)])
  with pytest.raises(errors.UserError, match='not a server address'):
    hint_writers.OpenAIWriter('localhost:8000', 'm')


def test_the_engine_as_the_policy(smollm2_path):
  from data.tokenizer import Tokenizer
  from models import decoder, registry
  tokenizer = Tokenizer.load(smollm2_path)
  config = registry.shrink(
    registry.get_config('smollm2_135m'), vocab_size=tokenizer.vocab_size, num_layers=1)
  generate = hint_writers.engine_generate(
    decoder.create(config), tokenizer, slots=2, max_context=384, max_new_tokens=4)
  short = [{'role': 'system', 'content': 'Hello.'}, {'role': 'user', 'content': 'Rules:'}]
  long = [short[0], {'role': 'user', 'content': 'word ' * 500}]
  replies = generate([short, long, short])
  assert replies[1] is None
  assert isinstance(replies[0], str) and replies[0] == replies[2]


def test_the_policy_writes_the_bank_of_its_own_failures(smollm2_path, tmp_path, monkeypatch):
  from data import trajectory
  from data.tokenizer import Tokenizer
  from models import decoder, registry
  # The whole command with writer=self; the tiny random policy's reply is replaced by one that can
  # be parsed, everything before and after it is the real thing.
  tokenizer = Tokenizer.load(smollm2_path)
  config = registry.shrink(
    registry.get_config('smollm2_135m'), vocab_size=tokenizer.vocab_size, num_layers=1)
  asked = []

  def load_policy():
    asked.append('policy')
    return decoder.create(config), tokenizer, 'tiny'

  real = hint_writers.engine_generate

  def replied(model, read, **options):
    generate = real(model, read, **options, max_new_tokens=2)
    return lambda chats: [
      reply if reply is None else '- Examine the loom first.' for reply in generate(chats)]

  monkeypatch.setattr(hint_writers, 'engine_generate', replied)
  journal = trajectory.Journal(tmp_path / 'run' / trajectory.JOURNAL_NAME)
  journal.append(episode(LABELLED))
  journal.close()
  out = tmp_path / 'bank.json'
  flags = types.SimpleNamespace(
    episodes=str(tmp_path / 'run'), out=str(out), writer='self', model='', adapter='', slots=2,
    max_context=1024)
  bank = hints.main(flags, load_policy)
  assert asked == ['policy']
  assert [hint.text for hint in bank.hints] == ['Examine the loom first.']
  assert bank.provenance['writer'] == {'name': 'self', 'model': 'tiny'}
  assert hints.HintBank.load(out).hints == bank.hints
