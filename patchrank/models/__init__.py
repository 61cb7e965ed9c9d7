"""The timm plugin and the image-text pair. Whoever imports any of it has timm's entries `patchrank_*`."""

from patchrank.models import patchrank_clip as patchrank_clip
from patchrank.models import patchrank_vit as patchrank_vit
