"""The writers with a model: parsing, counting, going on, a real local server."""

import http.server
import json
import threading
import types

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


def _completion(text):
  return json.dumps({'choices': [{'message': {'role': 'assistant', 'content': text}}]})


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
  server.script = [(503, 'busy'), (429, 'slow'), (200, _completion('nonsense'))]
  shown = []
  writer = _writer(server, show=shown.append)
  assert writer.write([episode(LABELLED)]) == [[]]
  assert writer.counts['retries'] == 2 and len(shown) == 2 and '503' in shown[0]
  assert writer.counts['malformed_replies'] == 1
  assert 'Authorization' not in server.requests[0][1]


def test_what_came_is_kept_when_the_server_fails(server, tmp_path):
  failures = [episode(LABELLED, id='a'), episode(EFFECT, id='b')]
  server.script = [(200, _completion(GOOD)), (500, 'down')]
  with pytest.raises(errors.UserError, match=r'3 attempts.*1 of 2 episodes'):
    _writer(server, tmp_path / 'a.jsonl', retries=2).write(failures)
  assert len(server.requests) == 4
  server.script = [(200, _completion(GOOD))]
  second = _writer(server, tmp_path / 'a.jsonl')
  assert all(second.write(failures)) and len(server.requests) == 5
  assert second.counts['replies_from_an_earlier_call'] == 1


@pytest.mark.parametrize('answer, message', [
  ((401, 'who are you'), 'refused: 401'),
  ((200, '<html>'), 'OpenAI chat protocol'),
  ((200, '{"choices": []}'), 'OpenAI chat protocol'),
])
def test_answers_that_repeating_does_not_mend(server, answer, message):
  server.script = [answer]
  with pytest.raises(errors.UserError, match=message):
    _writer(server).write([episode(LABELLED)])
  assert len(server.requests) == 1


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
