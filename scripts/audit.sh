#!/usr/bin/env bash
# Ask for known vulnerabilities of what is installed in .venv. It fails for one that is not in scripts/audit-ignore.txt,
# and never for a service that cannot be reached: then it says that nothing was audited.
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
if ! "$python" -c 'import pip_audit' 2>/dev/null; then
    echo "audit: skipped, pip-audit is not installed: pip install -e '.[dev]'"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Exact versions, without the builds' own labels (2.13.0+cpu), which no advisory names.
"$python" -m pip freeze --disable-pip-version-check --exclude-editable |
    sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' >"$work/installed.txt"
status=0
timeout "${AUDIT_TIMEOUT_S:-120}" "$python" -m pip_audit --requirement "$work/installed.txt" --no-deps --disable-pip \
    --format json --desc off --progress-spinner off --timeout 10 --output "$work/report.json" \
    >"$work/log.txt" 2>&1 || status=$?
"$python" scripts/audit.py "$work/report.json" scripts/audit-ignore.txt "$work/log.txt" "$status"
