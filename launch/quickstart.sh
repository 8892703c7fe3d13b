#!/bin/bash
# Trains a small language model in a fresh clone: bash launch/quickstart.sh [section.key=value ...]
# Creates .venv, trains configs/quickstart.yaml on all GPUs or in two CPU processes, shows the loss curve and a sample.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
make_environment all

checked=$(disttrain check configs/quickstart.yaml "$@" --json) || { disttrain check configs/quickstart.yaml "$@"; exit 2; }
run=$(python -c 'import json, sys; run = json.load(sys.stdin)["config"]["run"]; print(run["dir"] + "/" + run["name"])' <<<"$checked")
bash launch/torchrun.sh configs/quickstart.yaml "$@"
disttrain report "$run"
disttrain sample "$run"
echo "loss curve: $run/loss.png"
