"""Episodes come back exactly: from JSON, from a journal that was killed, from TFDS."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import trajectory
from data.errors import UserError
from data.trajectory import KINDS, Episode, Journal, Step, without

TEXT = st.text(st.characters(codec='utf-8'), max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)


def make_episode(id='e0', num_steps=2, num_tokens=12, **changes) -> Episode:
  rng = np.random.default_rng(num_tokens)
  fields = dict(
    id=id,
    task_id='task-7',
    env='household',
    task_type='pick',
    split='train',
    instruction='put a müg in the sink',
    seed=3,
    policy='base',
    agent='react',
    memory='hints',
    model='tiny',
    tokenizer='ab12',
    tokens=rng.integers(0, 1000, num_tokens),
    kinds=np.arange(num_tokens) % len(KINDS),
    logprobs=-rng.random(num_tokens),
    steps=[
      Step(f'think: {i}\nact', 'action', 'why', 'go', f'seen {i}', 0.1 * i, i % 2 == 0, 9, 3, 2)
      for i in range(num_steps)
    ],
    success=True,
    score=0.3,
    termination='success',
    retrieved=[{'id': 'h1', 'score': 0.1, 'text': 'open {container}'}],
    env_steps=2,
    wall_s=0.123,
  )
  return Episode(**(fields | changes))


@st.composite
def episodes(draw):
  length = draw(st.integers(0, 20))
  array = lambda dtype, low, high: np.array(
    draw(st.lists(st.integers(low, high), min_size=length, max_size=length)), dtype
  )
  steps = draw(
    st.lists(
      st.builds(
        Step,
        reply=TEXT,
        parsed=st.sampled_from(trajectory.PARSED),
        thought=TEXT,
        action=TEXT,
        observation=TEXT,
        reward=FINITE,
        changed=st.booleans(),
        prompt_tokens=st.integers(0, 2**40),
      ),
      max_size=3,
    )
  )
  floats = st.floats(max_value=0, allow_nan=False, allow_subnormal=False, width=32)
  found = st.fixed_dictionaries({'id': TEXT, 'score': FINITE, 'text': TEXT})
  return make_episode(
    id=draw(TEXT),
    instruction=draw(TEXT),
    tokens=array(np.int32, 0, 2**31 - 1),
    kinds=array(np.uint8, 0, len(KINDS) - 1),
    logprobs=np.array(draw(st.lists(floats, min_size=length, max_size=length)), np.float32),
    steps=steps,
    score=draw(FINITE),
    termination=draw(st.sampled_from(trajectory.TERMINATIONS)),
    retrieved=draw(st.lists(found, max_size=2)),
  )


@given(episodes())
def test_json_round_trip_is_exact(episode):
  again = Episode.from_json(episode.to_json())
  assert again == episode
  for name in ('tokens', 'kinds', 'logprobs'):
    before, after = getattr(episode, name), getattr(again, name)
    assert after.dtype == before.dtype
    np.testing.assert_array_equal(before, after)
  assert '\n' not in episode.to_json()


def test_numpy_scalars_become_plain_json():
  episode = make_episode(env_steps=np.int64(4), score=np.float32(0.5), success=np.bool_(True))
  record = json.loads(episode.to_json())
  assert (record['env_steps'], record['score'], record['success']) == (4, 0.5, True)


def test_episode_rejects_what_it_cannot_mean():
  with pytest.raises(ValueError, match='one shape'):
    make_episode(kinds=[0])
  with pytest.raises(ValueError, match='termination'):
    make_episode(termination='bored')
  with pytest.raises(ValueError, match='kind'):
    make_episode(kinds=np.full(12, 6))
  with pytest.raises(ValueError, match='parsed'):
    make_episode(steps=[Step('x', parsed='perhaps')])


def test_without_drops_segments_and_keeps_ids():
  episode = make_episode()
  tokens, kinds, logprobs = without(episode)
  keep = [i for i, k in enumerate(episode.kinds) if KINDS[k] not in ('memory', 'few_shot')]
  np.testing.assert_array_equal(tokens, episode.tokens[keep])
  np.testing.assert_array_equal(logprobs, episode.logprobs[keep])
  assert not {KINDS[k] for k in kinds} & {'memory', 'few_shot'}
  np.testing.assert_array_equal(without(episode, ())[0], episode.tokens)


def test_journal_appends_and_reads(tmp_path):
  journal = Journal(tmp_path / 'run' / 'journal.jsonl')
  assert journal.ids() == set() and journal.read() == []
  written = [make_episode(f'e{i}', num_steps=i) for i in range(3)]
  for episode in written:
    journal.append(episode)
  assert journal.ids() == {'e0', 'e1', 'e2'}
  assert Journal(journal.path).read() == written
  assert json.loads(journal.path.read_text().splitlines()[1])['episode']['id'] == 'e1'
  with pytest.raises(UserError, match='already'):
    journal.append(written[0])


@pytest.mark.parametrize('cut', [1, 40, 300])
def test_journal_sets_a_torn_last_line_aside(tmp_path, cut):
  path = tmp_path / 'journal.jsonl'
  journal = Journal(path)
  for i in range(3):
    journal.append(make_episode(f'e{i}'))
  journal.close()
  whole = path.read_bytes()
  last = len(whole.splitlines(keepends=True)[-1])
  path.write_bytes(whole[: len(whole) - last + cut])

  reader = Journal(path)
  assert reader.torn == 1 and reader.ids() == {'e0', 'e1'}
  assert path.stat().st_size == len(whole) - last + cut, 'reading changes nothing'
  reader.append(make_episode('e2'))
  assert path.read_bytes() == whole
  assert len((tmp_path / 'journal.jsonl.torn').read_bytes()) == cut + 1
  again = Journal(path)
  assert again.torn == 0 and len(again.read()) == 3


def test_journal_completes_a_missing_line_end(tmp_path):
  path = tmp_path / 'journal.jsonl'
  first = Journal(path)
  first.append(make_episode('e0'))
  first.close()
  path.write_bytes(path.read_bytes()[:-1])
  journal = Journal(path)
  assert journal.torn == 0 and journal.ids() == {'e0'}
  journal.append(make_episode('e1'))
  assert Journal(path).ids() == {'e0', 'e1'}


def test_journal_names_a_broken_middle_line(tmp_path):
  path = tmp_path / 'journal.jsonl'
  journal = Journal(path)
  for i in range(3):
    journal.append(make_episode(f'e{i}'))
  lines = path.read_bytes().split(b'\n')
  lines[1] = lines[1].replace(b'task-7', b'task-8')
  path.write_bytes(b'\n'.join(lines))
  with pytest.raises(UserError, match=r'journal\.jsonl, line 2'):
    Journal(path)


def test_journal_has_one_writer(tmp_path):
  path = tmp_path / 'journal.jsonl'
  first, second = Journal(path), Journal(path)
  first.append(make_episode('e0'))
  with pytest.raises(UserError, match='another process'):
    second.append(make_episode('e1'))
  first.close()
  second.append(make_episode('e1'))
  assert Journal(path).ids() == {'e0', 'e1'}


def test_journal_survives_sigkill(tmp_path):
  """Every episode that `append` reported is there after a kill at any moment."""
  script = (
    'import sys; from tests.data.test_trajectory import make_episode; '
    'from data.trajectory import Journal; j = Journal(sys.argv[1])\n'
    'i = 0\n'
    'while True:\n'
    '  j.append(make_episode(f"e{i}", num_tokens=2000)); print(i, flush=True); i += 1\n'
  )
  path = tmp_path / 'journal.jsonl'
  process = subprocess.Popen(
    [sys.executable, '-c', script, str(path)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
  )
  process.stdout.readline()
  time.sleep(0.3)
  process.send_signal(signal.SIGKILL)
  reported = 1 + len(process.stdout.read().splitlines())
  process.wait()
  ids = Journal(path).ids()
  assert {f'e{i}' for i in range(reported)} <= ids
  assert len(ids) <= reported + 1


def test_a_part_of_a_journal_parses_no_other_line(tmp_path, monkeypatch):
  written = [make_episode(f'e{i}', num_tokens=8) for i in range(5)]
  journal = Journal(tmp_path / 'journal.jsonl')
  for episode in written:
    journal.append(episode)
  parsed, parse = [], trajectory.Episode.from_json
  monkeypatch.setattr(
    trajectory.Episode, 'from_json', lambda body: parsed.append(body) or parse(body))
  for i in range(3):
    assert trajectory.load_episodes(tmp_path, (i, 3)) == written[i::3]
  assert len(parsed) == len(set(parsed)) == 5
  assert trajectory.load_episodes(tmp_path, (7, 8)) == []


def test_tfds_round_trip_is_exact(tmp_path):
  written = [
    make_episode('e0'),
    make_episode('e1', num_steps=0, retrieved=[], num_tokens=0, termination='env_error'),
    make_episode('e2', num_steps=4, num_tokens=300, logprobs=np.full(300, -math.inf)),
  ]
  folder = tmp_path / 'episodes'
  trajectory.write_tfds(written[:1], folder)
  trajectory.write_tfds(written, folder)
  assert trajectory.read_tfds(folder) == written
  assert trajectory.load_episodes(folder) == trajectory.load_episodes(tmp_path) == written
  assert sorted(p.name for p in tmp_path.iterdir()) == ['episodes']
  assert trajectory.load_episodes(folder, (0, 2)) == written[::2]
  assert trajectory.load_episodes(folder, (1, 2)) == written[1::2]
  with pytest.raises(UserError, match='No episodes'):
    trajectory.write_tfds([], folder)


def test_tfds_opens_plainly_and_without_tensorflow(tmp_path):
  episode = make_episode(num_steps=2, termination='failure')
  trajectory.write_tfds([episode], tmp_path / 'episodes')
  script = """
import sys, tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source(split='train')
steps = list(source[0]['steps'])
print(len(source), [s['observation'].decode() for s in steps], [s['action'] for s in steps])
print([(bool(s['is_first']), bool(s['is_last']), bool(s['is_terminal'])) for s in steps])
print([float(s['discount']) for s in steps], [float(s['reward']) for s in steps])
print('tensorflow' in sys.modules)
"""
  result = subprocess.run(
    [sys.executable, '-c', script, str(tmp_path / 'episodes')],
    capture_output=True,
    text=True,
    check=True,
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
  )
  assert result.stdout.splitlines()[-4:] == [
    "1 ['put a müg in the sink', 'seen 0', 'seen 1'] [b'go', b'go', b'']",
    '[(True, False, False), (False, False, False), (False, True, True)]',
    '[1.0, 0.0, 0.0] [0.0, 0.1, 0.0]',
    'False',
  ]


def test_load_episodes_prefers_the_journal_and_names_an_empty_folder(tmp_path):
  trajectory.write_tfds([make_episode('old')], tmp_path / trajectory.TFDS_NAME)
  Journal(tmp_path / trajectory.JOURNAL_NAME).append(make_episode('new'))
  assert [e.id for e in trajectory.load_episodes(tmp_path)] == ['new']
  with pytest.raises(UserError, match='holds no episodes'):
    trajectory.load_episodes(tmp_path / 'nowhere')
