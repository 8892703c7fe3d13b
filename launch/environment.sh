# Sourced by the other scripts, from the project's folder. `make_environment EXTRAS` creates and activates .venv.
# If `python3` has a usable torch (a cluster's module, an NGC image, conda, an active venv), that torch is kept.
# PYTHON=/path/to/python selects another interpreter.

make_environment() {
    local extras=$1 python=${PYTHON:-python3} version torch_folder=""
    local made=.venv/made-with-$extras pins=.venv/constraints.txt
    if [ "$made" -nt pyproject.toml ] && [ "$made" -nt constraints.txt ]; then . .venv/bin/activate; return; fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "disttrain needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; return 1; }
    if [ ! -x .venv/bin/pip ]; then
        torch_folder=$("$python" -c 'import re, pathlib, torch
assert tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 11)
print(pathlib.Path(torch.__file__).resolve().parents[1])' 2>/dev/null) || torch_folder=""
        "$python" -m venv ${torch_folder:+--system-site-packages} .venv || {
            echo "$python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; return 1; }
    fi
    . .venv/bin/activate
    if [ -n "$torch_folder" ] && ! python -c 'import torch' 2>/dev/null; then # torch is in an active venv: add its folder
        echo "$torch_folder" >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kept_torch.pth"
    fi
    cp constraints.txt "$pins"
    if version=$(python -c 'import sys, torch
print(torch.__version__) if not torch.__file__.startswith(sys.prefix) else sys.exit(1)' 2>/dev/null); then
        echo "keeping torch $version of $python"
        sed "s/^torch==.*/torch==$version/" constraints.txt >"$pins"
        printf '#!%s\nfrom torch.distributed.run import main\nmain()\n' "$PWD/.venv/bin/python" >.venv/bin/torchrun
        chmod +x .venv/bin/torchrun # its own torchrun starts a Python without disttrain
    fi
    echo "installing into .venv with extras $extras (once; takes some minutes if torch must be downloaded)"
    # --no-compile: Python compiles modules at their first import; to compile every module takes more than a minute.
    # deepspeed's build imports torch, setuptools and ninja, so it cannot run in isolation.
    pip install --no-compile --quiet --constraint "$pins" "setuptools>=77" wheel ninja torch
    pip install --no-compile --quiet --constraint "$pins" --no-build-isolation --editable ".[$extras]"
    touch "$made"
}
