#!/bin/bash
# Runs every check that CI runs: bash launch/test.sh [pytest's arguments]
# Creates .venv if there is none. Stops at the first check that fails; pytest comes last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
make_environment dev,all

python -m mypy --strict disttrain & # on a second core
ruff format --check .
ruff check .
lint-imports
python tests/check_prose.py
wait $!
# One more pytest worker than cores, because tests often wait for processes. At most four, because each worker may start
# four processes. A later `-n 0` runs one test at a time.
workers=$(python -c 'from disttrain.runtime.environment import cpu_quota; print(min(4, cpu_quota() + 1))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the workers share the cores
exec python -m pytest -q -n "$workers" --dist worksteal "$@"
