"""The JSON files of a model folder (Hugging Face layout): weights, encoder, tokenizer, adapter."""

import json
import pathlib
from typing import Any

from data.errors import UserError


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file of a model folder.

  Raises:
    UserError: the file is missing, broken, or holds something else than an object.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise UserError(f'{path} is missing; give the folder of a whole model.') from error
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f'{path} is not readable JSON ({error}); download it again.') from error
  if not isinstance(content, dict):
    raise UserError(f'{path} does not hold a JSON object; download it again.')
  return content
