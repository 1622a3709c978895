"""BUILD's test targets run their tests."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize('body, code', [
  ('from data import errors\n\n\ndef test_it():\n  assert errors.UserError\n', 0),
  ('def test_it():\n  assert False\n', 1),
  ('', 5),
])
def test_the_runner_s_exit_code_is_pytest_s(tmp_path, body, code):
  path = tmp_path / 'test_it.py'
  path.write_text(body)
  done = subprocess.run(
    [sys.executable, 'tests/run_pytest.py', str(path)], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == code, done.stdout + done.stderr


def test_every_test_file_is_a_target_of_the_runner():
  build = ROOT / 'BUILD'
  if not build.exists():
    pytest.skip('BUILD is not among the files of a Bazel test')

  def glob(patterns, exclude=()):
    found = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)}
    return sorted(found - (set(glob(exclude)) if exclude else set()))

  targets = []

  def rule(**attributes):
    targets.append(attributes)

  # Starlark is near enough to Python for this file.
  exec(build.read_text(), {
    'glob': glob, 'package': rule, 'py_library': rule, 'py_binary': rule, 'py_test': rule})
  tests = [target for target in targets if target.get('main') == 'tests/run_pytest.py']
  assert sorted(target['args'][0] for target in tests) == glob(['tests/**/test_*.py'])
  assert all({target['main'], *target['args']} == set(target['srcs']) for target in tests)
  games = next(target for target in targets if target.get('name') == 'envs')
  assert 'envs/alfred/alfred.pddl' in games['data']
