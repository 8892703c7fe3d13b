#!/bin/bash
# From a fresh clone to a language model that writes: bash launch/quickstart.sh [section.key=value ...]
# Makes .venv, trains configs/quickstart.yaml on all GPUs or on two CPU processes, shows the curve and a sample.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
make_environment all

bash launch/torchrun.sh configs/quickstart.yaml "$@"
disttrain report runs/quickstart
disttrain sample runs/quickstart
