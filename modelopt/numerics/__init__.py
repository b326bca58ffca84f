"""The number algebra: element types, formats, and the plain-torch law that every kernel must equal bit for bit."""

from modelopt.numerics.blocks import Block as Block
from modelopt.numerics.elements import Element as Element
from modelopt.numerics.elements import element as element
from modelopt.numerics.formats import NAMES as NAMES
from modelopt.numerics.formats import Format as Format
from modelopt.numerics.formats import named as named
from modelopt.numerics.formats import parse as parse
from modelopt.numerics.reference import Quantized as Quantized
from modelopt.numerics.reference import Scales as Scales
