#!/usr/bin/env bash
# mypy does not know the package map of setup.cfg, so it gets a tree of links that has the package's shape.
set -eu
cd "$(dirname "$0")/.."
tree=.venv/types
rm -rf "$tree" && mkdir -p "$tree/tokenmq"
for part in protocol transport broker worker client cli; do ln -s "../../../$part" "$tree/tokenmq/$part"; done
MYPYPATH=$tree .venv/bin/mypy --config-file setup.cfg -p tokenmq
