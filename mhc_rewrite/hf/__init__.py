"""All that knows transformers and PEFT. Importing it tells them of this package; `import mhc_rewrite` never does.

Converted models are saved and loaded whole, by transformers' own functions: `save_pretrained`, `from_pretrained`, the
Auto classes and what stands on them (pipelines, PEFT's Auto classes) know conversions from then on. Converting a model
of transformers imports this; loading one in another process needs `import mhc_rewrite.hf`, or `trust_remote_code=True`,
which imports it from the saved folder. So what loads Trainer waits until it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mhc_rewrite.hf import loading, saving
from mhc_rewrite.hf.backends import tell_accelerate
from mhc_rewrite.hf.loading import ConvertedConfig

if TYPE_CHECKING:
    from mhc_rewrite.hf.training import MHCTrainer, SitesInTrainer

loading.register()
saving.register()
tell_accelerate()

__all__ = ["ConvertedConfig", "MHCTrainer", "SitesInTrainer"]


def __getattr__(name: str) -> Any:
    if name in ("MHCTrainer", "SitesInTrainer"):
        return getattr(importlib.import_module("mhc_rewrite.hf.training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
