#!/bin/sh
# Make $VENV with the pinned stack: torch (CPU build where there is one), mmcv with its compiled ops, mmdet, this package.
# Every step is skipped where its result is there already.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
PY=$VENV/bin/python

say() { printf '== %s\n' "$*"; }
has() { "$PY" -c "$1" >/dev/null 2>&1; }

[ -x "$PY" ] || { say "virtual environment $VENV"; "$PYTHON" -m venv "$VENV"; }
PIP="$PY -m pip install --quiet --disable-pip-version-check"

has 'import torch; assert torch.__version__.startswith("2.13.0")' || { say "torch"; $PIP torch==2.13.0; }
has 'import numpy' || $PIP "$(grep '^numpy==' requirements.txt)"
# after torch, which takes the newest setuptools; mmcv's setup imports pkg_resources, which that no longer has
has 'import pkg_resources, wheel, ninja' || { say "build tools"; $PIP 'setuptools<81' wheel ninja; }
if ! has 'import mmcv.ops; assert mmcv.__version__ == "2.1.0"'; then
    say "mmcv 2.1.0 with compiled ops (about 10 minutes on 2 cores the first time)"
    MMCV_WITH_OPS=1 $PIP --no-build-isolation mmcv==2.1.0
    # a wheel that pip kept from a build against another torch does not load: build it again
    has 'import mmcv.ops' || MMCV_WITH_OPS=1 $PIP --no-build-isolation --no-cache-dir --force-reinstall --no-deps mmcv==2.1.0
fi
say "mmdet and the rest"
$PIP -r requirements.txt
$PIP --no-build-isolation --no-deps -e .
"$PY" -W ignore -c 'import apq_mmdet, mmcv.ops, pkg_resources, timm; print("== apq_mmdet", apq_mmdet.__version__, "is ready")'
