"""The embedded digits: handwritten digits over photographs or on ruled paper, drawn on the fly; no file is needed."""

from patchrank.data.digits.scenes import CLASSES as CLASSES
from patchrank.data.digits.scenes import CREDIT as CREDIT
from patchrank.data.digits.scenes import STYLES as STYLES
from patchrank.data.digits.scenes import TEMPLATES as TEMPLATES
from patchrank.data.digits.scenes import UNSEEN_TEMPLATE as UNSEEN_TEMPLATE
from patchrank.data.digits.scenes import VERSION as VERSION
from patchrank.data.digits.scenes import DigitScenes as DigitScenes
