#!/usr/bin/env bash
# Run tests with the lowest versions that pyproject.toml allows: of the runtime on the oldest Python, of everything that
# builds on Python 3.11. PyTorch is the one of the Makefile (TORCH): its own floor has not been tried.
#
#   tools/test_lowest.sh [runtime|build]      both if neither is given
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-.cache}
export OMP_NUM_THREADS=1
export PYTHONPATH=$PWD
. tools/python_at.sh

environment() { # NAME PYTHON EXTRA…: a virtual environment with the lowest versions, made again where they changed
  local venv=$cache/lowest-$1 python=$2
  shift 2
  if [ ! -e "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ] || [ tools/test_lowest.sh -nt "$venv/.installed" ]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.8 pytest hypothesis
    if [[ " $* " == *" build "* ]]; then
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}"
      "$venv/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$venv/constraints.txt"
    else
      : >"$venv/constraints.txt"
    fi
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --resolution lowest-direct \
      --constraint "$venv/constraints.txt" -r pyproject.toml "${@/#/--extra=}"
    touch "$venv/.installed"
  fi
  "$venv/bin/python" -m pip --disable-pip-version-check list --format freeze
}

tests() { # NAME ARGUMENT…: warnings of old libraries about newer ones are no errors
  local venv=$cache/lowest-$1
  shift
  "$venv/bin/python" -m pytest -q -p no:cacheprovider -o filterwarnings=default "$@"
}

case "${1:-both}" in
  runtime | build | both) ;;
  *) echo "expected runtime, build or nothing, got $1" >&2; exit 2 ;;
esac
if [ "${1:-runtime}" = runtime ]; then
  environment runtime "$(python_at 3.10)" onnxruntime video sign
  tests runtime -m 'null and not benchmark and not fuzz and not load and not long'
fi
if [ "${1:-build}" = build ]; then
  environment build "$(python_at 3.11)" build client openvino sign
  # Folders that have a conftest.py of their own by themselves: tests import from it by that name.
  tests build tests/export
  tests build tests/models/test_load.py tests/models/test_model.py tests/models/test_parts.py tests/models/test_split.py
  tests build tests/tritonserver/test_check.py
  tests build tests/backends/test_base.py tests/backends/test_onnxruntime.py tests/backends/test_openvino.py \
    tests/runtime tests/test_bundle.py tests/test_cli.py tests/test_lower.py
fi
