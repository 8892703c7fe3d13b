#!/bin/bash
# Builds the documentation site in build/docs: bash launch/docs.sh [sphinx-build's options]
# Creates .venv if there is none. Any warning, a dead internal link included, fails the build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
make_environment docs

sphinx-build -W -n --keep-going -q -c docs . build/docs "$@"
echo "open build/docs/index.html"
