#!/bin/bash
# Builds the documentation site in build/docs: bash launch/docs.sh [sphinx-build's options]
# Any warning fails the build, and so does a dead internal link. BUILD=/some/folder chooses another folder.
# Uses the active environment if it has sphinx-build, else .venv, which is created and completed as needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v sphinx-build >/dev/null; then
    . launch/environment.sh
    make_environment docs
fi
sphinx-build -W -n --keep-going -q -c docs . "${BUILD:=build/docs}" "$@"
echo "built $BUILD/index.html"
