import dataclasses

import numpy as np
import pytest

from agents import episode as episode_lib
from agents import expert_episodes, memory, prompts
from data import errors, trajectory
from tests.agents import fakes

SUITE = fakes.LeverSuite()
LABELS = episode_lib.Labels('base', 'mock', 'test', 7)
SPEC = episode_lib.AgentSpec('react', max_env_steps=6, max_calls=9, max_repeats=4)


def start(tokenizer, index=1, spec=SPEC, make=SUITE.make, **options):
  task = SUITE.tasks('test')[index]  # index 1: lever 2
  run = episode_lib.EpisodeRun(
    episode_lib.Game(task, LABELS), make, tokenizer, spec, **options)
  run.start()
  return run


def say(run, tokenizer, reply, *, stop=True):
  """Plays the model: samples `reply`; returns the tokens that it was given for it."""
  new = run.next_tokens()
  ids = tokenizer.encode(reply) + ([tokenizer.chat.end_of_turn] if stop else [])
  run.receive(ids, [-0.25] * len(ids), stop_reason='stop' if stop else 'length',
              prefilled_tokens=len(new))
  return new


def play(tokenizer, *replies, **options):
  run = start(tokenizer, **options)
  for reply in replies:
    say(run, tokenizer, reply)
  return run


def test_success_and_its_counts(tokenizer):
  episode = play(tokenizer, 'think: try them', 'pull lever 1', 'a\nb', 'dance', 'pull lever 2'
                 ).result()
  assert episode.termination == 'success' and episode.success and episode.score == 1.0
  assert [s.parsed for s in episode.steps] == ['action' if i in (1, 3, 4) else k for i, k in
                                              enumerate(['thought', '', 'invalid', '', ''])]
  assert episode.steps[0].observation == 'OK.' and episode.steps[0].thought == 'try them'
  assert 'several lines' in episode.steps[2].observation
  assert (episode.env_steps, episode.model_calls, episode.invalid_actions) == (3, 5, 2)
  assert episode.id == 'base/test/lever-1/seed7' and episode.task_type == 'even'


def test_tokens_are_the_conversation_and_every_sampled_id_is_action(tokenizer):
  run = start(tokenizer)
  given = [say(run, tokenizer, reply) for reply in ('think: hm', 'pull lever 3', 'pull lever 2')]
  episode = run.result()
  text = tokenizer.decode(episode.tokens, skip_special=False)
  end = '<|im_end|>\n<|im_start|>'
  assert text.endswith(
    f'{end}assistant\nthink: hm{end}user\nOK.{end}assistant\npull lever 3{end}user\n'
    f'Lever 3 clicks.{end}assistant\npull lever 2<|im_end|>')
  action = episode.kinds == trajectory.KIND['action']
  assert tokenizer.decode(episode.tokens[action], skip_special=False) == (
    'think: hm<|im_end|>pull lever 3<|im_end|>pull lever 2<|im_end|>')
  np.testing.assert_array_equal(episode.logprobs, np.where(action, np.float32(-0.25), 0))
  # Each token was given to the model once: the prompt, then new turns only.
  assert sum(map(len, given)) == int((~action).sum())
  assert episode.prefilled_tokens == sum(map(len, given))
  assert episode.generated_tokens == int(action.sum())
  ends = np.flatnonzero(np.diff(action.astype(int)) == 1) + 1
  assert episode.prompt_tokens == int(ends.sum())


def test_a_reply_cut_by_length_is_closed_by_the_observation(tokenizer):
  run = start(tokenizer)
  say(run, tokenizer, 'pull lever 1', stop=False)
  new = run.next_tokens()
  assert new[0] == tokenizer.chat.end_of_turn
  say(run, tokenizer, 'pull lever 2')
  first = np.flatnonzero(run.result().tokens == tokenizer.chat.end_of_turn)[2]
  assert run.result().kinds[first] == trajectory.KIND['observation']


@pytest.mark.parametrize('termination, replies', [
  ('failure', ['lose']),
  ('step_limit', [f'dance {i}' for i in range(6)]),
  ('call_limit', [f'think: {i}' for i in range(9)]),
  ('repetition', ['dance', 'wait', 'dance', 'dance', 'dance']),
  ('repetition', ['think: hm'] * 4),
  ('env_error', ['pull lever 1', 'boom']),
])
def test_every_end_has_its_name(tokenizer, termination, replies):
  run = play(tokenizer, *replies)
  assert run.done
  episode = run.result()
  assert episode.termination == termination and not episode.success
  assert episode.model_calls == len(replies)
  # The last observation was given to no model, so it is in the steps and not in the tokens.
  assert episode.kinds[-1] == trajectory.KIND['action'] and episode.steps[-1].observation
  with pytest.raises(ValueError, match='ended'):
    say(run, tokenizer, 'wait')


def test_an_empty_generation_is_answered_and_counted(tokenizer):
  episode = play(tokenizer, '', 'pull lever 2').result()
  assert episode.success and episode.invalid_actions == 1 and episode.env_steps == 1
  assert episode.steps[0].parsed == 'invalid' and 'empty' in episode.steps[0].observation


def test_winning_with_the_last_step_is_a_success(tokenizer):
  replies = [f'dance {i}' for i in range(5)] + ['pull lever 2']
  assert play(tokenizer, *replies).result().termination == 'success'


def test_context_overflow_keeps_what_did_not_fit(tokenizer):
  run = play(tokenizer, 'pull lever 1')
  run.next_tokens()
  run.overflow()
  episode = run.result()
  assert episode.termination == 'context_overflow' and episode.model_calls == 1
  assert 'Lever 1 clicks.' in tokenizer.decode(episode.tokens)


def test_a_game_that_cannot_start_is_counted(tokenizer):
  def broken(task):
    return fakes.LeverEnvironment(dataclasses.replace(task, payload={'lever': 'broken'}))

  run = start(tokenizer, make=broken)
  assert run.done and 'broken' in run.error
  assert run.result().termination == 'env_error' and run.result().tokens.size == 0


def test_bad_input_from_an_environment_is_not_swallowed(tokenizer):
  def missing(task):
    raise errors.UserError('There is no game.')

  with pytest.raises(errors.UserError, match='no game'):
    start(tokenizer, make=missing)


def test_repeated_noops(tokenizer):
  # The second 'wait' repeats; after lever 1 the world has moved; then 'wait' is new again.
  replies = ['wait', 'wait', 'pull lever 1', 'wait', 'pull lever 2']
  assert play(tokenizer, *replies).result().repeated_noops == 1


def test_environments_are_closed(tokenizer):
  made = []

  def make(task):
    made.append(fakes.LeverEnvironment(task))
    return made[-1]

  run = start(tokenizer, make=make)
  assert made[0].closed == 0
  say(run, tokenizer, 'lose')
  assert made[0].closed == 1


def test_memory_is_recorded_and_can_be_dropped(tokenizer):
  remembered = memory.Memory('hints', ({'id': 'h1', 'score': 0.5, 'text': 'try lever 2'},), 31)
  example = prompts.Example('a task', (('pull lever 1', ''),))
  with_hints = play(tokenizer, 'pull lever 2', memory=remembered, examples=[example]).result()
  bare = play(tokenizer, 'pull lever 2').result()
  assert with_hints.memory == 'hints' and with_hints.retrieval_tokens == 31
  assert with_hints.retrieved == [{'id': 'h1', 'score': 0.5, 'text': 'try lever 2'}]
  for got, wanted in zip(trajectory.without(with_hints), trajectory.without(bare, ())):
    np.testing.assert_array_equal(got, wanted)


def test_record_survives_json(tokenizer):
  episode = play(tokenizer, 'pull lever 2').result()
  assert trajectory.Episode.from_json(episode.to_json()) == episode


@pytest.mark.parametrize('name', ['max_env_steps', 'max_calls', 'max_repeats', 'max_new_tokens'])
def test_limits_are_checked(name):
  with pytest.raises(errors.UserError, match=name):
    episode_lib.AgentSpec(**{name: -1})


def test_an_agent_without_a_token_limit_takes_the_format_s():
  assert episode_lib.AgentSpec('stateact').max_new_tokens == 192
  assert episode_lib.AgentSpec('stateact', max_new_tokens=70).max_new_tokens == 70


@pytest.mark.parametrize('name, calls', [('plain', 2), ('react', 4), ('stateact', 2)])
def test_expert_episode_in_every_format(tokenizer, name, calls):
  spec = dataclasses.replace(SPEC, format=name)
  task = SUITE.tasks('train')[1]
  episode = expert_episodes.expert_episode(SUITE, task, tokenizer, spec, LABELS)
  assert episode.success and episode.model_calls == calls and episode.env_steps == 2
  assert {s.stop_reason for s in episode.steps} == {'expert'} and not episode.logprobs.any()
  assert episode.steps[-1].thought == 'This one was not tried.'
  known = expert_episodes.expert_episode(
    SUITE, task, tokenizer, spec, LABELS, memory=memory.hints(['lever 2']), known_rules=['2'])
  assert known.env_steps == 1 and known.memory == 'hints'


def test_few_shots_are_of_the_type_short_and_not_the_played_ones(tokenizer):
  played = [t.id for t in SUITE.tasks('train')[:2]]
  found = expert_episodes.few_shot_examples(
    SUITE, {'odd', 'even'}, tokenizer, SPEC, 2, exclude=played)
  assert {k: len(v) for k, v in found.items()} == {'odd': 2, 'even': 2}
  # Lever 1 at the first try is a thought and a pull, lever 2 one more of each.
  assert [len(e.turns) for e in found['odd']] == [2, 4]
  assert not any('door 0.' in e.task or 'door 1.' in e.task for v in found.values() for e in v)


def test_too_few_solved_tasks_for_few_shots(tokenizer):
  with pytest.raises(errors.UserError, match='solved tasks'):
    expert_episodes.few_shot_examples(SUITE, {'odd'}, tokenizer, SPEC, 40)
