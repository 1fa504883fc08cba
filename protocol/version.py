"""The version, once: of the package, and as peers tell it to each other."""

VERSION = "0.1.0"
#: The `software` of HELLO, WELCOME, READY and ACCEPTED.
SOFTWARE = f"tokenmq/{VERSION}"
