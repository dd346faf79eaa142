"""The backend "mhc" where libraries have closed lists of torch.compile's backends."""

from __future__ import annotations

import importlib.util


def tell_accelerate() -> None:
    """Makes `torch_compile_backend="mhc"` a value that accelerate takes, where accelerate is installed."""
    if importlib.util.find_spec("accelerate") is None:
        return
    from accelerate.utils import DynamoBackend

    if "MHC" not in DynamoBackend:
        member = str.__new__(DynamoBackend, "MHC")
        member._name_, member._value_ = "MHC", "MHC"
        DynamoBackend._member_map_["MHC"] = member
        DynamoBackend._value2member_map_["MHC"] = member
