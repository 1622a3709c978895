import hypothesis
import hypothesis.strategies as st
import pytest

from agents import formats, memory, prompts
from data import errors, trajectory

TEXT = st.text(max_size=30).map(lambda t: f'x{t}')
EXAMPLE = st.builds(
  prompts.Example, TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(tuple))
DROPPED = [trajectory.KIND['memory'], trajectory.KIND['few_shot']]


@hypothesis.given(
  layout=st.sampled_from(prompts.LAYOUTS), name=st.sampled_from(list(formats.FORMATS)),
  style=st.sampled_from(prompts.STYLES), task=TEXT, hints=st.lists(TEXT, max_size=3),
  examples=st.lists(EXAMPLE, max_size=2))
def test_dropping_segments_is_rendering_without_them(
    tokenizer, layout, name, style, task, hints, examples):
  system = prompts.system_text(formats.get_format(name), style, ['go to {place}', 'look'])
  prompt = prompts.render(
    tokenizer, system=system, task=task, memory=memory.hints(hints), examples=examples,
    layout=layout)
  bare = prompts.render(tokenizer, system=system, task=task, layout=layout)
  kept = [(t, k) for t, k in zip(prompt.tokens, prompt.kinds) if k not in DROPPED]
  assert kept == list(zip(bare.tokens, bare.kinds))
  # The student's prompt is the same whichever layout its teacher had.
  assert bare == prompts.render(tokenizer, system=system, task=task)
  assert (DROPPED[0] in prompt.kinds) == bool(hints)
  assert (DROPPED[1] in prompt.kinds) == bool(examples)


def _text(tokenizer, layout, **parts):
  prompt = prompts.render(tokenizer, system='SYS', task='TASK', layout=layout, **parts)
  return tokenizer.decode(prompt.tokens, skip_special=False)


PARTS = dict(
  memory=memory.hints(['use  the\nkiln']),
  examples=[prompts.Example('T1', (('R1', 'O1'), ('R2', 'O2')))])


def test_default_layout(tokenizer):
  assert _text(tokenizer, 'default', **PARTS) == (
    '<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nT1<|im_end|>\n<|im_start|>assistant\n'
    'R1<|im_end|>\n<|im_start|>user\nO1<|im_end|>\n<|im_start|>assistant\nR2<|im_end|>\n'
    '<|im_start|>user\nHints:\n- use the kiln\n\nTASK<|im_end|>\n<|im_start|>assistant\n')


def test_paper_a_puts_hints_between_task_and_examples(tokenizer):
  text = _text(tokenizer, 'paper_a', **PARTS)
  order = [text.index(part) for part in ('SYS', 'TASK', 'silently', '- use the kiln', 'T1', 'R2')]
  assert order == sorted(order) and text.endswith('<|im_end|>\n<|im_start|>assistant\n')
  assert 'observation' in text


def test_paper_b_puts_memory_into_the_system_prompt(tokenizer):
  text = _text(tokenizer, 'paper_b', **PARTS)
  assert text.startswith('<|im_start|>system\nSYS\n\nHints:\n- use the kiln<|im_end|>\n')


def test_no_memory_leaves_no_header(tokenizer):
  for layout in prompts.LAYOUTS:
    assert 'Hints' not in _text(tokenizer, layout, memory=memory.hints([]))


def test_a_task_keeps_its_room_and_says_its_instruction_once():
  room = 'You are in a hall.'
  text = 'You are in a hall.\n\nYour task is to: find a pen.'
  assert prompts.task_text('find a pen.', room) == text
  given = f'{room}\n\nYour task is to: find a pen'
  assert prompts.task_text('find a pen.', given) == given


def test_control_tokens_in_texts_stay_text(tokenizer):
  ids = prompts.next_turn(tokenizer, 'You see <|im_end|>.', [tokenizer.chat.end_of_turn])
  assert ids.count(tokenizer.chat.end_of_turn) == 1  # the user turn's own


def test_a_cut_reply_gets_its_end_of_turn(tokenizer):
  closed = prompts.next_turn(tokenizer, 'OK.', [5, tokenizer.chat.end_of_turn])
  assert prompts.next_turn(tokenizer, 'OK.', [5, 6]) == [tokenizer.chat.end_of_turn, *closed]


def test_full_style_lists_the_templates():
  text = prompts.system_text(formats.Plain(), 'full', ['go to {place}', 'look'])
  assert '- go to {place}\n- look' in text


def test_short_system_prompts_are_short(smollm2_path):
  from data.tokenizer import Tokenizer
  real = Tokenizer.load(smollm2_path)
  lengths = {name: len(real.encode(prompts.system_text(formats.get_format(name))))
             for name in formats.FORMATS}
  assert lengths['plain'] <= 45 and max(lengths.values()) <= 70, lengths
  block = memory.hints(['To make a {object} glazed, fire it with the kiln after you open it.'] * 3)
  assert len(real.encode(block.block('default'))) <= 90


@pytest.mark.parametrize('layout, style', [('paper_c', 'short'), ('default', 'long')])
def test_unknown_layout_or_style(layout, style):
  with pytest.raises(errors.UserError, match='There is no'):
    prompts.check(layout, style)
