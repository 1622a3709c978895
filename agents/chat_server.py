"""The OpenAI chat protocol over HTTP: `/v1/models` and `/v1/chat/completions`.

Reads no file and knows no path but these. What a request asks for that cannot be given is refused
with a sentence, never left out silently.
"""

import contextlib
import http.server
import ipaddress
import json
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from agents import chat
from data import errors
from data.tokenizer import Tokenizer

# Seconds that a client may take to send a request, or to read a piece of the answer.
TIMEOUT_S = 60
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
# Fields that ask for nothing beyond what is done anyway, with the values that do so; None is any.
_NEUTRAL: dict[str, tuple | None] = {
  'user': None, 'metadata': None, 'store': (False,), 'n': (1,), 'frequency_penalty': (0,),
  'presence_penalty': (0,), 'logprobs': (False,), 'tools': ([],), 'logit_bias': ({},),
  'response_format': ({'type': 'text'},), 'service_tier': ('auto', 'default'),
  'parallel_tool_calls': None}
_READ = ('model', 'messages', 'max_tokens', 'max_completion_tokens', 'temperature', 'top_p', 'seed',
         'stop', 'stream', 'stream_options')


class Refusal(Exception):
  """A request that is answered with an error."""

  def __init__(self, status: int, message: str, *, code: str = '', param: str = ''):
    """As the protocol has it: HTTP status, sentence, machine-readable code, field."""
    super().__init__(message)
    self.status, self.code, self.param = status, code, param

  def body(self) -> dict[str, Any]:
    kind = {429: 'rate_limit_error', 500: 'server_error', 503: 'server_error'}.get(
      self.status, 'invalid_request_error')
    return {'error': {'message': str(self), 'type': kind, 'param': self.param or None,
                      'code': self.code or None}}


def _number(body: Mapping[str, Any], name: str, low: float, high: float, whole: bool = False):
  value = body.get(name)
  kinds = (int,) if whole else (int, float)
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
    kind = 'a whole number' if whole else 'a number'
    raise Refusal(400, f'{name} must be {kind} from {low:g} to {high:g}.', param=name)
  return value


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
  messages = body.get('messages')
  if not isinstance(messages, list) or not messages:
    raise Refusal(400, 'messages must be a list with at least one message.', param='messages')
  found = []
  for number, message in enumerate(messages):
    where = f'messages[{number}]'
    if not isinstance(message, dict) or message.get('role') not in chat.ROLES:
      raise Refusal(
        400, f'{where} needs a role of {", ".join(chat.ROLES)}.', param=where)
    content = message.get('content')
    if isinstance(content, list):
      if not all(isinstance(part, dict) and part.get('type') == 'text'
                 and isinstance(part.get('text'), str) for part in content):
        raise Refusal(400, f'{where}.content may hold parts of type text only.', param=where)
      content = ''.join(part['text'] for part in content)
    if not isinstance(content, str):
      raise Refusal(400, f'{where}.content must be text.', param=where)
    for key in ('tool_calls', 'function_call', 'audio'):
      if message.get(key):
        raise Refusal(400, f'{where} has {key}, which this model does not know.', param=where)
    found.append({'role': message['role'], 'content': content})
  if found[-1]['role'] != 'user':
    raise Refusal(400, 'The last message must be of the user.', param='messages')
  return found


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
  stop = body.get('stop')
  stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list) or len(stop) > MAX_STOP_STRINGS or not all(
      isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stop):
    raise Refusal(
      400, f'stop must be a string, or up to {MAX_STOP_STRINGS} of them, each of 1 to '
      f'{MAX_STOP_CHARACTERS} characters.', param='stop')
  return tuple(stop)


def read_request(
  body: Any, tokenizer: Tokenizer, scheduler: chat.Scheduler, *, max_new_tokens: int,
  temperature: float,
) -> tuple[chat.Request, bool]:
  """A request from the JSON of its body.

  Args:
    body: decoded JSON.
    tokenizer: the models'.
    scheduler: knows the models and the context.
    max_new_tokens: most tokens of a reply, and what is taken where the request names none.
    temperature: where the request names none.

  Returns:
    The request, and whether a stream ends with the usage.

  Raises:
    Refusal: it asks for what there is not.
  """
  if not isinstance(body, dict):
    raise Refusal(400, 'The body must be a JSON object.')
  for name, value in body.items():
    if name in _READ or value is None:
      continue
    if name not in _NEUTRAL:
      raise Refusal(400, f'The field {name!r} is not known here; leave it out.', param=name)
    if _NEUTRAL[name] is not None and value not in _NEUTRAL[name]:
      raise Refusal(400, f'{name} is not supported; leave it out.', param=name)
  model = body.get('model')
  if model not in scheduler.models:
    raise Refusal(
      404, f'There is no model {model!r}; there are {", ".join(scheduler.models)}.',
      code='model_not_found', param='model')
  stream, options = body.get('stream'), body.get('stream_options')
  if stream not in (None, True, False):
    raise Refusal(400, 'stream must be true or false.', param='stream')
  if options is not None and (not stream or not isinstance(options, dict)):
    raise Refusal(
      400, 'stream_options must be an object and goes with stream.', param='stream_options')
  room = scheduler.max_context
  asked = _number(body, 'max_completion_tokens', 1, room, whole=True)
  asked = asked or _number(body, 'max_tokens', 1, room, whole=True)
  sampled_at = _number(body, 'temperature', 0, 2)
  top_p = _number(body, 'top_p', 0, 1)
  if top_p == 0:
    raise Refusal(400, 'top_p must be above 0; temperature=0 is greedy.', param='top_p')
  seed = _number(body, 'seed', -2**63, 2**64 - 1, whole=True)
  stop = _stop(body)
  try:
    parts = chat.render(tokenizer, _messages(body))
  except errors.UserError as error:
    raise Refusal(400, str(error), param='messages') from error
  sampling = chat.Sampling(
    float(temperature if sampled_at is None else sampled_at), float(top_p or 1.0))
  request = chat.Request(
    model, parts, 0, sampling if sampling.temperature else chat.Sampling(), stop, seed,
    streams=bool(stream))
  left = room - request.prompt_tokens
  if left < (asked or 1):
    raise Refusal(
      400, f'The messages have {request.prompt_tokens} tokens and the reply up to {asked or 1}; '
      f'together they may have {room}.', code='context_length_exceeded', param='messages')
  if asked and asked > max_new_tokens:
    raise Refusal(
      400, f'A reply has at most {max_new_tokens} tokens here, and {asked} are asked for.',
      param='max_tokens')
  request.max_new_tokens = asked or min(max_new_tokens, left)
  return request, bool(options and options.get('include_usage'))


def _usage(outcome: chat.Outcome) -> dict[str, Any]:
  return {
    'prompt_tokens': outcome.prompt_tokens, 'completion_tokens': outcome.completion_tokens,
    'total_tokens': outcome.prompt_tokens + outcome.completion_tokens,
    'prompt_tokens_details': {'cached_tokens': outcome.cached_tokens}}


class ChatServer(http.server.ThreadingHTTPServer):
  """Listens as soon as it is made; `serve_forever` answers."""

  daemon_threads = True
  block_on_close = False

  def __init__(
    self,
    address: tuple[str, int],
    tokenizer: Tokenizer,
    scheduler: chat.Scheduler,
    *,
    max_new_tokens: int,
    temperature: float,
    max_request_bytes: int,
    max_connections: int,
  ):
    """Binds.

    Args:
      address: host and port; port 0 is any that is free.
      tokenizer, scheduler, max_new_tokens, temperature: as for `read_request`.
      max_request_bytes: larger bodies are refused unread.
      max_connections: at a time; more are closed with an answer of 503.

    Raises:
      OSError: the address cannot be bound.
    """
    self.tokenizer, self.scheduler = tokenizer, scheduler
    self.limits = {'max_new_tokens': max_new_tokens, 'temperature': temperature}
    self.max_request_bytes = max_request_bytes
    self._places = threading.BoundedSemaphore(max_connections)
    self.started = int(time.time())
    super().__init__(address, _Handler)
    self.loopback = ipaddress.ip_address(self.server_address[0]).is_loopback

  def process_request(self, request, client_address):
    """Starts a thread for a connection, if there is a place."""
    if not self._places.acquire(blocking=False):
      body = json.dumps(Refusal(503, 'Too many connections; try again later.').body()).encode()
      with contextlib.suppress(OSError):
        request.sendall(
          b'HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n'
          b'Connection: close\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body))
      self.shutdown_request(request)
      return
    super().process_request(request, client_address)

  def process_request_thread(self, request, client_address):
    try:
      super().process_request_thread(request, client_address)
    finally:
      self._places.release()

  def handle_error(self, request, client_address):
    """A client that goes away is no error of ours."""
    if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  server: ChatServer
  protocol_version = 'HTTP/1.1'
  server_version, sys_version = 'hintsight', ''
  timeout = TIMEOUT_S

  def log_message(self, *_):
    """Says nothing: a line a request would drown everything else."""

  def send_error(self, code, message=None, explain=None):
    """Errors that the library finds (a broken request line) are JSON, too."""
    self.close_connection = True
    self._send(code, Refusal(code, message or explain or f'HTTP error {code}.').body())

  def do_GET(self):
    self._answer(self._get)

  def do_POST(self):
    self._answer(self._post)

  def do_PUT(self):
    self._answer(self._other)

  do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_PUT

  def _answer(self, make):
    try:
      self._check_host()
      make()
    except Refusal as refusal:
      # A body that was not read would be taken for the next request.
      self.close_connection = True
      self._send(refusal.status, refusal.body())

  def _check_host(self) -> None:
    """On loopback, refuses names that a foreign page could have pointed here."""
    if not self.server.loopback:
      return
    host = self.headers.get('Host', '').strip()
    name = host.rpartition(':')[0] if host.rpartition(':')[2].isdigit() else host
    try:
      known = name == 'localhost' or ipaddress.ip_address(name.strip('[]')).is_loopback
    except ValueError:
      known = False
    if not known:
      raise Refusal(403, f'This server answers to localhost, and not to {name!r}.')

  def _other(self):
    raise Refusal(405, f'{self.command} is not supported.')

  def _get(self):
    path = self.path.partition('?')[0]
    server = self.server
    shown = lambda name: {
      'id': name, 'object': 'model', 'created': server.started, 'owned_by': 'hintsight'}
    if path == '/v1/models':
      self._send(200, {'object': 'list', 'data': [shown(m) for m in server.scheduler.models]})
    elif path.removeprefix('/v1/models/') in server.scheduler.models and path.startswith(
        '/v1/models/'):
      self._send(200, shown(path.removeprefix('/v1/models/')))
    elif path == '/v1/chat/completions':
      raise Refusal(405, 'Send a chat completion as POST.')
    else:
      self._no_such_path()

  def _no_such_path(self):
    raise Refusal(404, 'There are GET /v1/models and POST /v1/chat/completions, nothing else.')

  def _post(self):
    if self.path.partition('?')[0] != '/v1/chat/completions':
      self._no_such_path()
    # A web page cannot send this type to another origin unasked.
    if self.headers.get_content_type() != 'application/json':
      raise Refusal(415, 'Send the request as Content-Type: application/json.')
    length = self.headers.get('Content-Length', '')
    if not (length.isascii() and length.isdigit()):
      raise Refusal(411, 'Send the request with a Content-Length.')
    # Python reads no number of thousands of digits.
    if len(length) > 15 or int(length) > self.server.max_request_bytes:
      raise Refusal(
        413, f'The request has {length[:16]} bytes; at most {self.server.max_request_bytes} are '
        'read.')
    raw = self.rfile.read(int(length))
    try:
      body = json.loads(raw)
    except (ValueError, RecursionError) as error:
      raise Refusal(400, f'The body is no JSON ({error}).') from error
    request, wants_usage = read_request(
      body, self.server.tokenizer, self.server.scheduler, **self.server.limits)
    try:
      self.server.scheduler.submit(request)
    except chat.Busy as busy:
      raise Refusal(429, str(busy), code='queue_full') from busy
    head = {'id': f'chatcmpl-{secrets.token_hex(12)}', 'created': int(time.time()),
            'model': request.model}
    try:
      (self._stream if request.streams else self._whole)(request, head, wants_usage)
    except OSError:
      self.close_connection = True
      raise
    finally:
      request.cancelled = True

  def _events(self, request):
    """The request's events; between them, whether the client is still there."""
    while True:
      try:
        kind, value = request.events.get(timeout=1.0)
      except queue.Empty:
        self._check_client()
        continue
      yield kind, value
      if kind != 'text':
        return

  def _check_client(self) -> None:
    """Raises ConnectionError where the client has gone away."""
    self.connection.setblocking(False)
    try:
      if self.connection.recv(1, socket.MSG_PEEK) == b'':
        raise ConnectionAbortedError('the client has gone away')
    except BlockingIOError:
      pass
    finally:
      self.connection.settimeout(TIMEOUT_S)

  def _whole(self, request, head, _):
    text = []
    for kind, value in self._events(request):
      if kind == 'error':
        raise Refusal(500, f'{value}.')
      if kind == 'text':
        text.append(value)
      else:
        self._send(200, {
          **head, 'object': 'chat.completion', 'usage': _usage(value),
          'choices': [{
            'index': 0, 'finish_reason': value.finish_reason, 'logprobs': None,
            'message': {'role': 'assistant', 'content': ''.join(text), 'refusal': None}}]})

  def _stream(self, request, head, wants_usage):
    self.send_response(200)
    self.send_header('Content-Type', 'text/event-stream')
    self.send_header('Cache-Control', 'no-cache')
    # The end of the answer is the end of the connection.
    self.send_header('Connection', 'close')
    self.end_headers()
    self.close_connection = True

    def send(content):
      self.wfile.write(b'data: ' + json.dumps(content).encode() + b'\n\n')

    def chunk(delta, finish_reason=None, **more):
      choices = [{'index': 0, 'delta': delta, 'finish_reason': finish_reason, 'logprobs': None}]
      send({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})

    chunk({'role': 'assistant', 'content': ''})
    for kind, value in self._events(request):
      if kind == 'text':
        chunk({'content': value})
      elif kind == 'error':
        send(Refusal(500, f'{value}.').body())
        return
      else:
        chunk({}, value.finish_reason)
        if wants_usage:
          send({**head, 'object': 'chat.completion.chunk', 'choices': [], 'usage': _usage(value)})
    self.wfile.write(b'data: [DONE]\n\n')

  def _send(self, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    if self.close_connection:
      self.send_header('Connection', 'close')
    if status == 429:
      self.send_header('Retry-After', '1')
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)
