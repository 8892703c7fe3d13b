#!/bin/bash
# Everything CI checks, in the same words: bash launch/test.sh [pytest's arguments]
# Makes .venv where there is none. The first check that fails is the last thing printed; pytest comes last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
make_environment dev,all

ruff format --check .
ruff check .
python -m mypy --strict disttrain
lint-imports
# One pytest worker more than cores, since tests wait much: for ranks to start, to meet, to be missed. Four at most, for
# each may start a world of four. A later `-n 0` is none: one test at a time.
workers=$(python -c 'from disttrain.runtime.environment import cpu_quota; print(min(4, cpu_quota() + 1))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the workers share the cores
exec python -m pytest -q -n "$workers" --dist worksteal "$@"
