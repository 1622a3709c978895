"""The tokenizer equals `transformers`', and text from outside cannot speak for the template."""

import copy
import json
import pathlib
import re
import unicodedata

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from data.gguf import GGUFFile
from data.tokenizer import Tokenizer, _byte_alphabet

CORPUS = [
  'You are in the middle of a room. Looking quickly around you, you see a cabinet 12, a fridge 1.',
  "> go to countertop 3\nOn the countertop 3, you see a saltshaker 2, and don't touch IT'S mug 10.",
  '  leading and trailing  \n\n\n\ttabs\r\nwindows   \u00a0nbsp\u3000ideographic ',
  'price: $1,234.56 (50% off) [search] {object} <think> a_b-c/d\\e #1 @2 ~3 ^4 |5| `6`',
  'a  5 x   77\n 9\t8  ٣٤ ½ Ⅷ ²',
  'Größe naïve Ωμέγα Привет שלום مرحبا हिन्दी 日本語 한국어 ไทย',
  '😀🏽 👩‍👩‍👧 ☂️ \u200b\u200d e\u0301 ﬁ',
  "I'LL we've THEY'RE 'tis 1'2'3",
  'def f(x):\n    return x ** 2  # comment\n\n\n',
  '',
  ' ',
]
CONTROL = ['<|im_start|>', '<|im_end|>', '<|endoftext|>', '<repo_name>', '<file_sep>']

SMOLLM2 = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501
LLAMA3 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501


@pytest.fixture(scope='module')
def smollm2(smollm2_path):
  return Tokenizer.load(smollm2_path)


@pytest.fixture(scope='module')
def reference(smollm2_path):
  """What `transformers` builds from the same file."""
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  return transformers.AutoTokenizer.from_pretrained(
    smollm2_path.parent, gguf_file=smollm2_path.name
  )


@pytest.fixture(scope='module')
def small_vocab(smollm2_path):
  """A byte-complete vocabulary with 3,000 of SmolLM2's merges: (tokens, merges)."""
  letters = list(_byte_alphabet().values())
  tokens, merges = list(letters), []
  merges += GGUFFile(smollm2_path).metadata['tokenizer.ggml.merges'][:3000]
  # Runs of digits too, so that a split of numbers by threes shows.
  merges += [f'{a} {b}' for a in '0123456789' for b in '0123456789']
  merges += [f'{a}{b} {c}' for a in '01' for b in '0123' for c in '0123456789']
  known = set(tokens)
  kept = []
  for merge in merges:
    left, right = merge.split(' ')
    if left in known and right in known:
      kept.append(merge)
      if left + right not in known:
        known.add(left + right)
        tokens.append(left + right)
  return tokens, kept


def write_gguf(path: pathlib.Path, small_vocab, pre, architecture, template, controls):
  """Writes a GGUF that holds a tokenizer and one tensor; the first two controls are BOS, EOS."""
  tokens, merges = small_vocab
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens + controls)
  writer.add_token_merges(merges)
  writer.add_token_types([1] * len(tokens) + [3] * len(controls))
  writer.add_bos_token_id(len(tokens))
  writer.add_eos_token_id(len(tokens) + 1)
  if template:
    writer.add_chat_template(template)
  writer.add_tensor('token_embd.weight', np.zeros((2, 32), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_smollm2_basics(smollm2):
  assert smollm2.vocab_size == 49152
  assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (1, 2, 2)
  assert smollm2.stop_ids == (2, 0)  # <|im_end|> and <|endoftext|>
  assert re.fullmatch('[0-9a-f]{64}', smollm2.fingerprint)
  assert smollm2.encode('') == []
  assert smollm2.decode(np.array([1, 6004, 2])) == smollm2.decode([6004])
  assert smollm2.decode([1, 6004], skip_special=False).startswith('<|im_start|>')


def test_equals_transformers_from_the_same_gguf(smollm2, reference):
  for text in CORPUS:
    # It has no rule for 'smollm' and splits as GPT-2, which differs for blanks before a digit.
    if not re.search(r'\s\s\d|[^\d]²|½|Ⅷ', text):
      assert smollm2.encode(text) == reference(text, add_special_tokens=False).input_ids, text
  # With the digit rule of the model's own tokenizer.json it is equal everywhere.
  backend = copy.deepcopy(reference.backend_tokenizer)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
    tokenizers.pre_tokenizers.Digits(individual_digits=True),
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])
  for text in CORPUS:
    assert smollm2.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
  for text in CONTROL:
    assert smollm2.encode(f'a{text} b', allow_special=True) == backend.encode(f'a{text} b').ids
  messages = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u\n1'}]
  want = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  assert smollm2.render_chat(messages, add_generation_prompt=True) == want


@pytest.mark.parametrize('pre', ['gpt2', 'qwen2', 'llama-bpe'])
def test_other_pre_tokenizers_equal_transformers(pre, small_vocab, tmp_path):
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  controls = ['<|endoftext|>', '<|im_end|>', '<|im_start|>']
  path = write_gguf(tmp_path / 't.gguf', small_vocab, pre, 'llama', None, controls)
  ours = Tokenizer.load(path)
  tokens, merges = small_vocab
  if pre == 'qwen2':  # a GGUF does not say that Qwen2 normalises; the class does
    reference = transformers.Qwen2Tokenizer(
      vocab={token: i for i, token in enumerate(tokens + controls)},
      merges=[tuple(merge.split(' ')) for merge in merges],
    )
  else:
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
  digits = ['1234567', 'a 12 345  6789', '٣٤٥٦']
  for text in CORPUS + digits:
    assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids, text
  normal = unicodedata.normalize('NFC', ''.join(CORPUS))
  assert ours.decode(ours.encode(normal)) == normal


@given(
  st.lists(
    st.one_of(
      st.sampled_from([*CONTROL, '<|im_', 'end|>', ' ', '\n', '7']),
      st.text(st.characters(exclude_categories=['Cs']), max_size=12),
    ),
    max_size=8,
  )
)
def test_text_never_yields_control_tokens_and_round_trips(smollm2, parts):
  text = ''.join(parts)
  ids = smollm2.encode(text)
  assert smollm2.special_ids.isdisjoint(ids)
  decoded = smollm2.decode(ids)
  spellable = smollm2._unspellable.isdisjoint(text.encode())
  assert decoded == text if spellable else len(decoded) == len(text)


def test_bytes_outside_the_vocabulary_become_visible(smollm2):
  assert smollm2.decode(smollm2.encode('go\x04to \U00040000')) == 'go\ufffdto \ufffd'


def test_folder_equals_gguf(smollm2, reference, tmp_path):
  reference.save_pretrained(tmp_path)
  ours = Tokenizer.load(tmp_path)
  assert ours.fingerprint == smollm2.fingerprint
  assert ours.stop_ids == smollm2.stop_ids
  assert ours.chat == smollm2.chat
  text = 'go to cabinet 12 <|im_end|>'
  assert ours.encode(text) == smollm2.encode(text)
  assert ours.encode(text, allow_special=True)[-1] == 2


def test_folder_variants(smollm2_path, tmp_path):
  """Template in the settings, in a list and in its own file; several EOS; tokens as objects."""
  letters = list(_byte_alphabet().values())
  controls = ['<s>', '</s>', '<|im_start|>', '<|im_end|>']
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  spec = {
    'version': '1.0',
    'added_tokens': [
      {'id': 256 + i, 'content': c, 'special': True, **flags} for i, c in enumerate(controls)
    ],
    'normalizer': None,
    'pre_tokenizer': {
      'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True
    },
    'post_processor': None,
    'decoder': {
      'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True
    },
    'model': {
      'type': 'BPE', 'vocab': {c: i for i, c in enumerate(letters)}, 'merges': [],
    },
    'truncation': {'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0, 'direction': 'Right'},
  }  # fmt: skip
  settings = {
    'bos_token': {'content': '<s>'},
    'eos_token': '</s>',
    'chat_template': [
      {'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': SMOLLM2}
    ],
  }  # fmt: skip

  def write(name, content):
    (tmp_path / name).write_text(json.dumps(content))

  write('tokenizer.json', spec)
  write('tokenizer_config.json', settings)
  write('generation_config.json', {'eos_token_id': [257, 256]})
  tokenizer = Tokenizer.load(tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 257)
  assert tokenizer.stop_ids == (259, 257, 256)
  assert tokenizer.chat.end_of_turn == 259
  assert len(tokenizer.encode('never cut to three')) == 18
  (tmp_path / 'chat_template.jinja').write_text(LLAMA3)
  assert Tokenizer.load(tmp_path).chat_template == LLAMA3

  (tmp_path / 'chat_template.jinja').unlink()
  write('tokenizer_config.json', {'eos_token': '</s>'})
  with pytest.raises(UserError, match='no chat template'):
    _ = Tokenizer.load(tmp_path).chat
  write('tokenizer_config.json', {'eos_token': '<eos>'})
  with pytest.raises(UserError, match="'<eos>'"):
    Tokenizer.load(tmp_path)
  write('tokenizer.json', spec | {'model': {'type': 'Unigram', 'vocab': []}})
  with pytest.raises(UserError, match='neither byte-level BPE nor'):
    Tokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"model"')
  with pytest.raises(UserError, match='not readable JSON'):
    Tokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match=r'tokenizer\.json is missing'):
    Tokenizer.load(tmp_path)


# System and first user message share a turn; the assistant is called model.
GEMMA = (
  "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
  "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
  "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
  "{{ '\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma_spec():
  """Like Gemma's: a space is a letter, bytes spell what is unknown, white space has tokens."""
  spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
  split = {
    'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False}
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  trained.pre_tokenizer = tokenizers.pre_tokenizers.Split('\n', 'isolated')
  trained.train_from_iterator(
    [CORPUS[0], CORPUS[1], CORPUS[8]], tokenizers.trainers.BpeTrainer(
      vocab_size=150, show_progress=False))
  model = json.loads(trained.to_str())['model']
  controls = ['<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>']
  others = ['<unused0>', '<table>', *('\n' * n for n in (2, 3, 4)), *('▁' * n for n in (2, 3))]
  learnt = sorted(model['vocab'], key=model['vocab'].get)
  tokens = dict.fromkeys([*controls, *others, *(f'<0x{b:02X}>' for b in range(256)), *learnt])
  vocab = {token: i for i, token in enumerate(tokens)}
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return {
    'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': spaces,
    'pre_tokenizer': split, 'post_processor': None,
    'added_tokens': [
      {'id': vocab[token], 'content': token, 'special': token in controls, **flags}
      for token in controls + others],
    'decoder': {'type': 'Sequence', 'decoders': [
      {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'},
      {'type': 'Fuse'}]},
    'model': model | {
      'vocab': vocab, 'unk_token': '<unk>', 'byte_fallback': True, 'fuse_unk': True},
  }  # fmt: skip


def write_gemma(folder, spec):
  settings = {'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>'}
  contents = {
    'tokenizer.json': spec, 'tokenizer_config.json': settings | {'chat_template': GEMMA},
    'generation_config.json': {'eos_token_id': [1, 5]}}
  for name, content in contents.items():
    (folder / name).write_text(json.dumps(content))


def test_gemma_s_kind_of_tokenizer(tmp_path):
  spec = gemma_spec()
  write_gemma(tmp_path, spec)
  ours, theirs = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_str(json.dumps(spec))
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 1, 0) and ours.vocab_size > 300
  for text in [*CORPUS, 'a\n\n\n\n\nb', '  x   y', '\x04\U00040000']:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == text
  # Bytes that end in the middle of a character are shown, not dropped.
  assert ours.decode(ours.encode('é')[:1]) == '\ufffd'
  # Text cannot speak for the template.
  for token in ('<end_of_turn>', '<eos>', '<unused0>', '<0x0A>'):
    assert len(ids := ours.encode(f'go {token}')) > 4 and ours.special_ids.isdisjoint(ids)
    assert ours.decode(ids) == f'go {token}'
  # The conversation, part by part, is the template's.
  chat = ours.chat
  assert ours.stop_ids == (5, 1) and chat.end_of_turn == 5
  parts = [
    chat.system_open, ours.encode('Act.'), chat.system_to_user, ours.encode('A mug 1.'),
    chat.user_to_assistant, ours.encode('take mug 1'), [chat.end_of_turn, *chat.assistant_to_user],
    ours.encode('OK.'), chat.user_to_assistant]
  whole = (
    '<bos><start_of_turn>user\nAct.\n\nA mug 1.<end_of_turn>\n<start_of_turn>model\ntake mug 1'
    '<end_of_turn>\n<start_of_turn>user\nOK.<end_of_turn>\n<start_of_turn>model\n')
  assert [i for part in parts for i in part] == theirs.encode(whole, add_special_tokens=False).ids


@pytest.mark.parametrize('change', [
  {'normalizer': {'type': 'Sequence', 'normalizers': [
    {'type': 'Prepend', 'prepend': '▁'},
    {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}]}},
  {'normalizer': None},
  {'pre_tokenizer': {
    'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}},
  {'model': {'byte_fallback': False}},
])  # fmt: skip
def test_tokenizers_near_gemma_s_are_refused(change, tmp_path):
  spec = gemma_spec()
  write_gemma(tmp_path, spec | {
    key: value if key != 'model' else spec['model'] | value for key, value in change.items()})
  with pytest.raises(UserError, match='neither byte-level BPE nor BPE that falls back'):
    Tokenizer.load(tmp_path)


CHATS = {
  'smollm2': (SMOLLM2, ['<|im_start|>', '<|im_end|>', '<|endoftext|>'], '<|im_end|>', ''),
  'qwen25': (QWEN25, ['<|endoftext|>', '<|im_end|>', '<|im_start|>'], '<|im_end|>', ''),
  'llama3': (
    LLAMA3,
    ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', '<|start_header_id|>',
     '<|end_header_id|>'],
    '<|eot_id|>',
    '<|begin_of_text|>',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', CHATS)
def test_chat_seams_are_the_template(name, small_vocab, tmp_path):
  template, controls, end_of_turn, start = CHATS[name]
  pre = {'smollm2': 'smollm', 'qwen25': 'qwen2', 'llama3': 'llama-bpe'}[name]
  path = write_gguf(tmp_path / 't.gguf', small_vocab, pre, 'llama', template, controls)
  tokenizer = Tokenizer.load(path)
  chat = tokenizer.chat
  assert tokenizer.token(chat.end_of_turn) == end_of_turn
  assert tokenizer.stop_ids[0] == chat.end_of_turn
  assert set(tokenizer.stop_ids) >= {tokenizer.eos_id, chat.end_of_turn}
  assert tokenizer.decode(chat.system_open, skip_special=False).startswith(start)
  roles = ['system', 'user', 'assistant', 'user', 'assistant', 'user']
  contents = ['Act.', 'You see a mug 1.\nTask: heat it', 'take mug 1', 'You pick it up.', 'go', 'x']
  messages = [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=True)]
  whole = tokenizer.render_chat(messages, add_generation_prompt=True)
  turn = [chat.end_of_turn, *chat.assistant_to_user]
  seams = [chat.system_open, chat.system_to_user, chat.user_to_assistant, turn]
  seams += [chat.user_to_assistant, turn]
  ids = []
  for seam, content in zip(seams, contents, strict=True):
    ids += [*seam, *tokenizer.encode(content)]
  ids += chat.user_to_assistant
  assert tokenizer.decode(ids, skip_special=False) == whole
  assert ids == tokenizer.encode(whole, allow_special=True)


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    ("{{ raise_exception('System role not supported') }}", 'System role not supported'),
    ('{% for m in messages %}{{ m.content }}<|im_end|>{{ loop.index }}{% endfor %}', 'more than'),
    (SMOLLM2.replace("message['content']", "message['content'] | upper"), 'more than'),
    (SMOLLM2.replace('<|im_end|>', '</turn>'), 'control token'),
    ('{% if %}', 'refuses'),
    (
      "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>"
      '{{ m.content }}{% endif %}{% endfor %}',
      'more than',
    ),
  ],
)
def test_templates_without_seams_are_refused(template, message, small_vocab, tmp_path):
  controls = ['<|im_start|>', '<|im_end|>']
  path = write_gguf(tmp_path / 't.gguf', small_vocab, 'smollm', 'llama', template, controls)
  with pytest.raises(UserError, match=message):
    _ = Tokenizer.load(path).chat


def test_bad_gguf(small_vocab, smollm2_path, tmp_path):
  path = write_gguf(tmp_path / 't.gguf', small_vocab, 'tekken', 'llama', None, ['<s>', '</s>'])
  with pytest.raises(UserError, match="'tekken'"):
    Tokenizer.load(path)
  with pytest.raises(UserError, match='there is no GGUF file'):
    Tokenizer.load(tmp_path / 'missing.gguf')
  (tmp_path / 'text.gguf').write_text('hello')
  with pytest.raises(UserError, match='not a GGUF'):
    Tokenizer.load(tmp_path / 'text.gguf')
  head = smollm2_path.open('rb').read(1_000_000)
  for size in (4, 10, 24, 100, 5_000, 1_000_000):
    (tmp_path / 'short.gguf').write_bytes(head[:size])
    with pytest.raises(UserError, match='truncated'):
      Tokenizer.load(tmp_path / 'short.gguf')
