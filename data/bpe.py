"""Trains the tokenizer of a model folder: byte-level BPE with the ChatML template."""

import json
import pathlib
import re
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data import workdir
from data.errors import UserError

END_OF_TEXT, OPEN, CLOSE = '<|endoftext|>', '<|im_start|>', '<|im_end|>'
SPECIAL = (END_OF_TEXT, OPEN, CLOSE)
MIN_VOCABULARY = 256 + len(SPECIAL)

# ChatML as it is commonly written: a role line, the content, a marker and a line break.
CHAT_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
  "+ '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MARKERS = re.compile('|'.join(map(re.escape, SPECIAL)))


def check_size(vocab_size: int) -> int:
  """The size itself; raises UserError where it is smaller than the bytes and markers."""
  if vocab_size < MIN_VOCABULARY:
    raise UserError(f'vocab_size={vocab_size} is too small; take at least {MIN_VOCABULARY}.')
  return vocab_size


def train(texts: Iterable[str], vocab_size: int, folder: str | pathlib.Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json.

  Text is split into words as GPT-2 splits it, and all 256 bytes are in the vocabulary: any text can
  be spelt, seen or not.

  Args:
    texts: what the merges are learnt from; the chat's markers in them separate texts.
    vocab_size: tokens at most, markers and bytes included; MIN_VOCABULARY learns no merge.
    folder: made if it is missing.

  Raises:
    UserError: vocab_size is smaller than the bytes and markers.
  """
  check_size(vocab_size)
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    # Sorted: equal runs write equal files.
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator((part for text in texts for part in _MARKERS.split(text)), trainer)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  workdir.write_json(folder / 'tokenizer.json', json.loads(tokenizer.to_str()))
  workdir.write_json(folder / 'tokenizer_config.json', {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': OPEN,
    'eos_token': CLOSE,
    'pad_token': END_OF_TEXT,
    'clean_up_tokenization_spaces': False,
    'chat_template': CHAT_TEMPLATE,
  })
