"""The timm plugin and the image-text pair. Whoever imports any of it has timm's entries `patchrank_clip_*`."""

from patchrank.models import patchrank_clip as patchrank_clip
