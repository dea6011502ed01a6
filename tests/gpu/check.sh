#!/bin/bash
# Is what grpo-ext computes on this GPU right? About 8 minutes; `--tiny` tries out the checks themselves on a CPU.
#   bash tests/gpu/check.sh [--tiny] [--only scores,sampling] [--out FILE]
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
. tests/gpu/setup.sh || exit 1
exec "$PYTHON" tests/gpu/check.py "$@"
