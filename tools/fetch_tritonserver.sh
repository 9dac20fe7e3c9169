#!/usr/bin/env bash
# Put a real Triton Inference Server into a cache folder, for trying out and for the tests: CPU, Linux x86_64, no Docker.
#
#   tools/fetch_tritonserver.sh [FOLDER]      FOLDER is .cache/triton if not given; a second run does nothing
#   FOLDER/tritonserver --model-repository=REPO ...
#
# The server (2.51.0, as in the container 24.10) comes from the wheel nvidia-pytriton, with its python backend.
# FOLDER/modelenv is the interpreter of the emitted models: this checkout's lemica_trt without PyTorch,
# and what every emitted repository pins with hashes; numpy 1 among it, because this server's python backend reads wrong
# numbers out of numpy 2 arrays.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${1:-$root/.cache/triton}
wheel=nvidia-pytriton==0.7.0
if [[ $cache =~ [[:space:]] ]]; then # Triton's Python backend starts its stub by an unquoted shell line
  echo "fetch_tritonserver: expected a folder without white space, got '$cache' → name one: $0 /tmp/triton" >&2
  exit 2
fi
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

python_with_library() { # an interpreter of version 3.10 … 3.12 whose libpython the stub can load
  local candidate
  for candidate in "${PYTHON:-python3.11}" python3.11 python3.12 python3.10 "$HOME"/.pyenv/versions/3.1[0-2]*/bin/python; do
    if "$candidate" - 2>/dev/null <<'PYTHON'; then
import pathlib, sys, sysconfig
name = sysconfig.get_config_var("INSTSONAME") or ""
folders = [sysconfig.get_config_var("LIBDIR"), f"{sysconfig.get_config_var('LIBDIR')}/{sysconfig.get_config_var('MULTIARCH')}"]
found = name.startswith("libpython3.") and ".so" in name and any((pathlib.Path(f) / name).exists() for f in folders)
sys.exit(0 if found and (3, 10) <= sys.version_info[:2] <= (3, 12) else 1)
PYTHON
      command -v "$candidate"
      return
    fi
  done
  echo "fetch_tritonserver: expected Python 3.10, 3.11 or 3.12 with a shared libpython, found none → install libpython3.11, or set PYTHON" >&2
  return 1
}

exec 9>"$cache/.lock"
flock 9
# What is there holds for this script, these dependencies and this checkout's place.
made_from="$root $(cat "$root/tools/fetch_tritonserver.sh" "$root/lemica_trt/triton/requirements.txt" | sha256sum)"
if [ "$(cat "$cache/.complete" 2>/dev/null)" = "$made_from" ]; then
  exit 0
fi
python=$(python_with_library)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
libraries=$("$python" -c 'import sysconfig as s; print(s.get_config_var("LIBDIR"))')
rm -rf "$cache/pkg" "$cache/modelenv" "$cache/numpy2"
"$python" -m venv "$cache/modelenv"
pip=("$cache/modelenv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install --no-deps --target "$cache/pkg" "$wheel"
server=$cache/pkg/pytriton/tritonserver
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
# The dependencies, not a copy of the package: the checkout itself is on the path.
"${pip[@]}" install --require-hashes --requirement "$root/lemica_trt/triton/requirements.txt"
echo "$root" >"$cache/modelenv/lib/python$version/site-packages/lemica_trt.pth"
# The same interpreter with numpy 2, for the test that models refuse it.
"$python" -m venv --without-pip "$cache/numpy2"
packages=lib/python$version/site-packages
"${pip[@]}" install --no-deps --target "$cache/numpy2/$packages" "numpy>=2"
echo "$cache/modelenv/$packages" >"$cache/numpy2/$packages/modelenv.pth"
echo "$root" >"$cache/numpy2/$packages/lemica_trt.pth"
cat >"$cache/tritonserver" <<LAUNCHER
#!/usr/bin/env bash
# Written by tools/fetch_tritonserver.sh: tritonserver with its backends and the models' interpreter.
export PATH="\${MODELENV:-$cache/modelenv}/bin:\$PATH" LD_LIBRARY_PATH="$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export TRITON_SERVER_VERSION=2.51.0 OMP_NUM_THREADS="\${OMP_NUM_THREADS:-1}"
exec "$server/bin/tritonserver" --backend-directory="$server/backends" "\$@"
LAUNCHER
chmod +x "$cache/tritonserver"
echo "$made_from" >"$cache/.complete"
