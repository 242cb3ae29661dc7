#!/usr/bin/env bash
# Holdfast on this machine, from an image to a pod that outlives the daemon, with everything in
# directories of its own. `make quickstart` builds and calls this; `make quickstart-clean` calls
# `quickstart.sh clean`, which takes away every trace.
#
# HOLDFAST_BUILD is cargo's target directory.
set -euo pipefail

NAME=holdfast-quickstart
ROOT=/var/lib/$NAME
STATE=/run/$NAME
BRIDGE=hfquick0
SUBNET=10.219.77.0/24
SOCKET=$STATE/holdfast.sock
LINES=200
case $(uname -m) in
  x86_64) architecture=amd64 ;;
  aarch64) architecture=arm64 ;;
  *) architecture=$(uname -m) ;;
esac

build=${HOLDFAST_BUILD:-target}
daemon=$build/release/holdfastd
cli=$build/release/holdfast
shim=$(echo "$build"/*/shim/containerd-shim-holdfast-v2)

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi
step=0
say() { step=$((step + 1)); printf '\n%s%d. %s%s\n' "$bold" $step "$*" "$plain"; }
note() { printf '   %s\n' "$*"; }
die() { printf '\n%s: %s\n' "$NAME" "$*" >&2; exit 1; }
# Shows a command as it would be typed, and what it prints.
show() {
  local words='' word
  for word in "$@"; do
    case $word in *[!a-zA-Z0-9_./:@=-]*) words+=" '$word'" ;; *) words+=" $word" ;; esac
  done
  printf '   %s$ holdfast%s%s\n' "$dim" "$words" "$plain"
  holdfast "$@" 2>&1 | sed 's/^/   /'
}
holdfast() { HOLDFAST_ADDRESS=$SOCKET "$cli" "$@"; }

# The process of a pid file, if it is still the program that was started.
pid_of() {
  local pid
  pid=$(cat "$STATE/$1.pid" 2>/dev/null) || return 1
  { tr '\0' ' ' < "/proc/$pid/cmdline"; } 2>/dev/null | grep -qF "$ROOT" || return 1
  echo "$pid"
}
wait_until() {
  local what=$1 tries=0
  shift
  until "$@" >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || die "waited 30 s for $what; the daemon's log is $ROOT/holdfastd.log"
    sleep 0.1
  done
}
start_daemon() {
  # Not a child of this terminal: it stays when the quickstart has ended.
  setsid "$daemon" --config "$ROOT/config.toml" >> "$ROOT/holdfastd.log" 2>&1 < /dev/null &
  echo $! > "$STATE/holdfastd.pid"
  disown
  wait_until "the daemon" holdfast version
}
end_process() {
  local pid signal=$2
  pid=$(pid_of "$1") || return 0
  kill "-$signal" "$pid" 2>/dev/null || true
  for _ in $(seq 100); do
    [ -d "/proc/$pid" ] && ! grep -q '^State:.*Z' "/proc/$pid/status" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}
# A docker-archive at $1 of an image called $2.
make_image() {
  local files=$ROOT/image
  local busybox=$files/rootfs/bin/busybox
  mkdir -p "$files/rootfs"/{bin,dev,etc,proc,root,sys,tmp}
  cp "$(command -v busybox)" "$busybox"
  "$busybox" --list | grep -vx busybox | xargs -I{} ln -s busybox "$files/rootfs/bin/{}"
  echo 'root:x:0:0:root:/root:/bin/sh' > "$files/rootfs/etc/passwd"
  echo 'root:x:0:' > "$files/rootfs/etc/group"
  tar -C "$files/rootfs" --numeric-owner -cf "$files/layer.tar" .
  cat > "$files/config.json" <<JSON
{
  "os": "linux", "architecture": "$architecture",
  "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"] },
  "rootfs": { "type": "layers", "diff_ids": ["sha256:$(sha256sum < "$files/layer.tar" | cut -d ' ' -f 1)"] }
}
JSON
  echo "[{ \"Config\": \"config.json\", \"RepoTags\": [\"$2\"], \"Layers\": [\"layer.tar\"] }]" > "$files/manifest.json"
  tar -C "$files" -cf "$1" manifest.json config.json layer.tar
  rm -r "$files"
}

clean() {
  if [ ! -e "$ROOT" ] && [ ! -e "$STATE" ] && [ ! -e "/sys/class/net/$BRIDGE" ]; then
    return 0
  fi
  # Pods first, through the daemon, so that the network gives everything back.
  if [ -x "$daemon" ] && [ -e "$ROOT/config.toml" ]; then
    pid_of holdfastd >/dev/null || start_daemon || true
    local pods
    pods=$(holdfast pods -q 2>/dev/null || true)
    # shellcheck disable=SC2086
    [ -z "$pods" ] || holdfast rm -f $pods >/dev/null || true
  fi
  end_process holdfastd TERM
  end_process registry TERM
  # What is left where no daemon could be started: processes of these directories and of the pods
  # that have a bundle there, their mounts, cgroups, and the bridge.
  local dir pid mount group
  for dir in /proc/[0-9]*; do
    pid=${dir#/proc/}
    if [ "$pid" != $$ ] && [ "$pid" != "$PPID" ] \
      && { tr '\0' ' ' < "$dir/cmdline"; } 2>/dev/null | grep -qE "($ROOT|$STATE)/"; then
      kill -KILL "$pid" 2>/dev/null || true
    fi
  done
  for mount in $(awk '$0 ~ / - cgroup2? / { print $5 }' /proc/self/mountinfo); do
    for dir in "$STATE"/bundles/*; do
      group=$mount/holdfast/${dir##*/}
      [ -d "$group" ] || continue
      find "$group" -name cgroup.procs -exec cat {} + | xargs -r kill -KILL 2>/dev/null || true
      find "$group" -depth -type d -exec sh -c 'for _ in 1 2 3 4 5; do rmdir "$0" && exit; sleep 0.2; done' {} \; 2>/dev/null || true
    done
    # The group of all pods, unless another daemon has some there.
    rmdir "$mount/holdfast" 2>/dev/null || true
  done
  awk -v a="$ROOT/" -v b="$STATE/" 'index($5, a) == 1 || index($5, b) == 1 { print $5 }' /proc/self/mountinfo \
    | tac | while read -r mount; do umount -l "$mount" || true; done
  ip link delete "$BRIDGE" 2>/dev/null || true
  # Rules of the network's plugins bear its name; the chains they lead to are of one pod each.
  local iptables chain number target
  for iptables in iptables ip6tables; do
    for chain in POSTROUTING CNI-HOSTPORT-DNAT; do
      { "$iptables" -w -t nat -nL "$chain" --line-numbers 2>/dev/null || true; } \
        | { grep -F "\"$NAME\"" || true; } | sort -rn | while read -r number target _; do
          # What cannot go must not keep the rest from going.
          "$iptables" -w -t nat -D "$chain" "$number" \
            && "$iptables" -w -t nat -F "$target" \
            && "$iptables" -w -t nat -X "$target" || true
        done
    done
  done
  rm -rf --one-file-system "$ROOT" "$STATE" "/var/log/$NAME"
}

if [ "${1:-}" = clean ]; then
  clean
  echo "$NAME: every trace is removed"
  exit 0
fi

for binary in "$daemon" "$cli" "$shim"; do
  [ -x "$binary" ] || die "$binary is missing: run 'make quickstart', which builds it"
done
clean
trap 'code=$?; [ $code -eq 0 ] || printf "\nIt failed. The daemon'"'"'s log is %s; '"'"'make quickstart-clean'"'"' takes everything away.\n" "$ROOT/holdfastd.log" >&2' EXIT

printf '%sHoldfast quickstart%s: everything is kept in %s and %s\n' "$bold" "$plain" "$ROOT" "$STATE"
mkdir -p -m 0700 "$ROOT" "$STATE"
mkdir -p "$ROOT/net.d" "$ROOT/log"

say "A registry"
# Port 0 would be fine if docker-registry told which one it got.
port=$(( 20000 + RANDOM % 20000 ))
while ss -ltn 2>/dev/null | grep -q ":$port "; do port=$((port + 1)); done
cat > "$ROOT/registry.yml" <<YAML
version: 0.1
log: { level: error }
storage: { filesystem: { rootdirectory: $ROOT/registry } }
http: { addr: 127.0.0.1:$port }
YAML
setsid docker-registry serve "$ROOT/registry.yml" > "$ROOT/registry.log" 2>&1 < /dev/null &
echo $! > "$STATE/registry.pid"
listening() { (exec 3<> "/dev/tcp/127.0.0.1/$port") 2>/dev/null; }
wait_until "docker-registry" listening
note "docker-registry listens on 127.0.0.1:$port"

say "A network for pods: CNI's bridge plugin"
cat > "$ROOT/net.d/10-quickstart.conflist" <<JSON
{
  "cniVersion": "1.0.0",
  "name": "$NAME",
  "plugins": [
    { "type": "bridge", "bridge": "$BRIDGE", "isGateway": true, "ipMasq": true,
      "ipam": { "type": "host-local", "dataDir": "$ROOT/ipam",
                "ranges": [[{ "subnet": "$SUBNET" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
JSON
note "bridge $BRIDGE, $SUBNET"

say "The daemon"
cat > "$ROOT/config.toml" <<TOML
version = 1
root = "$ROOT"
state = "$STATE"
[grpc]
socket = "$SOCKET"
[network]
conf_dir = "$ROOT/net.d"
[runtime]
shim = "$(realpath "$shim")"
[nri]
enabled = false
TOML
start_daemon
note "holdfastd is process $(pid_of holdfastd); its socket is $SOCKET"
show version

say "An image of Debian's busybox, into the registry and out of it"
image=127.0.0.1:$port/quickstart/busybox:1
make_image "$ROOT/busybox.tar" "$image"
show image load "$ROOT/busybox.tar"
show image push "$image"
show rmi "$image"
show pull "$image"
show images

say "A pod with a container that writes a numbered line every 10 ms"
script='i=0; while :; do i=$((i+1)); echo "line $i"; usleep 10000; done'
show run -d --name kelp --log-dir "$ROOT/log" "$image" /bin/sh -c "$script"
log=$(find "$ROOT/log" -name '*.log' | head -n 1)
[ -n "$log" ] || die "the container has no log in $ROOT/log"
count() { grep -c ' stdout F line ' "$log"; }
has() { [ "$(count)" -ge "$1" ]; }
wait_until "the log" has 50
show pods
show ps
show logs -n 3 kelp
show exec kelp -- sh -c 'echo "inside: $(hostname), $(ip -4 -o addr show eth0 | awk "{print \$4}")"'
container=$(holdfast ps -q)
inside=$(holdfast exec kelp -- cat /proc/1/stat | cut -d ' ' -f 22)

say "The daemon is killed with SIGKILL"
kill -KILL "$(pid_of holdfastd)"
before=$(count)
wait_until "the log to grow without a daemon" has $((before + LINES))
note "no daemon runs, and the container wrote $(( $(count) - before )) lines meanwhile"

say "The daemon is started again"
start_daemon
show ps
[ "$(holdfast ps -q)" = "$container" ] || die "the container is not the same: it was $container"
[ "$(holdfast exec kelp -- cat /proc/1/stat | cut -d ' ' -f 22)" = "$inside" ] || die "the process in it is not the same"
wait_until "more of the log" has $(( $(count) + 50 ))
awk '$2 == "stdout" && $4 == "line" { wanted++; if ($5 != wanted) { print "after line " wanted - 1 " comes line " $5; exit 1 } }' "$log" \
  || die "the log has a gap"
note "${bold}It is the same container, and of its $(count) lines none is missing.${plain}"

printf '\n%sIt keeps running. What to type next:%s\n' "$bold" "$plain"
cat <<TEXT
   export HOLDFAST_ADDRESS=$SOCKET
   $cli ps
   $cli logs -f kelp
   $cli exec kelp -- ps
   $cli stats --no-stream
   $cli run --rm $image echo hello
   crictl --runtime-endpoint unix://$SOCKET ps    (if you have crictl)
   make quickstart-clean                          (takes everything away)
TEXT
