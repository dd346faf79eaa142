"""All that knows transformers and PEFT. Importing it tells them of this package; `import mhc_rewrite` never does."""

from mhc_rewrite.hf.training import MHCTrainer, SitesInTrainer, tell_accelerate

tell_accelerate()

__all__ = ["MHCTrainer", "SitesInTrainer"]
