"""Models of every kind, each with its n-stream counterpart by hand. Nothing here knows the package under test."""

from __future__ import annotations

from handmade import calls, forms, habits, layers, readers, vision
from handmade.common import Kind

KINDS: tuple[Kind, ...] = (*layers.KINDS, *forms.KINDS, *vision.KINDS, *readers.KINDS, *habits.KINDS, *calls.KINDS)
BY_NAME = {kind.name: kind for kind in KINDS}
