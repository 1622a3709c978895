"""Tokenizer and chat template of a model: from a Hugging Face folder or from a GGUF's own metadata.

Two backends share one vocabulary. The first knows no added tokens, so text from an environment
that looks like a control token ('<|im_end|>') stays text and cannot end a turn; the second matches
them and serves the chat template only. Built with `tokenizers`, without torch.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from data import model_folder
from data import text as text_lib
from data.errors import UserError
from data.gguf import GGUFFile

# Token types of `tokenizer.ggml.token_type` (llama.cpp, llama_token_type).
_CONTROL, _USER_DEFINED = 3, 4

# Pre-tokenisers by `tokenizer.ggml.pre`; the expressions are those of the models' tokenizer.json.
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r'\p{N}{1,3}', r'\p{N}')
_PRE_TOKENIZERS = {
  'gpt2': ('regex', None),
  'default': ('regex', None),
  'smollm': ('digits', None),
  'llama-bpe': ('split', _LLAMA3_SPLIT),
  'llama3': ('split', _LLAMA3_SPLIT),
  'llama-v3': ('split', _LLAMA3_SPLIT),
  'qwen2': ('split', _QWEN2_SPLIT),
  'deepseek-r1-qwen': ('split', _QWEN2_SPLIT),
}
_NFC = ('qwen2', 'deepseek-r1-qwen')  # Qwen2's tokenizer.json normalises; a GGUF does not say so
_IGNORE_MERGES = ('llama-bpe', 'llama3', 'llama-v3')
_SPACE = '\u2581'  # how SentencePiece writes a space: ▁
_BLANK = ' \t\n\r' + _SPACE
# Control tokens that end a text in any template (llama.cpp treats them so by name, too).
_END_OF_TEXT = ('<|endoftext|>', '<|end_of_text|>', '<|im_end|>', '<|eot_id|>', '<|eom_id|>')


@dataclasses.dataclass(frozen=True)
class ChatSeams:
  """The chat template as the token ids between the messages.

  A conversation is system_open, SYSTEM, system_to_user, USER, user_to_assistant, then per turn
  REPLY, end_of_turn, assistant_to_user, USER, user_to_assistant.

  Attributes:
    system_open: start of the text (BOS if the template has it) and the system header.
    system_to_user: system footer and user header.
    user_to_assistant: user footer and the header that asks for a reply.
    assistant_to_user: what follows the reply's end-of-turn token, up to the user header.
    end_of_turn: the token with which the model ends its reply; the model samples it.
  """

  system_open: tuple[int, ...]
  system_to_user: tuple[int, ...]
  user_to_assistant: tuple[int, ...]
  assistant_to_user: tuple[int, ...]
  end_of_turn: int


class Tokenizer:
  """BPE tokenizer, byte-level or with a fallback to bytes (Gemma), with its chat template.

  Attributes:
    vocab_size: number of tokens, control tokens included (a model's embedding may have more rows).
    bos_id: beginning-of-sequence id, or None.
    eos_id: end-of-sequence id.
    pad_id: padding id (eos_id where the model names none).
    special_ids: ids of the control tokens.
    chat_template: jinja2 source, or None.
    fingerprint: SHA-256 hex digest of vocabulary, merges and chat template.
  """

  def __init__(
    self,
    spec: dict[str, Any],
    *,
    name: str,
    bos_id: int | None,
    eos_id: int,
    pad_id: int | None,
    other_stop_ids: Sequence[int],
    chat_template: str | None,
  ):
    """Builds both backends; use `Tokenizer.load`.

    Args:
      spec: the content of a tokenizer.json.
      name: what error messages call this tokenizer.
      bos_id: beginning-of-sequence id, or None.
      eos_id: end-of-sequence id.
      pad_id: padding id, or None.
      other_stop_ids: further ids that end a reply.
      chat_template: jinja2 source, or None.
    """
    spec = spec | {'truncation': None, 'padding': None, 'post_processor': None}
    self._name = name
    self._matching = _backend(spec, name)
    vocab = self._matching.get_vocab(with_added_tokens=True)
    merges = [m if isinstance(m, str) else ' '.join(m) for m in spec['model']['merges']]
    added = {token['content'] for token in spec['added_tokens']}
    # A token that merges can produce is ordinary text whatever its mark; BPE needs it.
    hidden = added - {merge.replace(' ', '', 1) for merge in merges}
    # Runs of white space speak for nobody. Gemma has tokens for them that are matched, not merged.
    blank = [token for token in spec['added_tokens'] if not token['content'].strip(_BLANK)]
    plain_vocab = {token: i for token, i in spec['model']['vocab'].items() if token not in hidden}
    plain_vocab |= {token['content']: token['id'] for token in blank}
    plain_model = spec['model'] | {'vocab': plain_vocab, 'unk_token': None}
    self._plain = _backend(spec | {'added_tokens': blank, 'model': plain_model}, name)
    # By its bytes any character can be spelt.
    falls_back = spec['model'].get('byte_fallback', False)
    self._unspellable = frozenset(
      byte for byte, letter in _byte_alphabet().items()
      if not falls_back and letter not in plain_vocab
    )
    self.vocab_size = self._matching.get_vocab_size(with_added_tokens=True)
    self.bos_id, self.eos_id = bos_id, eos_id
    self.pad_id = eos_id if pad_id is None else pad_id
    self.special_ids = frozenset(
      vocab[token['content']] for token in spec['added_tokens'] if token['special']
    )
    self.chat_template = chat_template
    by_name = [vocab[token] for token in _END_OF_TEXT if vocab.get(token) in self.special_ids]
    self._other_stop_ids = tuple(other_stop_ids) + tuple(by_name)
    ordered = sorted(vocab.items(), key=lambda item: item[1])
    content = json.dumps([ordered, merges, chat_template]).encode()
    self.fingerprint = hashlib.sha256(content).hexdigest()

  @classmethod
  def load(cls, path: str | pathlib.Path) -> 'Tokenizer':
    """Loads a model's tokenizer.

    Args:
      path: a .gguf file, or a Hugging Face folder with tokenizer.json and tokenizer_config.json
        (chat template there or in chat_template.jinja).

    Raises:
      UserError: a file is missing or broken, or the tokenizer is of an unsupported kind.
    """
    path = pathlib.Path(path)
    arguments = _from_folder(path) if path.is_dir() else _from_gguf(path)
    return cls(**arguments, name=str(path))

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end a reply: the chat's end of turn, EOS and the other end-of-text tokens."""
    end_of_turn = (self.chat.end_of_turn,) if self.chat_template else ()
    return tuple(dict.fromkeys(end_of_turn + (self.eos_id,) + self._other_stop_ids))

  @functools.cached_property
  def chat(self) -> ChatSeams:
    """The seams of the chat template.

    Raises:
      UserError: there is no template, or it is not made of fixed seams between the messages.
    """
    return derive_seams(self)

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    """Encodes text; no BOS is added.

    A character with a byte that the vocabulary lacks (SmolLM2 has none for a few ASCII control
    characters) becomes U+FFFD, as does a lone surrogate: visible to the model and to the reader,
    where BPE would drop it.

    Args:
      text: any text.
      allow_special: match control tokens in the text. Only for the chat template: by default they
        are encoded as the ordinary characters they consist of.

    Returns:
      Token ids.
    """
    text = text_lib.valid(text)
    if self._unspellable and not self._unspellable.isdisjoint(text.encode()):
      text = ''.join(c if self._unspellable.isdisjoint(c.encode()) else '\ufffd' for c in text)
    backend = self._matching if allow_special else self._plain
    return backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Decodes token ids; bytes that are not UTF-8 become U+FFFD.

    Args:
      ids: token ids (any integer type).
      skip_special: leave control tokens out.

    Returns:
      The text.
    """
    return self._matching.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def token(self, token_id: int) -> str | None:
    """The vocabulary's spelling of an id, None for an id without a token."""
    return self._matching.id_to_token(int(token_id))

  def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt=False):
    """Renders the chat template.

    `strftime_now` is left undefined, so templates that print today's date fall back to their fixed
    one and a prompt is the same every day.

    Args:
      messages: dicts with 'role' and 'content'.
      add_generation_prompt: end with the header that asks for a reply.

    Returns:
      The text with its control tokens.

    Raises:
      UserError: there is no template, or it refuses the messages.
    """
    if not self.chat_template:
      raise UserError(f'{self._name} has no chat template; use an instruction-tuned model.')
    try:
      return _environment().from_string(self.chat_template).render(
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
        bos_token='' if self.bos_id is None else self.token(self.bos_id),
        eos_token=self.token(self.eos_id),
        pad_token=self.token(self.pad_id),
      )
    except jinja2.TemplateError as error:
      raise UserError(
        f'the chat template of {self._name} refuses a system, user, assistant conversation: {error}'
      ) from error


# What a Hugging Face folder has beside its weights, as far as it is about text.
_FOLDER_FILES = (
  'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'special_tokens_map.json',
  'added_tokens.json', 'vocab.json', 'merges.txt', 'generation_config.json')  # fmt: skip


def export(source: str | pathlib.Path, folder: str | pathlib.Path) -> list[str]:
  """Writes a model's tokenizer, chat template and stop tokens into a Hugging Face folder.

  Args:
    source: a Hugging Face folder, whose files are copied, or a .gguf file, from whose metadata
      they are made.
    folder: exists.

  Returns:
    The names of the files.

  Raises:
    UserError: the source has no tokenizer that can be read.
  """
  source, folder = pathlib.Path(source), pathlib.Path(folder)
  if source.is_dir():
    model_folder.read_json(source / 'tokenizer.json')
    names = [name for name in _FOLDER_FILES if (source / name).is_file()]
    for name in names:
      shutil.copyfile(source / name, folder / name)
    return names
  parts = _from_gguf(source)
  spec = {'truncation': None, 'padding': None, 'post_processor': None, **parts['spec']}
  spelling = {i: token for token, i in spec['model']['vocab'].items()}
  ids = {key: parts[f'{key}_id'] for key in ('bos', 'eos', 'pad') if parts[f'{key}_id'] is not None}
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'chat_template': parts['chat_template'],
  } | {f'{key}_token': spelling[i] for key, i in ids.items()}
  stops = list(Tokenizer.load(source).stop_ids)
  generation = {f'{key}_token_id': i for key, i in ids.items()} | {'eos_token_id': stops}
  content = {
    'tokenizer.json': spec, 'tokenizer_config.json': settings, 'generation_config.json': generation}
  for name, value in content.items():
    text = json.dumps(value, ensure_ascii=False, indent=2)
    (folder / name).write_text(text + '\n', encoding='utf-8')
  return list(content)


def derive_seams(tokenizer: Tokenizer) -> ChatSeams:
  """Derives the seams by rendering sentinel messages, and checks that they are the whole template.

  Args:
    tokenizer: gives the template and encodes the seams.

  Returns:
    The seams.

  Raises:
    UserError: the template is not made of such seams.
  """
  roles = ('system', 'user', 'assistant', 'user', 'assistant', 'user')

  def render(contents):
    messages = [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=False)]
    return tokenizer.render_chat(messages, add_generation_prompt=True)

  sentinels = [f'sentinel{i}{role}' for i, role in enumerate(roles)]
  rest, seams = render(sentinels), []
  for sentinel in sentinels:
    seam, found, rest = rest.partition(sentinel)
    if not found:
      break
    seams.append(seam)
  seams.append(rest)
  regular = len(seams) == 7 and seams[2] == seams[4] == seams[6] and seams[3] == seams[5]
  if regular:
    contents = ['Be brief.\nNever guess.', 'Look: "here" & there?', 'go to shelf 1', 'OK.', '', 'x']
    for n in (2, 4, 6):
      joined = ''.join(seam + content for seam, content in zip(seams, contents[:n], strict=False))
      regular = regular and render(contents[:n]) == joined + seams[2]
  if not regular:
    raise UserError(
      f'the chat template of {tokenizer._name} does more than put fixed text between system, user '
      'and assistant messages; use a model whose template is of that form.'
    )
  encoded = [tuple(tokenizer.encode(seam, allow_special=True)) for seam in seams]
  after_reply = encoded[3]
  if not after_reply or after_reply[0] not in tokenizer.special_ids:
    raise UserError(
      f'the chat template of {tokenizer._name} ends a reply with {seams[3]!r}, which does not '
      'begin with a control token; use a model that ends its turns with one.'
    )
  return ChatSeams(
    system_open=encoded[0],
    system_to_user=encoded[1],
    user_to_assistant=encoded[2],
    assistant_to_user=after_reply[1:],
    end_of_turn=after_reply[0],
  )


def _backend(spec: dict[str, Any], name: str) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as error:  # `tokenizers` raises bare Exception for any broken specification
    raise UserError(f'the tokenizer of {name} cannot be built: {error}.') from error


@functools.cache
def _byte_alphabet() -> dict[int, str]:
  """Byte -> the printable character that stands for it in byte-level BPE (GPT-2)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def _environment() -> jinja2.Environment:
  """The environment that chat templates are written for (Hugging Face's conventions)."""

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def to_json(value, ensure_ascii=False, indent=None):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = to_json
  environment.globals['raise_exception'] = raise_exception
  return environment


def _from_gguf(path: pathlib.Path) -> dict[str, Any]:
  metadata = GGUFFile(path).metadata
  model = metadata.get('tokenizer.ggml.model')
  if model != 'gpt2':
    raise UserError(
      f'{path} has a tokenizer of kind {model!r}; only byte-level BPE ("gpt2") can be read.'
    )
  kind = metadata.get('tokenizer.ggml.pre', 'default')
  if kind not in _PRE_TOKENIZERS:
    raise UserError(
      f'{path} splits text by the rules {kind!r}; supported are {sorted(_PRE_TOKENIZERS)}.'
    )
  try:
    tokens = metadata['tokenizer.ggml.tokens']
    merges = metadata['tokenizer.ggml.merges']
    types = metadata['tokenizer.ggml.token_type']
    eos_id = metadata['tokenizer.ggml.eos_token_id']
  except KeyError as error:
    raise UserError(f'{path} has no {error.args[0]}; use a GGUF with its tokenizer.') from error
  added = [
    _added_token(i, token, special=types[i] == _CONTROL)
    for i, token in enumerate(tokens)
    if types[i] in (_CONTROL, _USER_DEFINED)
  ]
  stops = [metadata.get(f'tokenizer.ggml.{key}_token_id') for key in ('eot', 'eom')]
  return {
    'spec': {
      'version': '1.0',
      'added_tokens': added,
      'normalizer': {'type': 'NFC'} if kind in _NFC else None,
      'pre_tokenizer': _pre_tokenizer(kind),
      'decoder': _byte_level(use_regex=True),
      'model': {
        'type': 'BPE',
        'vocab': {token: i for i, token in enumerate(tokens)},
        'merges': [merge.split(' ') for merge in merges],
        'ignore_merges': kind in _IGNORE_MERGES,
      },
    },
    'bos_id': metadata.get('tokenizer.ggml.bos_token_id'),
    'eos_id': eos_id,
    'pad_id': metadata.get('tokenizer.ggml.padding_token_id'),
    'other_stop_ids': [i for i in stops if i is not None],
    'chat_template': metadata.get('tokenizer.chat_template'),
  }


def _added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return {'id': token_id, 'content': content, 'special': special} | flags


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
  return {
    'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex
  }  # fmt: skip


def _pre_tokenizer(kind: str) -> dict[str, Any]:
  rule, expression = _PRE_TOKENIZERS[kind]
  if rule == 'regex':
    return _byte_level(use_regex=True)
  if rule == 'digits':
    first = {'type': 'Digits', 'individual_digits': True}
    return {'type': 'Sequence', 'pretokenizers': [first, _byte_level(use_regex=True)]}
  first = {'type': 'Split', 'pattern': {'Regex': expression}, 'behavior': 'Isolated'}
  first['invert'] = False
  return {'type': 'Sequence', 'pretokenizers': [first, _byte_level(use_regex=False)]}


def _falls_back_to_bytes(spec: dict[str, Any]) -> bool:
  """Whether a BPE writes spaces as '▁' and, byte by byte, all characters that it has no token for.

  So is Gemma's. One that also begins every text with a space (Llama 2's) would do so in the middle
  of a conversation, whose parts are encoded one by one.
  """
  spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE}
  before = spec.get('pre_tokenizer')
  return (
    spec['model'].get('byte_fallback', False)
    and all(f'<0x{byte:02X}>' in spec['model']['vocab'] for byte in range(256))
    and spec.get('normalizer') == spaces
    and (before is None or before['type'] == 'Split')
  )


def _from_folder(folder: pathlib.Path) -> dict[str, Any]:
  spec = model_folder.read_json(folder / 'tokenizer.json')
  settings = model_folder.read_json(folder / 'tokenizer_config.json')
  if spec.get('model', {}).get('type') != 'BPE' or not (
    '"ByteLevel"' in json.dumps(spec.get('pre_tokenizer')) or _falls_back_to_bytes(spec)
  ):
    raise UserError(
      f'the tokenizer of {folder} is neither byte-level BPE nor BPE that falls back to bytes and '
      'puts nothing before a text, the kinds supported.'
    )
  ids = spec['model']['vocab'] | {token['content']: token['id'] for token in spec['added_tokens']}

  def token_id(key):
    token = settings.get(key)
    token = token.get('content') if isinstance(token, dict) else token
    if token is not None and token not in ids:
      raise UserError(f'{folder}: the {key} {token!r} is not in the vocabulary; download it again.')
    return None if token is None else ids[token]

  stops = []
  if (folder / 'generation_config.json').is_file():
    stops = model_folder.read_json(folder / 'generation_config.json').get('eos_token_id') or []
    stops = [stops] if isinstance(stops, int) else stops
  eos_id = token_id('eos_token')
  if eos_id is None:
    if not stops:
      raise UserError(f'{folder}: tokenizer_config.json names no eos_token.')
    eos_id = stops[0]
  template = settings.get('chat_template')
  if isinstance(template, list):
    template = {entry['name']: entry['template'] for entry in template}.get('default')
  if (folder / 'chat_template.jinja').is_file():
    template = (folder / 'chat_template.jinja').read_text(encoding='utf-8')
  return {
    'spec': spec,
    'bos_id': token_id('bos_token'),
    'eos_id': eos_id,
    'pad_id': token_id('pad_token'),
    'other_stop_ids': stops,
    'chat_template': template,
  }
