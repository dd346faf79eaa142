"""What `config.json` of a converted model has in it that the original's has not.

`mhc_config` says how the model was converted. A stock transformers must not load such a folder as the original and drop
the sites: in `id2label`, whose keys every configuration class makes ints of, one is a sentence, so that each of them
stops and says it. `auto_map` names a file in the folder that imports this package, for `trust_remote_code=True`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhc_rewrite.errors import SitesError
from mhc_rewrite.lifecycle.saved_plan import SavedPlan

KEY = "mhc_config"
STOP = "This model was converted by mhc_rewrite; `import mhc_rewrite.hf` before loading it, or trust_remote_code=True"
MODULE = "mhc_rewrite_config"
_REPLACED = "replaced"
_OURS: dict[str, Any] = {"id2label": {STOP: ""}, "auto_map": {"AutoConfig": f"{MODULE}.ConvertedConfig"}}
_SOURCE = '''"""Written by mhc_rewrite: this model's residual streams are hyper-connections, which it adds."""

from mhc_rewrite.hf import ConvertedConfig

__all__ = ["ConvertedConfig"]
'''


def mark(folder: Path, saved: SavedPlan) -> None:
    """Adds the conversion to the `config.json` that transformers has written to a folder."""
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    replaced = {key: data[key] for key in _OURS if key in data}
    data.update(_OURS, **{KEY: {**saved.to_dict(), _REPLACED: replaced}})
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / f"{MODULE}.py").write_text(_SOURCE, encoding="utf-8")


def unmark(data: dict[str, Any]) -> dict[str, Any]:
    """The original's entries of a converted model's `config.json`, and `mhc_config`."""
    others = {key: value for key, value in data.items() if key not in _OURS}
    return {**others, **data[KEY].get(_REPLACED, {})}


def conversion_in(data: Any) -> SavedPlan:
    """The conversion that `mhc_config` holds.

    Raises:
        SitesError: it can't be read.
    """
    if not isinstance(data, dict):
        raise SitesError(f"{KEY!r} of this configuration is no saved conversion but a {type(data).__name__}.")
    return SavedPlan.from_dict({key: value for key, value in data.items() if key != _REPLACED})
