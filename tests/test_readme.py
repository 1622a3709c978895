"""README and docs: their commands can be started, their example runs, what they name exists."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree

import pytest

import rollout
import train
from configs import rollout as rollout_config
from configs import train as train_config
from data import trajectory
from tests import programs
from tests.agents import fakes
from tests.experiments import browser

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_ROOM = 'docs.own_environment:Escape'

pytestmark = pytest.mark.skipif(
  not (_ROOT / 'README.md').exists(), reason='README.md is not among the files of a Bazel test')


def _readme() -> str:
  return (_ROOT / 'README.md').read_text()


def _commands() -> list[list[str]]:
  """Every command of README that starts Python, its variables filled in, split into words."""
  found = []
  for language, block in re.findall(r'^```(\w*)\n(.*?)^```$', _readme(), re.S | re.M):
    variables = {}
    for line in block.replace('\\\n', ' ').splitlines() if not language else ():
      line = line.partition(' # ')[0].strip()
      for name, value in variables.items():
        line = line.replace(f'${name}', value)
      line = line.replace('$HINTSIGHT_DATA', '/data')
      assert '$' not in line, line
      if assignment := re.fullmatch(r'([A-Z]+)=(\S+)', line):
        variables[assignment.group(1)] = assignment.group(2)
      elif line.startswith('python '):
        found.append(shlex.split(line))
  return found


def test_every_command_names_what_there_is():
  commands = _commands()
  assert len(commands) >= 10
  for words in commands:
    if '--' in words:
      # A launcher's own flags, and the program that it starts.
      words, started = words[:words.index('--')], words[words.index('--') + 1:]
      assert (_ROOT / started[0]).is_file()
    config = next((w for w in words if w.startswith('--config=')), None)
    if config is None:
      assert words[1] == '-m'
      source = (_ROOT / f'{words[2].replace(".", "/")}.py').read_text()
      for flag in re.findall(r'--(\w+)', ' '.join(words)):
        assert flag == 'workdir' or f"'{flag}'" in source, words
      continue
    path, _, arg = config.removeprefix('--config=').partition(':')
    module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
    made = module.get_config(arg or None)  # an unknown key raises
    entry = words[1] if words[1] != '-m' else words[2].replace('.', '/') + '.py'
    assert (_ROOT / entry).is_file() and pathlib.Path(entry).stem == pathlib.Path(path).stem
    for word in words:
      if word.startswith('--config.'):
        key = word.removeprefix('--config.').partition('=')[0]
        assert key in made, word
    # A server writes nothing.
    assert entry == 'serve.py' or any(word.startswith('--workdir=') for word in words)


def test_the_example_of_an_environment_is_the_file():
  block = re.search(r'```python\n(.*?)```', _readme(), re.S).group(1)
  assert block == (_ROOT / 'docs' / 'own_environment.py').read_text()
  assert len([line for line in block.splitlines() if line.strip()]) <= 45


def test_the_example_of_an_environment_runs_as_a_user_starts_it(tmp_path):
  """README's command for the expert, which needs a tokenizer and no model."""
  words = next(w for w in _commands() if f'{_ROOM},agent=expert' in ' '.join(w))
  tokenizer = fakes.tokenizer_folder(tmp_path / 'tokenizer')
  words = [f'{w},base=random,tokenizer={tokenizer}' if w.startswith('--config=') else w
           for w in words if not w.startswith('--workdir=')]
  done = subprocess.run(
    [sys.executable, *words[1:], f'--workdir={tmp_path / "expert"}'], cwd=_ROOT,
    capture_output=True, text=True, timeout=300, env=programs.environment())
  assert done.returncode == 0, done.stderr
  episodes = trajectory.load_episodes(tmp_path / 'expert')
  assert len(episodes) == 60 and all(e.success and e.env == 'escape' for e in episodes)
  assert {e.env_steps for e in episodes} == {2, 3, 4}


def _tiny(tokenizer, **values):
  return rollout_config.make({
    'base': 'random', 'shrink': True, 'tokenizer': str(tokenizer), 'slots': 2,
    'max_context': 512, 'max_new_tokens': 8, 'agent': 'plain', 'max_env_steps': 3, **values})


@pytest.mark.slow
def test_an_own_environment_is_played_trained_and_played_again(tmp_path):
  tokenizer = fakes.tokenizer_folder(tmp_path / 'tokenizer')
  rollout.run(_tiny(tokenizer, env=_ROOM, split='test', episodes=3), tmp_path / 'before')
  before = trajectory.load_episodes(tmp_path / 'before')
  assert [e.task_id for e in before] == [f'test/room-{i}' for i in range(3)]
  rollout.run(
    _tiny(tokenizer, env=_ROOM, split='train', episodes=6, agent='expert', expert_format='plain'),
    tmp_path / 'expert')
  train.run(train_config.make({
    'data': str(tmp_path / 'expert'), 'base': 'random', 'shrink': True,
    'tokenizer': str(tokenizer), 'row_len': 512, 'batch_rows': 1, 'rank': 2, 'epochs': 1.0,
    'dtype': 'float32'}), tmp_path / 'student')
  rollout.run(
    _tiny(tokenizer, env=_ROOM, split='test', episodes=3,
          adapter=str(tmp_path / 'student' / 'adapter')), tmp_path / 'after')
  after = trajectory.load_episodes(tmp_path / 'after')
  assert {e.policy for e in after} == {'adapter'} and all(e.model_calls for e in after)


def test_the_room_is_won_by_the_key_alone():
  room = importlib.import_module('docs.own_environment')
  suite = room.Escape()
  game = suite.make(suite.tasks('train')[1])
  assert 'locked' in game.reset()
  for action, answer, valid in (
      ('open door', 'It is locked.', True), ('open drawer 1', 'It is empty.', True),
      ('dance', 'Nothing happens.', False), ('open drawer 2', 'You find a key', True)):
    result = game.step(action)
    assert result.observation.startswith(answer) and result.valid is valid and not result.done
  assert game.step('open drawer 2').changed is False
  assert game.step('open door').won


def _model_folder(folder, family):
  import torch
  import transformers

  from models import registry
  from tests.models import torch_reference

  fakes.tokenizer_folder(folder)
  size = fakes.make_tokenizer(folder).vocab_size
  config = registry.shrink(
    torch_reference.CONFIGS[family], vocab_size=size, max_position=1024)
  torch.manual_seed(0)
  transformers.AutoModelForCausalLM.from_config(torch_reference.hf_config(config)).save_pretrained(
    folder)
  return {'model': str(folder), 'slots': 2, 'max_context': 1024, 'max_env_steps': 2,
          'max_calls': 3, 'max_new_tokens': 8, 'skills': 'loop', 'episodes': 2}


def test_a_model_folder_that_transformers_saved_plays(tmp_path):
  values = _model_folder(tmp_path / 'model', 'llama_tied')
  rollout.run(rollout_config.make(values), tmp_path / 'run')
  episodes = trajectory.load_episodes(tmp_path / 'run')
  assert len(episodes) == 2 and all(e.model_calls for e in episodes)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['llama_tied', 'qwen2_untied'])
def test_a_model_folder_is_played_trained_and_played_again(tmp_path, family):
  values = _model_folder(tmp_path / 'model', family)
  rollout.run(rollout_config.make(values), tmp_path / 'run')
  # A random model wins nothing; what is shown is that it can be trained.
  train.run(train_config.make({
    'model': values['model'], 'data': str(tmp_path / 'run'), 'success_only': False,
    'max_invalid': 99, 'row_len': 1024, 'batch_rows': 1, 'rank': 2, 'dtype': 'float32'}),
    tmp_path / 'student')
  rollout.run(
    rollout_config.make({**values, 'adapter': str(tmp_path / 'student' / 'adapter')}),
    tmp_path / 'after')
  assert len(trajectory.load_episodes(tmp_path / 'after')) == 2


def test_names_in_the_architecture_page_exist():
  text = (_ROOT / 'docs' / 'architecture.md').read_text()
  rooms = {p.name for p in _ROOT.iterdir() if p.is_dir() and (p / '__init__.py').exists()}
  dotted = [name for name in re.findall(r'`([a-z_]+(?:\.\w+)+)', text)
            if name.split('.')[0] in rooms and not name.endswith('.py')]
  assert len(dotted) > 20
  for name in dotted:
    parts = name.split('.')
    thing = importlib.import_module('.'.join(parts[:2]))
    for i, part in enumerate(parts[2:], 2):
      if not hasattr(thing, part):
        thing = importlib.import_module('.'.join(parts[:i + 1]))
      else:
        thing = getattr(thing, part)
  for path in re.findall(r'`([\w/]+\.(?:py|md|svg))`', text + _readme()):
    assert list(_ROOT.rglob(path)), path
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    assert (_ROOT / 'docs' / link).exists(), link
  for link in re.findall(r'\]\((?!http)([^)#]+)\)', _readme()):
    assert (_ROOT / link).exists(), link


def test_the_picture_of_the_rooms_shows_the_rooms():
  tree = xml.etree.ElementTree.parse(_ROOT / 'docs' / 'rooms.svg')
  texts = [''.join(e.itertext()) for e in tree.iter('{http://www.w3.org/2000/svg}text')]
  for text in texts:
    if re.fullmatch(r'\w+/|\w+\.py', text):
      assert list(_ROOT.glob(text.rstrip('/'))) or (_ROOT / 'experiments' / text).exists(), text
  for room in ('envs', 'agents', 'inference', 'retrieval', 'data', 'models', 'training'):
    assert f'{room}/' in texts


@pytest.mark.skipif(not browser.PATH, reason='no chromium is installed: the picture is not drawn')
@pytest.mark.parametrize('dark', [False, True])
def test_texts_of_the_picture_are_apart_and_inside_it(tmp_path, dark):
  with browser.Browser(tmp_path / 'profile') as chromium:
    chromium.show(1000, dark=dark)
    chromium.open(_ROOT / 'docs' / 'rooms.svg')
    found = chromium.run("""(() => {
      const box = (e) => e.getBBox();
      const texts = [...document.querySelectorAll('text')];
      const rooms = [...document.querySelectorAll('.room')].map(box);
      const covers = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width
        && a.y < b.y + b.height && b.y < a.y + a.height;
      const inside = (a, b) => a.x >= b.x && a.x + a.width <= b.x + b.width;
      const wrong = [];
      texts.forEach((t, i) => {
        const a = box(t);
        if (a.x < 0 || a.x + a.width > 800) wrong.push(t.textContent);
        for (const r of rooms) if (covers(a, r) && !inside(a, r)) wrong.push(t.textContent);
        for (const u of texts.slice(i + 1)) {
          if (covers(a, box(u)) && Math.abs(a.y - box(u).y) < 8) wrong.push(u.textContent);
        }
      });
      return [texts.length, wrong, getComputedStyle(document.querySelector('.paper')).fill];
    })()""")
  assert found[0] > 30 and found[1] == []
  assert (sum(map(int, re.findall(r'\d+', found[2]))) < 180) is dark
