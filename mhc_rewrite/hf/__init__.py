"""Converted models of transformers are saved and loaded whole, by transformers' own functions.

Importing this imports transformers and makes `save_pretrained`, `from_pretrained`, the Auto classes and what stands on
them (pipelines, PEFT's Auto classes) know conversions. Converting a model of transformers imports it; loading one in
another process needs `import mhc_rewrite.hf`, or `trust_remote_code=True`, which imports it from the saved folder.
"""

from mhc_rewrite.hf import loading, saving
from mhc_rewrite.hf.loading import ConvertedConfig

loading.register()
saving.register()

__all__ = ["ConvertedConfig"]
