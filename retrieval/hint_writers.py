"""Who writes the hints: rules over the trace, the policy model itself, or a model on a server.

All writers have `name`, `counts`, `provenance()` and `write(failures) -> list of lists of texts`,
one list per failed episode (paper A, section 3, step 2: 1 to 4 imperative hints, about 120
characters, placeholders for what differs from task to task). Whatever a writer drops or repeats is
counted in `counts`, which the command shows.
"""

import abc
import collections
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm

from data import errors
from data.schema import Episode
from retrieval import hint_rules, hint_rules_webshop

MAX_HINTS = 4
MAX_CHARACTERS = 120
Messages = list[dict[str, str]]

_REQUEST = (
  'You read the record of {agent} that failed its task, and write rules that would have helped it '
  'and will help with similar tasks{elsewhere}. Write 1 to 4 rules. Each is one imperative '
  'sentence of at most 120 characters. {wording} State only what the record shows.')
_SYSTEMS = {
  'household': _REQUEST.format(
    agent='a household agent', elsewhere=' in other houses', wording=(
      'Name appliances and states exactly as the record does, without numbers; write {object} for '
      'the thing the task is about, {container} for where it has to go and {location} for any '
      'other place.')),
  'webshop': _REQUEST.format(
    agent='a shopping agent', elsewhere=' for other products', wording=(
      'Name buttons exactly as the record does; write {item} for the product that is wanted and '
      '{size}, {color}, {material} and {attribute} for what is asked of it.')),
  'scienceworld': _REQUEST.format(
    agent='an agent in a science laboratory', elsewhere=' on other things', wording=(
      'Name tools and commands exactly as the record does; write {object} for the thing or '
      'substance that the task is about, {container} for where it has to go and {location} for a '
      'room that may be another one.')),
}
# One's own environment: what differs between tasks is not known.
_SYSTEM = _REQUEST.format(
  agent='an agent', elsewhere='', wording=(
    'Name things exactly as the record does, without numbers; write {object} for what the task is '
    'about.'))
# Of the writer `rules`; in one's own environment it reads a trace as one of the household.
_RULES = {'household': hint_rules.write_all, 'webshop': hint_rules_webshop.write_all}
_AS_LINES = ' Answer with the rules alone, one per line, each line starting with "- ".'
_AS_JSON = ' Answer with JSON alone: {"hints": ["...", "..."]}.'


def trace_text(episode: Episode) -> str:
  """The whole action/observation trace of an episode; nothing is left out."""
  lines = []
  for step in episode.steps:
    if step.parsed == 'action':
      lines.append(f'> {step.action}\n{step.observation}')
    elif step.parsed == 'thought':
      lines.append(f'> think: {step.thought}')
    else:
      lines.append(f'> {step.reply.strip()}\n{step.observation}')
  return '\n'.join(lines)


def hint_messages(episode: Episode, *, as_json: bool) -> Messages:
  """The request for the hints of one failed episode, as chat messages."""
  user = (
    f'Task type: {episode.task_type}\nTask: {hint_rules.bare_instruction(episode.instruction)}\n'
    f'Record:\n{trace_text(episode)}\nThe task was not solved ({episode.termination}).\n'
    'Rules:')
  return [
    {'role': 'system',
     'content': _SYSTEMS.get(episode.env, _SYSTEM) + (_AS_JSON if as_json else _AS_LINES)},
    {'role': 'user', 'content': user},
  ]


def parse_reply(reply: str) -> list[str] | None:
  """Reads the hints out of a model's reply: JSON, else a list with one hint per marked line.

  Returns:
    The hint texts, possibly none; None for a reply that is neither.
  """
  text = re.sub(r'^\s*```\w*\s*|\s*```\s*$', '', reply.strip())
  # Models like to say a sentence before their JSON.
  start = re.search(r'\{\s*"|\[\s*"', text)
  for candidate in [text, *([text[start.start():]] if start else [])]:
    try:
      value, _ = json.JSONDecoder().raw_decode(candidate)
    except ValueError:
      continue
    if not isinstance(value, (dict, list)):
      continue  # '1. Open ...' begins with a JSON number
    if isinstance(value, dict):
      value = value.get('hints')
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
      return [v for v in value if v.strip()]
    return None
  marked = re.findall(r'^\s*(?:[-*•]|\d{1,2}[.)])\s+(\S.*)$', text, re.MULTILINE)
  return [line.strip() for line in marked] or None


def generalise(text: str, episode: Episode) -> str:
  """Takes out what holds in one house only: instance numbers, and the name of the task's object."""
  names = set(re.findall(r'\b([a-z]+) \d+\b', trace_text(episode).lower()))
  text = re.sub(
    r'\b([A-Za-z]+) \d+\b', lambda m: m[1] if m[1].lower() in names else m[0], text)
  goal = hint_rules.parse_goal(episode.instruction)
  if goal.object:
    text = re.sub(rf'\b(?:the |a |an )?{re.escape(goal.object)}s?\b', '{object}', text, flags=re.I)
  return text


def accept(texts: Sequence[str], episode: Episode, counts: collections.Counter) -> list[str]:
  """Applies the paper's bounds to a model's hints; what falls outside is dropped and counted."""
  accepted = []
  for text in texts:
    text = ' '.join(generalise(text, episode).split())
    if len(text) > MAX_CHARACTERS:
      counts['hints_too_long'] += 1
    elif len(accepted) == MAX_HINTS:
      counts['hints_beyond_four'] += 1
    else:
      accepted.append(text)
  return accepted


class RulesWriter:
  """Diagnoses the trace with hand-written rules (`retrieval.hint_rules`); asks no model."""

  name = 'rules'

  def __init__(self):
    self.counts: collections.Counter = collections.Counter()

  def provenance(self) -> dict[str, Any]:
    return {'name': self.name}

  def write(self, failures: Sequence[Episode]) -> list[list[str]]:
    # A bank is mined from one environment; its failures are read together.
    rules = _RULES.get(failures[0].env if failures else '', hint_rules.write_all)
    return rules(failures, self.counts, max_hints=MAX_HINTS)


class AnswerStore:
  """Replies of a model, one fsynced JSON line each, so that a stopped command goes on."""

  def __init__(self, path: str | os.PathLike | None):
    self._path = pathlib.Path(path) if path is not None else None
    self._replies: dict[str, str] = {}
    if self._path is not None and self._path.exists():
      for line in self._path.read_text(encoding='utf-8').splitlines():
        if not line:
          continue
        try:
          record = json.loads(line)
          self._replies[record['key']] = record['reply']
        except (ValueError, KeyError, TypeError):
          print(f'{self._path}: a torn line is left out; its episode is asked again.')

  def __len__(self) -> int:
    return len(self._replies)

  def get(self, key: str) -> str | None:
    return self._replies.get(key)

  def put(self, key: str, episode_id: str, reply: str) -> None:
    self._replies[key] = reply
    if self._path is None:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({'key': key, 'episode_id': episode_id, 'reply': reply}) + '\n'
    with open(self._path, 'ab+') as f:
      # A torn last line has no newline; starting on a new one keeps it from tearing this one too.
      if f.tell():
        f.seek(-1, os.SEEK_END)
        line = line if f.read(1) == b'\n' else '\n' + line
      f.write(line.encode())
      f.flush()
      os.fsync(f.fileno())


def _answer_key(identity: dict[str, Any], messages: Messages) -> str:
  return hashlib.sha256(json.dumps([identity, messages], sort_keys=True).encode()).hexdigest()


def _progress(episodes: int) -> tqdm.tqdm:
  """A bar on a terminal, nothing elsewhere or for nothing to do."""
  return tqdm.tqdm(
    total=episodes, desc='hints', unit='episode', disable=None if episodes else True)


class _ModelWriter(abc.ABC):
  """What writers with a model share: stored replies, parsing, counting."""

  name = ''
  as_json = False

  def __init__(self, answers_path: str | os.PathLike | None):
    self.counts: collections.Counter = collections.Counter()
    self._store = AnswerStore(answers_path)

  @abc.abstractmethod
  def provenance(self) -> dict[str, Any]:
    """What the writer is, for the bank's record and the keys of stored replies."""

  @abc.abstractmethod
  def _ask(self, pending: list[tuple[str, Episode, Messages]]) -> None:
    """Answers requests and puts every reply into the store as it comes."""

  def write(self, failures: Sequence[Episode]) -> list[list[str]]:
    requests = []
    for episode in failures:
      messages = hint_messages(episode, as_json=self.as_json)
      requests.append((_answer_key(self.provenance(), messages), episode, messages))
    pending = [r for r in requests if self._store.get(r[0]) is None]
    self.counts['replies_from_an_earlier_call'] += len(requests) - len(pending)
    self._ask(pending)
    written = []
    for key, episode, _ in requests:
      reply = self._store.get(key)
      texts = parse_reply(reply) if reply is not None else []
      if texts is None:
        self.counts['malformed_replies'] += 1
        texts = []
      written.append(accept(texts, episode, self.counts))
    return written


class PolicyWriter(_ModelWriter):
  """The policy model writes its own hints.

  `generate` is any engine: it takes a list of chats and gives one reply each, None for a chat that
  does not fit its context (counted, never cut).
  """

  name = 'self'

  def __init__(
    self,
    generate: Callable[[list[Messages]], list[str | None]],
    *,
    model: str,
    answers_path: str | os.PathLike | None = None,
    batch: int = 32,
  ):
    super().__init__(answers_path)
    self._generate = generate
    self._model = model
    self._batch = batch

  def provenance(self) -> dict[str, Any]:
    return {'name': self.name, 'model': self._model}

  def _ask(self, pending: list[tuple[str, Episode, Messages]]) -> None:
    bar = _progress(len(pending))
    for start in range(0, len(pending), self._batch):
      chunk = pending[start:start + self._batch]
      replies = self._generate([messages for _, _, messages in chunk])
      for (key, episode, _), reply in zip(chunk, replies, strict=True):
        if reply is None:
          self.counts['context_overflow'] += 1
        else:
          self._store.put(key, episode.id, reply)
      bar.update(len(chunk))
    bar.close()


class OpenAIWriter(_ModelWriter):
  """A model on any server of the OpenAI chat protocol: a call per failure, temperature 0, JSON.

  The key comes from the environment variable OPENAI_API_KEY and is sent to that server only;
  servers that want none get none.
  """

  name = 'openai'
  as_json = True

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    answers_path: str | os.PathLike | None = None,
    timeout_s: float = 60.0,
    retries: int = 4,
    backoff_s: float = 1.0,
    show: Callable[[str], None] = print,
  ):
    """Prepares the writer; nothing is sent yet.

    Args:
      base_url: up to and including '/v1'.
      model: name that the server knows.
      answers_path: JSONL of the replies; a second call with it asks only for what is missing.
      timeout_s: per attempt.
      retries: attempts after the first for overload, time-out and lost connections.
      backoff_s: wait before the first of them; doubles each time.
      show: where retries are reported.

    Raises:
      errors.UserError: if the URL is none.
    """
    super().__init__(answers_path)
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ('http', 'https') or not parts.netloc:
      raise errors.UserError(
        f'{base_url!r} is not a server address; give one such as http://localhost:8000/v1.')
    self._url = base_url.rstrip('/') + '/chat/completions'
    self._base_url = base_url.rstrip('/')
    self._model = model
    self._timeout_s = timeout_s
    self._retries = retries
    self._backoff_s = backoff_s
    self._show = show

  def provenance(self) -> dict[str, Any]:
    return {'name': self.name, 'model': self._model, 'base_url': self._base_url}

  def _ask(self, pending: list[tuple[str, Episode, Messages]]) -> None:
    bar = _progress(len(pending))
    for done, (key, episode, messages) in enumerate(pending):
      try:
        reply = self._complete(messages)
      except errors.UserError as error:
        bar.close()
        raise errors.UserError(
          f'{error} Saved are the replies for {done} of {len(pending)} episodes; the same command '
          'goes on from there.') from None
      self._store.put(key, episode.id, reply)
      bar.update()
    bar.close()

  def _complete(self, messages: Messages) -> str:
    body = json.dumps({
      'model': self._model, 'messages': messages, 'temperature': 0, 'max_tokens': 400,
      'response_format': {'type': 'json_object'}}).encode()
    headers = {'Content-Type': 'application/json'}
    if key := os.environ.get('OPENAI_API_KEY', '').strip():
      headers['Authorization'] = f'Bearer {key}'
    for attempt in range(self._retries + 1):
      wait = self._backoff_s * 2**attempt
      try:
        request = urllib.request.Request(self._url, body, headers)
        with _OPENER.open(request, timeout=self._timeout_s) as response:
          return _content(response.read(), self._url)
      except urllib.error.HTTPError as error:
        reason = f'{error.code} {error.reason}'
        detail = _detail(error)
        if error.code not in (408, 409, 425, 429) and error.code < 500:
          raise errors.UserError(f'{self._url} refused: {reason} ({detail}).') from None
        after = error.headers.get('Retry-After', '')
        wait = max(wait, min(float(after), 60.0)) if after.isdigit() else wait
      except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as e:
        reason = str(getattr(e, 'reason', e)) or type(e).__name__
      if attempt < self._retries:
        self.counts['retries'] += 1
        self._show(f'{self._url}: {reason}; attempt {attempt + 2} of {self._retries + 1}.')
        time.sleep(wait)
    raise errors.UserError(
      f'{self._url} gave no answer in {self._retries + 1} attempts (last: {reason}).')


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """Refuses redirects: the key would go with them to whatever server they name."""

  def redirect_request(self, *_):
    return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _detail(error: urllib.error.HTTPError) -> str:
  """What the server says about its error, as far as it comes, and where it would send us."""
  text = error.headers.get('Location', '')
  with contextlib.suppress(OSError, http.client.HTTPException):
    text += ' ' + error.read(300).decode('utf-8', 'replace')
  return ' '.join(text.split())


def _content(payload: bytes, url: str) -> str:
  """The text of a chat completion, '' for one without (a model that declined).

  Raises:
    errors.UserError: if the answer is not of the protocol.
  """
  try:
    content = json.loads(payload)['choices'][0]['message']['content']
    if content is None:
      return ''
    if not isinstance(content, str):
      raise TypeError
    return content
  except (ValueError, KeyError, IndexError, TypeError):
    raise errors.UserError(
      f'{url} does not answer in the OpenAI chat protocol: {payload[:120]!r}.') from None


def engine_generate(
  model: Any, tokenizer: Any, *, slots: int = 8, max_context: int = 4096, max_new_tokens: int = 200
) -> Callable[[list[Messages]], list[str | None]]:
  """Makes the `generate` of `PolicyWriter` out of a model of `models.decoder`, decoding greedily.

  A chat has a system and a user message; each part is tokenised on its own between the seams of the
  model's chat template, as in episodes.
  """
  from inference.engine import ContextOverflow, Engine, SamplingConfig
  engine = Engine(
    model, num_slots=slots, max_len=max_context, stop_ids=tokenizer.stop_ids,
    sampling=SamplingConfig(temperature=0.0))

  def generate(chats: list[Messages]) -> list[str | None]:
    replies: list[str | None] = [None] * len(chats)
    seams = tokenizer.chat
    for start in range(0, len(chats), slots):
      for slot, (system, user) in enumerate(chats[start:start + slots]):
        tokens = [
          *seams.system_open, *tokenizer.encode(system['content']), *seams.system_to_user,
          *tokenizer.encode(user['content']), *seams.user_to_assistant]
        try:
          engine.submit(slot, np.asarray(tokens, np.int32), max_new_tokens, reset=True)
        except ContextOverflow:
          continue
      for done in engine.run_until_complete():
        replies[start + done.slot] = tokenizer.decode(done.tokens.tolist())
    return replies

  return generate
