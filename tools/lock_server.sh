#!/usr/bin/env bash
# Pin what runs in a server, with hashes: lemica_trt/triton/requirements.txt, and sbom.cdx.json of it (CycloneDX); and
# what makes the package there, docker/build-requirements.txt.
#
#   tools/lock_server.sh      asks the package index for the newest versions that constraints.txt allows
#
# For every Python that lemica-trt runs on. numpy 1 where it still has wheels: the server of 24.10 reads wrong
# numbers out of numpy 2 arrays. TensorRT is not among them: it has to be at the version that built the engines.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${CACHE:-.cache}/lock
if [ ! -e "$cache/.installed" ] || [ tools/lock_server.sh -nt "$cache/.installed" ]; then
  "${PYTHON:-python3}" -m venv "$cache"
  "$cache/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.8 cyclonedx-bom==7.5.0
  touch "$cache/.installed"
fi
inputs=$(mktemp -d)
trap 'rm -rf "$inputs"' EXIT
echo 'numpy<2; python_version < "3.13"' >"$inputs/server.in"
grep -v '^numpy==' constraints.txt >"$inputs/constraints.txt"
target=lemica_trt/triton
cat >"$inputs/requirements.txt" <<'HEAD'
# What the interpreter of Triton's python backend needs beside lemica-trt itself and TensorRT: made by tools/lock_server.sh.
#
#   pip install --require-hashes -r requirements.txt
#   pip install --no-deps lemica-trt
HEAD
"$cache/bin/uv" pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-annotate \
  --constraint "$inputs/constraints.txt" \
  --extra onnxruntime --extra openvino --extra video --extra sign pyproject.toml "$inputs/server.in" >>"$inputs/requirements.txt"
cat >"$inputs/build-requirements.txt" <<'HEAD'
# What makes the package of lemica-trt, `build-system.requires` of pyproject.toml: made by tools/lock_server.sh.
HEAD
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml >"$inputs/build.in"
"$cache/bin/uv" pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-annotate \
  "$inputs/build.in" >>"$inputs/build-requirements.txt"
"$cache/bin/cyclonedx-py" requirements "$inputs/requirements.txt" --output-reproducible --output-format JSON \
  --output-file "$inputs/sbom.cdx.json" 2>"$inputs/log" || { cat "$inputs/log" >&2; exit 1; }
# Without addresses of an index and without the hashes again, which lie beside it.
"$cache/bin/python" - "$inputs/sbom.cdx.json" <<'PYTHON'
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
bom = json.loads(file.read_text())
del bom["metadata"]
for component in bom["components"]:
    component.pop("description"), component.pop("externalReferences")
file.write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n")
PYTHON
mv "$inputs/requirements.txt" "$inputs/sbom.cdx.json" "$target/"
mv "$inputs/build-requirements.txt" docker/
