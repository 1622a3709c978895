import pytest

from agents import memory
from data import errors
from retrieval import hints as hints_lib
from tests.agents import fakes

SUITE = fakes.LeverSuite(6)


@pytest.fixture
def bank(tmp_path):
  def hint(text, task_type, *tasks):
    return hints_lib.Hint(
      hints_lib.hint_id(task_type, text), text, task_type, len(tasks),
      [{'episode_id': f'e{t}', 'task_id': t} for t in tasks], 'rules')

  path = tmp_path / 'bank.json'
  hints_lib.HintBank([
    hint('Pull the lever of the {object}.', 'odd', 'test/lever-0', 'test/lever-2'),
    hint('Try another door.', 'odd', 'test/lever-0'),
  ]).save(path)
  return path


def test_hints_are_chosen_per_task_and_type(bank):
  index = memory.load_index(bank, 'bm25')
  found = memory.retrieve_hints(
    index, SUITE, SUITE.tasks('test'), 3, method='bm25', leave_one_out=False)
  assert set(found) == {t.id for t in SUITE.tasks('test')}
  assert len(found['test/lever-0'].retrieved) == 2
  assert found['test/lever-0'].retrieved[0].keys() == {'id', 'score', 'text'}
  # The bank knows nothing of the other type: an empty memory, without a header.
  assert found['test/lever-1'].retrieved == () and found['test/lever-1'].block() == ''


def test_leave_one_out(bank):
  index = memory.load_index(bank, 'fixed')
  found = memory.retrieve_hints(index, SUITE, SUITE.tasks('test'), 3, method='fixed')
  assert [len(found[f'test/lever-{i}'].retrieved) for i in (0, 2)] == [1, 2]


def test_block_is_a_header_and_one_bullet_a_hint():
  block = memory.hints(['Pull  the\nlever.', 'Wait.']).block()
  assert block == 'Hints:\n- Pull the lever.\n- Wait.'


def test_bad_banks_methods_and_kinds(bank, tmp_path):
  with pytest.raises(errors.UserError, match='nothing'):
    memory.load_index(tmp_path / 'nothing.json', 'bm25')
  with pytest.raises(errors.UserError, match='tfidf'):
    memory.load_index(bank, 'tfidf')
  with pytest.raises(errors.UserError, match='none, hints, experience'):
    memory.check_kind('dreams')


def test_minilm_retrieval(bank, minilm_path, tmp_path):
  index = memory.load_index(bank, 'minilm', tmp_path / 'vectors.npz')
  found = memory.retrieve_hints(index, SUITE, SUITE.tasks('test')[:3], 1, leave_one_out=False)
  assert found['test/lever-0'].retrieved[0]['text'] == 'Pull the lever of the {object}.'
  assert found['test/lever-0'].retrieval_tokens > 10
