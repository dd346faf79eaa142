"""The version of this package, for what it writes."""

VERSION = "0.1.0"
