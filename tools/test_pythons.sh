#!/usr/bin/env bash
# Run the `null` tests (pure values, host loop; no torch) on other Pythons: those of Triton's containers, or PYTHONS.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-.cache}
versions=${PYTHONS:-3.10 3.12}
tested=""
. tools/python_at.sh

for version in $versions; do
  if ! python=$(python_at "$version" 2>/dev/null); then
    echo "Python $version: not on this machine, null tests not run on it"
    continue
  fi
  venv=$cache/venv-$version
  # 3.10 stands for the oldest Triton containers, whose Python backend wants numpy 1
  numpy=$([ "$version" = 3.10 ] && echo 'numpy<2' || echo numpy)
  if [ ! -e "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ]; then
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable . "$numpy" onnxruntime pytest pytest-xdist hypothesis
    touch "$venv/.installed"
  fi
  echo "Python $version, numpy $("$venv/bin/python" -c 'import numpy; print(numpy.__version__)'):"
  "$venv/bin/python" -m pytest -q --numprocesses "${JOBS:-2}" -m 'null and not benchmark and not fuzz and not load and not long' -p no:cacheprovider
  tested="$tested $version"
done
echo "null tests ran on Python:${tested:- none of $versions}"
