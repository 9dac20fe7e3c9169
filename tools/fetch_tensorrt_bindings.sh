#!/usr/bin/env bash
# Put the Python bindings of TensorRT 10 and 11, and of their lean runtimes, into a cache folder, for the test that all
# names we use are there.
#
#   tools/fetch_tensorrt_bindings.sh [FOLDER]      FOLDER is .cache/tensorrt if not given; a second run does nothing
#   FOLDER/10, FOLDER/11                           each: tensorrt_bindings, tensorrt_lean_bindings, and lib/ with what
#                                                  they are linked against
#
# 2.1 MB each. The libraries themselves take gigabytes and a driver: in their place come libraries whose functions do
# nothing, which is enough to import the bindings and look at their classes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${1:-$root/.cache/tensorrt}
python=${PYTHON:-python3}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

exec 9>"$cache/.lock"
flock 9
made_from="$("$python" -c 'import sys; print(sys.version_info[:2])') $(sha256sum <"$root/tools/fetch_tensorrt_bindings.sh")"
if [ "$(cat "$cache/.complete" 2>/dev/null)" = "$made_from" ]; then
  exit 0
fi
for version in cu12-bindings==10.16.1.11 cu13-bindings==11.4.0.106; do
  major=${version#*==}
  major=${major%%.*}
  rm -rf "${cache:?}/$major"
  "$python" -m pip --quiet --disable-pip-version-check install --no-deps --target "$cache/$major" \
    "tensorrt-$version" "tensorrt-lean-$version"
  mkdir "$cache/$major/lib"
  for library in nvinfer:createInferBuilder_INTERNAL,createInferRefitter_INTERNAL,createInferRuntime_INTERNAL,getBuilderPluginRegistry,getPluginRegistry \
    nvinfer_lean:createInferRefitter_INTERNAL,createInferRuntime_INTERNAL,getPluginRegistry \
    nvinfer_plugin:initLibNvInferPlugins \
    nvonnxparser:createNvOnnxParser_INTERNAL,createNvOnnxParserRefitter_INTERNAL,getNvOnnxParserVersion; do
    name=lib${library%%:*}.so.$major
    for function in $(tr , ' ' <<<"${library#*:}"); do
      echo "void *$function(void) { return 0; }"
    done | "${CC:-cc}" -shared -fPIC -x c -Wl,-soname,"$name" -o "$cache/$major/lib/$name" -
  done
done
echo "$made_from" >"$cache/.complete"
