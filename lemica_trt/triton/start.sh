#!/bin/sh
# Starts tritonserver on this repository. Written by `lemica-trt triton`; "lemica-trt triton --check" compares it.
#
#   ./start.sh [FLAG…]        more flags for tritonserver; without a GPU: --model-config-name=cpu
#
#   ADDRESS                   who may connect; 127.0.0.1, this machine only, if not set
#   HTTP_PORT GRPC_PORT METRICS_PORT      8000, 8001, 8002 if not set
#   MODELS                    names of the models to load; all if not set
#   ADMIN_TOKEN               opens the APIs below; random, so that nobody has it, if not set
#
# Whoever may load models may upload a model.py, and so run any code as this user; traces and logs can hold prompts.
# These APIs therefore take the token: over HTTP in the header `admin-token`, over gRPC in `triton-grpc-protocol-admin-token`.
# Users of this machine can read it in the list of processes. There is no encryption: put a proxy in front of ADDRESS.
set -euf
repository=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
address=${ADDRESS:-127.0.0.1}
token=${ADMIN_TOKEN:-$(od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n')}
case $token in
  *[!A-Za-z0-9_-]*) echo "start.sh: ADMIN_TOKEN must be letters, digits, - and _" >&2; exit 2 ;;
esac
unset ADMIN_TOKEN # the models' processes have no use for it
closed=model-repository,shared-memory,trace,logging
for model in ${MODELS:-*}; do
  set -- "--load-model=$model" "$@"
done
exec "${TRITONSERVER:-tritonserver}" \
  --model-repository="$repository" --model-control-mode=explicit \
  --http-address="$address" --grpc-address="$address" --metrics-address="$address" \
  --http-port="${HTTP_PORT:-8000}" --grpc-port="${GRPC_PORT:-8001}" --metrics-port="${METRICS_PORT:-8002}" \
  --http-restricted-api="$closed:admin-token=$token" \
  --grpc-restricted-protocol="$closed:admin-token=$token" \
  --log-verbose=0 "$@"
