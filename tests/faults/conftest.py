import pytest

from tests.agents import fakes
from tests.faults import runs


@pytest.fixture(scope='session')
def tokenizer_folder(tmp_path_factory):
  return fakes.tokenizer_folder(tmp_path_factory.mktemp('faults') / 'tokenizer')


@pytest.fixture
def disk(tmp_path):
  """A disk of 4 MiB; the test is skipped, visibly, where none may be mounted."""
  with runs.small_disk(tmp_path / 'disk', 4 << 20) as small:
    if small is None:
      pytest.skip('no tmpfs can be mounted here (neither root nor user namespaces)')
    yield small
