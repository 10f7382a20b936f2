#!/usr/bin/env bash
# Build the image, bring compose up, run the smoke pipeline and a promotion in the worker, push to a bucket, run the pipeline in
# a container of its own, look at the pages, and take all down. About 25 minutes and 12 GB on two cores.
#
#   docker/check.sh              # with the Docker that runs here, or one of its own where none does (as root, on Debian)
#   docker/check.sh --stand-ins  # an engine of its own that asks no registry of images: bases are made of Debian's packages
#   WORK=/big/disk docker/check.sh
#
# An engine of its own leaves the host's netfilter alone and is gone afterwards; what it downloaded and built stays in $WORK.
# The log of every step is in $WORK/log.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
WORK=${WORK:-/var/tmp/deepspec-containers}
export DOCKER_CONFIG=$WORK/config COMPOSE_PROJECT_NAME=deepspec-check
STAND_INS=no
[ "${1:-}" = --stand-ins ] && STAND_INS=yes
PREFECT_PORT=${DEEPSPEC_PREFECT_PORT:-4270} MLFLOW_PORT=${DEEPSPEC_MLFLOW_PORT:-5070} S3_PORT=${DEEPSPEC_S3_PORT:-9070}
NAME=deepspec-check # of the network and, with -runs, of the volume: a deployment beside it keeps its own
ENGINE_PID="" WHEELS_PID="" STEP_PID=""
mkdir -p "$WORK/log" "$DOCKER_CONFIG/cli-plugins"
SECONDS=0

say() { printf '%3d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
step() { # NAME COMMAND...: run it with its output in the log; say how it ended
  local name=$1 from=$SECONDS
  shift
  ("$@") >"$WORK/log/$name" 2>&1 &  # in the background: as a condition it would not end at a command that fails
  STEP_PID=$!
  if wait $STEP_PID; then
    STEP_PID=""
    say "$name: $((SECONDS - from)) s"
  else
    say "$name: FAILED; the end of $WORK/log/$name:"
    tail -n 25 "$WORK/log/$name"
    exit 1
  fi
}
compose() { docker compose -f docker/compose.yaml -f "$WORK/override.yaml" --env-file "$WORK/env" --profile s3 "$@"; }

down() {
  local status=$?
  [ -z "$STEP_PID" ] || kill "$STEP_PID" 2>/dev/null || true
  if [ -f "$WORK/override.yaml" ] && docker info >/dev/null 2>&1; then
    compose logs --no-color >"$WORK/log/services" 2>&1 || true
    compose down --volumes --timeout 20 >"$WORK/log/down" 2>&1 || true
    docker volume rm --force "$NAME-pool" >>"$WORK/log/down" 2>&1 || true
  fi
  [ -z "$WHEELS_PID" ] || kill "$WHEELS_PID" 2>/dev/null || true
  if [ -n "$ENGINE_PID" ]; then
    kill "$ENGINE_PID" 2>/dev/null || true
    wait "$ENGINE_PID" 2>/dev/null || true
  fi
  if [ $status = 0 ]; then say "all of it passed"; else say "stopped with $status; logs: $WORK/log"; fi
}
trap down EXIT

# --- an engine ---------------------------------------------------------------------------------------------------------

debian_packages() { # the engine is unpacked and not installed: installed, it would be started, with rules of its own
  local browser=chromium
  command -v chromium chromium-browser google-chrome && browser=""
  apt-get update
  apt-get install -y --no-install-recommends $browser mmdebstrap iptables iproute2 libdevmapper1.02.1 libseccomp2
  mkdir -p "$WORK/engine-debs"
  (cd "$WORK/engine-debs" && apt-get -o APT::Sandbox::User=root download docker.io containerd runc tini)
  for deb in "$WORK"/engine-debs/*.deb; do dpkg -x "$deb" "$WORK/engine-tree"; done
}

mirror() { apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | head -n 1; }

plugins() { # Compose and buildx of a newer Debian, which run here too; its lists and packages stay below $WORK
  local apt=$WORK/apt
  mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial" "$apt/debs"
  echo "deb $(mirror) trixie main" >"$apt/sources.list"
  local options=(-o "Dir::State=$apt/state" -o "Dir::Cache=$apt/cache" -o "Dir::Etc::SourceList=$apt/sources.list"
    -o Dir::Etc::SourceParts=/dev/null -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  (cd "$apt/debs" && apt-get "${options[@]}" download docker-compose docker-buildx)
  for deb in "$apt"/debs/*.deb; do dpkg -x "$deb" "$apt/tree"; done
  find "$apt/tree" -path '*cli-plugins/*' -type f -exec cp {} "$DOCKER_CONFIG/cli-plugins/" \;
  docker compose version && docker buildx version
}

start_engine() {
  local place=$WORK/engine
  mkdir -p "$place"
  dockerd -H "unix://$place/docker.sock" --data-root "$place/root" --exec-root "$place/exec" --pidfile "$place/pid" \
    --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false --storage-driver=overlay2 \
    --exec-opt native.cgroupdriver=cgroupfs >"$WORK/log/dockerd" 2>&1 &
  ENGINE_PID=$!
  export DOCKER_HOST=unix://$place/docker.sock
  for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && return
    kill -0 "$ENGINE_PID" || break
    sleep 1
  done
  say "dockerd does not answer:" && tail -n 20 "$WORK/log/dockerd"
  exit 1
}

# --- stand-ins for images that a registry has ------------------------------------------------------------------------------

debian_image() { # NAME PACKAGE...: a Debian with these packages, and python and certificates as this machine has them
  local name=$1 tree=$WORK/tree.tar
  shift
  mmdebstrap --variant=minbase --include="ca-certificates,$(IFS=, && echo "$*")" bookworm "$tree" "$(mirror)"
  docker import "$tree" "$name-tree"
  rm "$tree"
  local context=$WORK/context
  rm -rf "$context" && mkdir -p "$context/certificates"
  cp /etc/ssl/certs/ca-certificates.crt "$context/certificates/host.crt"
  printf '[global]\nno-index = true\nfind-links = http://127.0.0.1:%s/\n' "$WHEELS_PORT" >"$context/pip.conf"
  cat "$WORK/entrypoint" >"$context/entrypoint" 2>/dev/null || true
  {
    echo "FROM $name-tree"
    echo 'COPY certificates/host.crt /etc/ssl/certs/ca-certificates.crt'
    echo 'COPY pip.conf /etc/pip.conf'
    echo 'RUN [ ! -e /usr/bin/python3 ] || ln -sf python3 /usr/bin/python'
    cat
  } >"$context/Dockerfile"
  docker build --network=host --tag "$name" "$context"
}

wheels() { # everything that the image and the stand-in for the store install, from the index that pip knows here
  python3 -m venv "$WORK/pip"
  local get=("$WORK/pip/bin/pip" download --quiet --dest "$WORK/wheels" -c constraints.txt)
  "${get[@]}" --no-deps "$(grep '^torch==' constraints.txt)"
  # async-timeout: before Python 3.11.3, which Debian's is, redis wants it.
  "${get[@]}" --find-links "$WORK/wheels" "$ROOT[mlops]" boto3 dvc-s3 async-timeout 'setuptools>=68' wheel
  "$WORK/pip/bin/pip" download --quiet --dest "$WORK/wheels" --find-links "$WORK/wheels" 'moto[server]'
  rm -f "$WORK"/wheels/deepspec-*
}

postgres_image() {
  cat >"$WORK/entrypoint" <<'SH'
#!/bin/sh
set -e
bin=$(echo /usr/lib/postgresql/*/bin)
data=/var/lib/postgresql/data
mkdir -p $data && chown postgres $data
as() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
if [ ! -s $data/PG_VERSION ]; then
  printf %s "$POSTGRES_PASSWORD" >/tmp/secret && chown postgres /tmp/secret
  as "$bin/initdb" -D $data -U "$POSTGRES_USER" --auth scram-sha-256 --pwfile /tmp/secret -E UTF8
  echo 'host all all all scram-sha-256' >>$data/pg_hba.conf
  as "$bin/pg_ctl" -D $data -w -o '-c listen_addresses= -c unix_socket_directories=/tmp' start
  export PGPASSWORD="$POSTGRES_PASSWORD"
  ask() { "$bin/psql" -h /tmp -U "$POSTGRES_USER" "$@"; }
  ask -d postgres -c "CREATE DATABASE \"$POSTGRES_DB\""
  for file in /docker-entrypoint-initdb.d/*.sql; do ask -d "$POSTGRES_DB" -f "$file"; done
  as "$bin/pg_ctl" -D $data -w stop
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups \
  "$bin/postgres" -D $data -c 'listen_addresses=*' -c unix_socket_directories=/tmp
SH
  debian_image "$1" postgresql util-linux <<'END'
COPY entrypoint /entrypoint
RUN ln -s /usr/lib/postgresql/*/bin/pg_isready /usr/local/bin/pg_isready; chmod 755 /entrypoint
ENTRYPOINT ["/entrypoint"]
END
}

store_image() { # moto under MinIO's names: `minio server`, `mc ready`, `mc alias set`, `mc mb`
  debian_image "$1" python3 python3-venv <<'END'
RUN python -m venv /venv && /venv/bin/pip install 'moto[server]' \
    && printf '#!/bin/sh\nexec /venv/bin/moto_server -H 0.0.0.0 -p 9000\n' >/usr/bin/minio \
    && printf '%s\n' '#!/venv/bin/python' 'import os, sys, urllib.request, boto3' \
       'if sys.argv[1] == "ready": urllib.request.urlopen("http://127.0.0.1:9000/moto-api/")' \
       'if sys.argv[1] == "mb":' \
       '    keys = dict(aws_access_key_id=os.environ["S3_USER"], aws_secret_access_key=os.environ["S3_PASSWORD"])' \
       '    there = dict(endpoint_url="http://s3:9000", region_name="us-east-1")' \
       '    boto3.client("s3", **there, **keys).create_bucket(Bucket="deepspec")' \
       >/usr/bin/mc && chmod 755 /usr/bin/minio /usr/bin/mc
END
}

image_of() { sed -n "s/^ *image: \($1[^ ]*\)$/\1/p" docker/compose.yaml | head -n 1; }

# --- what is checked -------------------------------------------------------------------------------------------------------

smoke_checkout() { # a clone whose branch `smoke` has the smoke profile, a tiny target and the bucket as its remote
  rm -rf "$WORK/checkout" "$WORK/cache"
  git clone --quiet --no-hardlinks "$ROOT" "$WORK/checkout"
  compose run --rm --no-deps --user "$(id -u):$(id -g)" --env PYTHONPATH=/app:/repository --volume "$ROOT:/source:ro" \
    --workdir /source worker python -m tests.tiny /repository/data/smoke-target
  cd "$WORK/checkout" # of this step alone
  git checkout --quiet -B smoke
  sed 's/^pipeline:.*/pipeline: [lookup, dspark]/' params.smoke.yaml >params.yaml
  sed -i 's/remote = local/remote = team/' .dvc/config
  printf "%s\n" "['remote \"team\"']" '    url = s3://deepspec/dvc' '    endpointurl = http://s3:9000' >>.dvc/config
  git add --force .dvc/config params.yaml data/smoke-target
  git -c user.name=check -c user.email=check@localhost commit --quiet --message "The smoke profile"
}

all_up() { # `--wait` for all would take the end of the service that makes the bucket for a failure
  compose up --detach
  compose up --detach --wait postgres prefect mlflow s3 worker
  [ "$(docker wait "$(compose ps --all --quiet s3-bucket)")" = 0 ]
}

in_worker() { compose exec -T worker "$@"; }

pipeline_run() { in_worker prefect deployment run pipeline/nightly --param ref=smoke --watch; }

branch_of_run() { git -C "$WORK/checkout" for-each-ref --format='%(refname:short)' 'refs/heads/runs/*' | head -n 1; }

promotion() {
  in_worker prefect deployment run promote/on-demand --param "ref=$(branch_of_run)" --param drafter=dspark --watch
}

bucket() { # data of the run to the store and back, in a clone without a cache
  in_worker sh -ec "
    rm -rf /tmp/there /tmp/back && git clone --quiet --branch $(branch_of_run) /repository /tmp/there && cd /tmp/there
    dvc cache dir --local /repository/.dvc/cache
    dvc push data/drafts/dspark
    git clone --quiet --branch $(branch_of_run) /repository /tmp/back && cd /tmp/back
    dvc pull data/drafts/dspark && test -s data/drafts/dspark/model.safetensors"
}

pool() { # the pipeline in a container of its own, whose repository is a URL and whose data go to the bucket
  # At this step's end; a worker that is asked to stop may wait for a server that is gone by then.
  trap 'kill $(jobs -p) 2>/dev/null || true; sleep 5; kill -9 $(jobs -p) 2>/dev/null || true' EXIT
  local gateway url keys bare=$WORK/origin.git prefect=$WORK/pool/bin/prefect
  rm -rf "$bare" && git clone --quiet --bare "$WORK/checkout" "$bare"
  git -C "$bare" for-each-ref --format='delete %(refname)' 'refs/heads/runs/*' | git -C "$bare" update-ref --stdin
  gateway=$(docker network inspect "$NAME" --format '{{(index .IPAM.Config 0).Gateway}}')
  url=git://$gateway/origin.git
  git daemon --reuseaddr --listen="$gateway" --base-path="$WORK" --export-all --enable=receive-pack "$bare" &
  python3 -m venv "$WORK/pool"
  "$WORK/pool/bin/pip" install --quiet -c constraints.txt prefect-docker
  in_worker prefect work-pool create docker --type docker --overwrite
  compose exec -T --env DEEPSPEC_ROOT=/app --env DEEPSPEC_REPOSITORY="$url" worker \
    prefect --no-prompt deploy --prefect-file prefect.yaml --name pipeline/nightly-docker
  export PREFECT_API_URL=http://localhost:$PREFECT_PORT/api PREFECT_HOME=$WORK/pool/home
  "$prefect" worker start --pool docker >"$WORK/log/pool-worker" 2>&1 &
  keys='{"DEEPSPEC_RUNS": "/runs", "PREFECT_API_URL": "http://prefect:4200/api", "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "AWS_ACCESS_KEY_ID": "check", "AWS_SECRET_ACCESS_KEY": "check-check"}'
  "$prefect" deployment run pipeline/nightly-docker --param ref=smoke --param 'overrides={"pipeline": ["lookup"]}' \
    --job-variable "networks=[\"$NAME\"]" --job-variable "volumes=[\"$NAME-pool:/runs\"]" \
    --job-variable auto_remove=true --job-variable "env=$keys" --watch
  [ "$(git -C "$bare" for-each-ref 'refs/heads/runs/*' | wc -l)" = 1 ] || { echo "no branch was pushed"; return 1; }
}

pages() { # the first pages, and a champion under the address that links have
  local python=$ROOT/.venv/bin/python
  [ -x "$python" ] || python=python3 # the one of an activated environment
  "$python" - "http://localhost:$PREFECT_PORT" "http://localhost:$MLFLOW_PORT" <<'PY'
import sys, urllib.error, urllib.request

prefect, mlflow = sys.argv[1:]
for url in (f"{prefect}/", f"{prefect}/api/ready", f"{mlflow}/", f"{mlflow}/health"):
    with urllib.request.urlopen(url, timeout=20) as reply:
        assert reply.status == 200, url
        print(url, reply.status)
request = urllib.request.Request(f"{mlflow}/", headers={"Host": "elsewhere.example"})
try:
    urllib.request.urlopen(request, timeout=20)
    raise SystemExit("MLflow answers to any name")
except urllib.error.HTTPError as refused:
    assert refused.code == 403, refused
try:
    from playwright.sync_api import sync_playwright
    from shutil import which
    chromium = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))))
except (ImportError, StopIteration):
    raise SystemExit(print("no browser here: only status codes were looked at"))
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for url, text in ((f"{prefect}/runs", "smoke-target"), (f"{mlflow}/#/models", "deepspec-smoke-target-dspark")):
        page = browser.new_page()
        page.goto(url)
        page.get_by_text(text).first.wait_for(timeout=60_000)
        print(url, "shows", text)
PY
}

memory() { docker stats --no-stream --format '{{.Name}} {{.MemUsage}}'; }

free() { # is there room?
  local gigabytes
  gigabytes=$(df --output=avail -BG "$WORK" | tail -n 1 | tr -dc 0-9)
  [ "$gigabytes" -ge 12 ] || { echo "$gigabytes GB are free on the disk of $WORK, 12 are wanted"; return 1; }
}

step room free
if [ $STAND_INS = no ] && docker info >/dev/null 2>&1; then
  unset DOCKER_CONFIG
else
  STAND_INS=yes
  step packages debian_packages
  export PATH=$WORK/engine-tree/usr/bin:$WORK/engine-tree/usr/sbin:$PATH
  docker compose version >/dev/null 2>&1 || step plugins plugins
  start_engine
fi
{
  echo "POSTGRES_PASSWORD=$(head -c 12 /dev/urandom | od -An -tx1 | tr -d ' \n')"
  printf 'DEEPSPEC_UID=%s\nDEEPSPEC_GID=%s\n' "$(id -u)" "$(id -g)"
  printf 'DEEPSPEC_CHECKOUT=%s\nDEEPSPEC_PREFECT_PORT=%s\nDEEPSPEC_MLFLOW_PORT=%s\nDEEPSPEC_S3_PORT=%s\n' \
    "$WORK/checkout" "$PREFECT_PORT" "$MLFLOW_PORT" "$S3_PORT"
  printf 'DEEPSPEC_PACKAGES=boto3 dvc-s3\nS3_USER=check\nS3_PASSWORD=check-check\nMLFLOW_S3_ENDPOINT_URL=http://s3:9000\n'
  echo 'MLFLOW_ARTIFACTS=s3://deepspec/mlflow'
} >"$WORK/env"
{
  printf 'networks: {deepspec: {name: %s}}\nvolumes: {runs: {name: %s}}\n' "$NAME" "$NAME-runs"
  printf 'services:\n  worker: {environment: {OMP_NUM_THREADS: "%s"}}\n' "${OMP_NUM_THREADS:-$(nproc)}"
  [ $STAND_INS = no ] || echo '  prefect: {build: {network: host}}' # an engine without netfilter has no other
} >"$WORK/override.yaml"
mkdir -p "$WORK/checkout"
if [ $STAND_INS = yes ]; then
  step wheels wheels
  WHEELS_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  python3 -m http.server --bind 127.0.0.1 --directory "$WORK/wheels" "$WHEELS_PORT" >"$WORK/log/wheels-server" 2>&1 &
  WHEELS_PID=$!
  python_image() { debian_image "$1" python3 python3-venv python3-pip </dev/null; }
  step base-python python_image "$(sed -n 's/^ARG PYTHON_IMAGE=//p' docker/Dockerfile)"
  step base-postgres postgres_image "$(image_of postgres)"
  step base-store store_image "$(image_of minio)"
fi
step image compose build prefect
step checkout smoke_checkout
step up all_up
step pipeline pipeline_run
[ -n "$(branch_of_run)" ] || { say "no branch was pushed"; exit 1; }
step promotion promotion
step bucket bucket
step pool pool
step pages pages
grep -h "no browser" "$WORK/log/pages" || true
step memory memory
cat "$WORK/log/memory"
