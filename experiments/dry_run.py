"""What a dry run puts in the place of what costs: a tiny model, a few games, a hint server."""

import contextlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

# Everything else stays as the config says, so that what is walked is the setting itself: its agent,
# layout, few-shots, filters and optimizer.
_SMALL = dict(
  shrink=True, base='random', decoder='', train_games=6, eval_games=4, max_env_steps=4, max_calls=6,
  max_new_tokens=8, slots=4, dtype='float32')
_WARM_EPISODES = 8


def shrink(config):
  """The config of a dry run: the same setting, a tiny random model, a few games."""
  if config.data != 'generated' and not pathlib.Path(config.data).is_dir():
    print(f'{config.data} is not there: the dry run plays generated official games.', flush=True)
    config.data = 'generated'
    config.loop_skills = 'official'
  config.update({key: value for key, value in _SMALL.items() if key in config})
  if config.warm_episodes:
    config.warm_episodes = _WARM_EPISODES
  return config


def shrink_experience(config):
  """The config of a dry run of experience retrieval: likewise."""
  if config.data != 'generated' and not pathlib.Path(config.data).is_dir():
    print(f'{config.data} is not there: the dry run plays generated official games.', flush=True)
    config.data = 'generated'
    config.env_options = 'num_receptacles:6-8'
  own_limits = config.max_env_steps == 0
  small = dict(
    _SMALL, index_games=8, teacher_games=4, validation_games=2, validation_skip=0, epochs=1.0,
    candidates=min(2, config.candidates), grow=2)
  config.update({key: value for key, value in small.items() if key in config})
  if own_limits:
    # An expert may need more than a few steps; the model's calls are few in any case.
    config.max_env_steps = 0
  return config


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers every chat request with one hint."""

  def do_POST(self):
    self.rfile.read(int(self.headers.get('Content-Length', 0)))
    hints = json.dumps({'hints': ['Search every place for {object} before you go elsewhere.']})
    body = json.dumps({'choices': [{'message': {'role': 'assistant', 'content': hints}}]}).encode()
    self.send_response(200)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    """Says nothing: the loop's own output is what is looked at."""


@contextlib.contextmanager
def hint_server() -> Iterator[str]:
  """A server of the OpenAI chat protocol on loopback; gives its base URL."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/v1'
  finally:
    server.shutdown()
    server.server_close()
