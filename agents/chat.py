"""Conversations of many clients over the slots of engines: the model side of `serve.py`.

One thread steps the engines; requests that come at the same time share their dispatches. A slot
keeps the keys and values of the conversation that it played last, and a request whose messages
extend it computes its new tokens only. A reply that is streamed, or has stop strings, is sampled in
pieces, after each of which its text can be sent on, searched for stop strings, and given up.
"""

import collections
import dataclasses
import itertools
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data import errors
from data.tokenizer import Tokenizer

ROLES = ('system', 'user', 'assistant')
# Stands for a message while the template is rendered; private use, so no template looks at it.
_MARK = '\ue000'
# What an incomplete character at the end of the sampled bytes decodes to.
_INCOMPLETE = '\ufffd'


class Busy(Exception):
  """As many requests wait as may."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a prompt.

  Attributes:
    ids: its tokens.
    reply: the text, of an assistant's message; None of anything else.
  """

  ids: tuple[int, ...]
  reply: str | None = None


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[Part]:
  """A conversation in the chat template, up to the header that asks for a reply.

  The template is rendered around marks and only what stands between them may hold control tokens:
  those that a message spells are ordinary text. Each piece is tokenised on its own, as the prompts
  of `agents.prompts` are.

  Args:
    tokenizer: the model's.
    messages: dicts of 'role' and 'content', text.

  Raises:
    errors.UserError: the template refuses these roles, or does not write every message once.
  """
  marks = [f'{_MARK}{i}{_MARK}' for i in range(len(messages))]
  rest = tokenizer.render_chat(
    [{'role': m['role'], 'content': mark} for m, mark in zip(messages, marks, strict=True)],
    add_generation_prompt=True)
  if rest.count(_MARK) != 2 * len(marks):
    raise errors.UserError(
      'The chat template does not write every message once; send messages with the roles system '
      '(first, if at all), user and assistant in turn.')
  parts = []
  for message, mark in zip(messages, marks, strict=True):
    seam, found, rest = rest.partition(mark)
    if not found:
      raise errors.UserError('The chat template changes the order of these messages.')
    parts.append(Part(tuple(tokenizer.encode(seam, allow_special=True))))
    parts.append(Part(
      tuple(tokenizer.encode(message['content'])),
      message['content'] if message['role'] == 'assistant' else None))
  return [*parts, Part(tuple(tokenizer.encode(rest, allow_special=True)))]


class Detokenizer:
  """The text of sampled tokens as it becomes certain, up to the first stop string.

  Attributes:
    text: all that was handed out.
    stopped: a stop string was found; neither it nor what follows is in the text.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    """Begins a reply; `stop` are strings that end it, none of them empty."""
    self.text, self.stopped = '', False
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    self._ids: list[int] = []

  def add(self, ids: Sequence[int], last: bool = False) -> str:
    """Takes further tokens and hands out the text that no later token can change.

    Args:
      ids: sampled.
      last: none will follow: what was held back is handed out.
    """
    self._ids += [int(i) for i in ids]
    whole = self._tokenizer.decode(self._ids)
    # The one that is complete first counts, however the tokens came.
    found = [(at + len(s), at) for s in self._stop if (at := whole.find(s)) >= 0]
    if found:
      self.stopped, whole = True, whole[:min(found)[1]]
    elif not last:
      whole = whole.rstrip(_INCOMPLETE)
      # The beginning of a stop string may be at the end.
      held = max((n for s in self._stop for n in range(1, len(s)) if whole.endswith(s[:n])),
                 default=0)
      whole = whole[:len(whole) - held]
    new = whole[len(self.text):]
    self.text += new
    return new


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a request wants its tokens chosen."""

  temperature: float = 0.0
  top_p: float = 1.0


@dataclasses.dataclass(eq=False)
class Request:
  """One call of a client, and what it gets.

  Attributes:
    model: name of the policy.
    parts: of `render`.
    max_new_tokens: most tokens of the reply.
    sampling: how they are chosen.
    stop: strings that end the reply.
    seed: of the draws; None leaves it to the engine.
    streams: text is wanted as it comes; otherwise, without stop strings, the reply is one piece.
    events: what came of it: ('text', piece) and at last ('done', `Outcome`) or ('error', text).
    cancelled: set by the client's side; the slot is then free after the piece in progress.
  """

  model: str
  parts: list[Part]
  max_new_tokens: int
  sampling: Sampling = Sampling()
  stop: tuple[str, ...] = ()
  seed: int | None = None
  streams: bool = False
  events: 'queue.SimpleQueue[tuple[str, Any]]' = dataclasses.field(
    default_factory=queue.SimpleQueue)
  cancelled: bool = False

  @property
  def prompt_tokens(self) -> int:
    return sum(len(part.ids) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a reply ended.

  Attributes:
    finish_reason: 'stop' (a stop token or string) or 'length'.
    prompt_tokens: of the whole conversation.
    cached_tokens: of them, those whose keys and values a slot still had.
    completion_tokens: sampled, the stop token included.
  """

  finish_reason: str
  prompt_tokens: int
  cached_tokens: int
  completion_tokens: int


class _Seat:
  """A slot: the conversation that it holds, and the request that is in it."""

  def __init__(self):
    self.model = ''  # that the conversation is with
    self.ids: list[int] = []  # of the conversation, the last sampled token included
    self.replies: dict[str, tuple[int, ...]] = {}  # text -> ids as they were sampled
    self.request: Request | None = None
    self.used = 0
    self.detokenizer: Detokenizer | None = None
    self.sampled: list[int] = []
    self.prompt_tokens = self.cached_tokens = 0

  def spell(self, parts: Sequence[Part]) -> list[int]:
    """The prompt's tokens, with the replies of this slot as they were sampled."""
    return [i for part in parts for i in self.replies.get(part.reply, part.ids)]

  def give_to(self, model: str) -> None:
    """Makes it one for conversations with a model; those with another one are forgotten."""
    if model != self.model:
      self.model, self.ids, self.replies = model, [], {}


class _Table:
  """The seats of one engine."""

  def __init__(self, engine):
    self.engine = engine
    self.seats = [_Seat() for _ in range(engine.num_slots)]
    self.used = 0

  @property
  def free(self) -> list[int]:
    return [i for i, seat in enumerate(self.seats) if seat.request is None]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
  """Length of the common beginning."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Scheduler:
  """Gives requests to slots and steps the engines, in a thread of its own.

  Attributes:
    models: the names that there are.
    max_context: tokens of a slot.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    make_engine: Callable[[Sampling], Any],
    models: Sequence[str],
    *,
    max_context: int,
    max_waiting: int,
    max_engines: int = 4,
    piece: int = 16,
  ):
    """Starts the thread.

    Args:
      tokenizer: of all models.
      make_engine: sampling -> engine, whose policies are the models; called in the thread, when it
        is first asked for.
      models: names, in the order of the engine's policies.
      max_context: tokens of a slot of these engines.
      max_waiting: requests that may wait for a slot.
      max_engines: engines that are kept; of more, the one that was idle longest is given up.
      piece: most tokens before text is sent on and stop strings are looked for; a stream begins
        with fewer.
    """
    self.models, self.max_context = tuple(models), max_context
    self._tokenizer, self._make_engine = tokenizer, make_engine
    self._max_waiting, self._max_engines, self._piece = max_waiting, max_engines, piece
    self._tables: collections.OrderedDict[Sampling, _Table] = collections.OrderedDict()
    self._waiting: collections.deque[Request] = collections.deque()
    self._changed = threading.Condition()
    self._closing, self._broken = False, ''
    self._clock = itertools.count(1)
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
    self._thread.start()

  def submit(self, request: Request) -> None:
    """Queues a request whose tokens fit into a slot.

    Raises:
      Busy: as many wait as may.
    """
    with self._changed:
      if self._broken:
        request.events.put(('error', self._broken))
        return
      if len(self._waiting) >= self._max_waiting:
        raise Busy(f'{len(self._waiting)} requests are waiting; try again later.')
      self._waiting.append(request)
      self._changed.notify()

  def close(self) -> None:
    """Ends the thread; whoever still waits is told."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    try:
      while True:
        with self._changed:
          while not (self._waiting or self._closing or self._busy()):
            self._changed.wait()
          if self._closing:
            break
        self._seat_waiting()
        for key, table in list(self._tables.items()):
          if table.engine.busy:
            self._tables.move_to_end(key)
            for completion in table.engine.step():
              self._take(table, completion)
      self._fail('the server is stopping')
    # Whatever breaks the engine, every client is told instead of waiting for ever.
    except Exception as error:
      traceback.print_exc(file=sys.stderr)
      self._fail(f'the engine has failed ({type(error).__name__}); start the server again')

  def _busy(self) -> bool:
    return any(table.engine.busy for table in self._tables.values())

  def _fail(self, why: str) -> None:
    with self._changed:
      self._broken = why
      left = list(self._waiting)
      self._waiting.clear()
    left += [s.request for table in self._tables.values() for s in table.seats if s.request]
    for request in left:
      request.events.put(('error', why))

  def _seat_waiting(self) -> None:
    """Gives waiting requests, the oldest first, to free slots of their engines."""
    with self._changed:
      waiting = list(self._waiting)
    for request in waiting:
      try:
        table = None if request.cancelled else self._table(request)
      # An engine that cannot be made, for want of memory say, takes none of the others with it.
      except Exception as error:
        traceback.print_exc(file=sys.stderr)
        request.cancelled = True
        table = None
        request.events.put(('error', (
          f'no engine for these temperature and top_p could be made ({type(error).__name__}); ask '
          'with those of other requests')))
      if table is None and not request.cancelled:
        continue
      with self._changed:
        self._waiting.remove(request)
      if table is not None:
        self._begin(table, request)

  def _table(self, request: Request) -> _Table | None:
    """The engine that plays the request, if it has a free slot."""
    key = request.sampling
    if key not in self._tables:
      if len(self._tables) >= self._max_engines:
        idle = [k for k, t in self._tables.items() if len(t.free) == len(t.seats)]
        if not idle:
          return None
        del self._tables[idle[0]]
      self._tables[key] = _Table(self._make_engine(key))
    table = self._tables[key]
    return table if table.free else None

  def _begin(self, table: _Table, request: Request) -> None:
    """Puts a request into the slot that holds most of its conversation."""
    plain = [i for part in request.parts for i in part.ids]

    def held(index: int) -> tuple[int, int]:
      # A slot that would lose more than it gives is somebody else's: of those the oldest.
      seat = table.seats[index]
      if seat.model != request.model:
        return 0, -seat.used
      shared = _shared(seat.ids, seat.spell(request.parts))
      return (shared if 2 * shared >= len(seat.ids) else 0), -seat.used

    index = max(table.free, key=held)
    seat = table.seats[index]
    seat.give_to(request.model)
    ids = seat.spell(request.parts)
    if len(ids) + request.max_new_tokens > self.max_context:
      ids = plain
    known = {part.reply for part in request.parts}
    seat.replies = {text: found for text, found in seat.replies.items() if text in known}
    # At least one token has to be computed; a draw is only repeatable from an empty slot on.
    keep = min(_shared(seat.ids, ids), len(ids) - 1)
    if request.seed is not None and request.sampling.temperature:
      keep = 0
    table.engine.submit(
      index, ids[keep:], self._piece_of(request, 0), reset=not keep, keep=keep or None,
      seed=request.seed, policy=self.models.index(request.model))
    seat.ids, seat.used, seat.request = ids, next(self._clock), request
    seat.prompt_tokens, seat.cached_tokens, seat.sampled = len(ids), keep, []
    seat.detokenizer = Detokenizer(self._tokenizer, request.stop)

  def _piece_of(self, request: Request, sampled: int) -> int:
    """Tokens to sample next, after those that were.

    A stream's first token comes with the prefill, without waiting for a step of decoding. Its next
    pieces grow fourfold: each costs a further prefill of one token, and nobody reads so fast.
    """
    left = request.max_new_tokens - sampled
    if request.streams:
      return min(max(1, 3 * sampled), self._piece, left)
    return min(self._piece, left) if request.stop else left

  def _take(self, table: _Table, completion) -> None:
    """Sends on what a slot has sampled, and ends the reply or goes on with it."""
    seat = table.seats[completion.slot]
    request, new = seat.request, completion.tokens.tolist()
    seat.sampled += new
    seat.ids = seat.ids + new
    left = request.max_new_tokens - len(seat.sampled)
    ended = completion.stop_reason == 'stop'
    text = seat.detokenizer.add(new, last=ended or not left)
    if text:
      request.events.put(('text', text))
    if not (ended or seat.detokenizer.stopped or request.cancelled) and left:
      table.engine.submit(completion.slot, [], self._piece_of(request, len(seat.sampled)))
      return
    if ended and not seat.detokenizer.stopped:
      # What a client sends back as this reply's text is found again, token for token.
      seat.replies[seat.detokenizer.text] = tuple(seat.sampled[:-1])
    elif not seat.detokenizer.stopped:
      seat.replies[seat.detokenizer.text] = tuple(seat.sampled)
    stopped = ended or seat.detokenizer.stopped
    seat.request = None
    request.events.put(('done', Outcome(
      'stop' if stopped else 'length', seat.prompt_tokens, seat.cached_tokens,
      len(seat.sampled))))
