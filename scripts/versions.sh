#!/usr/bin/env bash
# Run what needs no torch under every other supported Python that this machine has: python3.X on the PATH, or pyenv's.
set -eu
cd "$(dirname "$0")/.."
own=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
for version in 3.10 3.11 3.12 3.13; do
    [ "$version" = "$own" ] && continue
    python=""
    for found in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        if "$found" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            python=$found
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "python$version: not on this machine, skipped"
        continue
    fi
    echo "python$version: $python"
    home=.venv/python$version
    [ -x "$home/bin/python" ] || "$python" -m venv "$home"
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
    "$home/bin/python" -m pytest --quiet -p no:cacheprovider --ignore tests/unit/transformers \
        --ignore tests/unit/embeddings tests/unit \
        tests/integration/test_client_stub.py tests/integration/test_worker_server.py tests/integration/test_commands.py
done
