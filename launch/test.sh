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
exec python -m pytest -q "$@"
