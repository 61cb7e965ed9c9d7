"""Prompt layers (section 3.3): learned tokens of both towers.

Each kind is a file of its own, built by name: `textual(classes)` gives the text tower's tokens, `visual()` the image
tower's. Sequence order everywhere is `[CLS, registers, visual prompts, patches]`.
"""

from patchrank.layers.prompts.base import PROMPTS as PROMPTS
from patchrank.layers.prompts.base import count_visual as count_visual
from patchrank.layers.prompts.base import create_prompt as create_prompt
from patchrank.layers.prompts.base import insert as insert
from patchrank.layers.prompts.base import register_prompt as register_prompt
from patchrank.layers.prompts.base import remove as remove
from patchrank.layers.prompts.coupled import MODES as MODES
from patchrank.layers.prompts.coupled import Prompts as Prompts
