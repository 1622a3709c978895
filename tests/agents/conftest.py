import pytest

from tests.agents import fakes


@pytest.fixture(scope='session')
def tokenizer(tmp_path_factory):
  return fakes.make_tokenizer(tmp_path_factory.mktemp('tokenizer'))
