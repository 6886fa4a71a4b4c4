#!/usr/bin/env bash
# Train with one script on the GPUs of this machine, with its environment, checks, log and signals taken care of.
#
#   ./run.sh [--hostfile FILE] SCRIPT [GPUS] [FLAGS...]
#   ./run.sh tests [PYTEST FLAGS...]
#
#   ./run.sh t2v_ddpm.py                          on every GPU that is visible, pushes to the Hub at the end
#   ./run.sh t2v_ddpm.py 4 --steps 2000           on 4 GPUs
#   ./run.sh t2v_ddpm.py --demo                   minutes, tiny, also without a GPU (there GPUS counts processes)
#   ./run.sh llava_vtt.py 4                       fine-tunes on four public clips: a first look
#   ./run.sh t2v_ddpm.py --help                   the script's own manual
#   DRY_RUN=1 ./run.sh t2v_ddpm.py 4              set-up and checks, prints the command, starts nothing
#   CUDA_VISIBLE_DEVICES=2,3 ./run.sh t2v_ddpm.py
#
# First use makes .venv beside this file (PYTHON=/path/to/python uses that one and installs nothing).
# A run pushes, so it needs HF_USER_ID and HF_TOKEN; --demo, --check, --predict, --prompt and --no_push_to_hub do not.
# runs/ and logs/ lie in the current directory; logs/latest.log is the newest log and ends with SUCCESS, FAILED or STOPPED.
# Ctrl-C or SIGTERM once: every rank saves a checkpoint and ends (give it time); the third one kills.
# --hostfile: start it on the first machine listed, same paths on all; ssh carries no HF_* variables, so set them there.
# Exit: 0 done, 2 a check failed, 3 trained but not pushed, 4 diverged, 130/143 stopped with a checkpoint, else a crash.

set -euo pipefail

TORCH=2.13.0       # for machines that bring no CUDA torch of their own
GRACE=${GRACE:-60} # seconds for ranks that outlive their launcher, before SIGTERM and again before SIGKILL
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

warnings=''
say() { printf 'run.sh: %s\n' "$*"; }
warn() { say "warning: $*" >&2; warnings+="warning: $*"$'\n'; }
die() { say "$*" >&2; exit 2; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
quoted() { printf '%q ' "$@"; }

# --- Environment

works() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

has_cuda_torch() {
  "$1" -c 'import sys, torch
sys.exit(torch.version.cuda is None or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))' 2>/dev/null
}

find_python() {  # one with a CUDA torch (rented images bring it), else the first that is new enough
  local candidate first=''
  for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
    works "$candidate" || continue
    if has_cuda_torch "$candidate"; then echo "$candidate"; return; fi
    first=${first:-$candidate}
  done
  echo "$first"
}

stamp() {  # what the finished .venv was made from
  { cat "$here/requirements.txt"; echo "$TORCH"; readlink -f "$venv/bin/python"; } | sha256sum
}

is_ready() { [[ -f $venv/.ready && $(<"$venv/.ready") == "$(stamp)" ]]; }

make_venv() {
  local base
  base=$(find_python)
  [[ -n $base ]] || die "Python 3.10 or newer is needed, and none is in PATH; install one, or PYTHON=/path/to/python ./run.sh ..."
  mkdir "$venv"
  touch "$venv/.made_by_run_sh"
  if ! has_cuda_torch "$base"; then
    say "making $venv with $("$base" --version); once, some minutes"
    "$base" -m venv "$venv"
    return
  fi
  say "making $venv on top of the CUDA torch of $(command -v "$base")"
  "$base" -m venv --system-site-packages "$venv"
  has_cuda_torch "$venv/bin/python" && return
  # $base is a virtual environment itself: a venv made from it sees only the interpreter below
  "$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/image.pth"
}

pip_install() {
  # DeepSpeed comes as source; without its operators, in an isolated build, it needs neither compiler nor CUDA
  DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --disable-pip-version-check --use-pep517 "$@"
}

install_packages() {
  if ! grep -q 'include-system-site-packages = true' "$venv/pyvenv.cfg"; then
    if nvidia-smi -L >/dev/null 2>&1; then
      pip_install --no-deps "torch==$TORCH"
    else  # PyPI's build would pull gigabytes of CUDA; few retries, for machines that reach a mirror only
      pip_install --no-deps --retries 2 "torch==$TORCH" --extra-index-url https://download.pytorch.org/whl/cpu
    fi
  fi
  "$venv/bin/python" -c 'from importlib.metadata import distributions
print(*{f"{d.name}=={d.version}" for d in distributions() if d.name.startswith("torch")}, sep="\n")' >"$venv/constraints.txt"
  pip_install -r "$here/requirements.txt" -c "$venv/constraints.txt"
  if nvidia-smi -L >/dev/null 2>&1 &&
    ! env -u CUDA_VISIBLE_DEVICES "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    warn "torch does not see the GPU: is the driver too old for its CUDA? An older torch (>=2.6): PYTHON=/its/python ./run.sh ..."
  fi
}

set_up() (  # in a subshell: the lock ends with it
  exec 9>>"$here/.venv.lock"
  flock -n 9 || { say "another set-up of $venv is running: waiting for it"; flock 9; }
  is_ready && return
  trap '(($? == 0)) || die "set-up failed, the reason stands above; the same command again takes it up"' EXIT
  rm -rf "$venv.unfinished"
  rmdir "$venv" 2>/dev/null || true
  if [[ -e $venv && ! -e $venv/.made_by_run_sh ]]; then
    die "$venv was not made by run.sh: move it away, or use it as it is with PYTHON=$venv/bin/python"
  fi
  if [[ -e $venv && ! -e $venv/.ready ]]; then  # begun and never finished: renamed first, so that a kill here is harmless
    mv "$venv" "$venv.unfinished"
    rm -rf "$venv.unfinished"
  fi
  rm -f "$venv/.ready"
  [[ -e $venv ]] || make_venv
  install_packages
  stamp >"$venv/.ready"
)

choose_python() {
  if [[ -n ${PYTHON:-} ]]; then
    python=$(realpath -s "$(command -v "$PYTHON")" 2>/dev/null) || die "PYTHON=$PYTHON: no such program"
  else
    if ! is_ready; then set_up; fi  # not "||": that would switch set -e off inside
    python=$venv/bin/python
  fi
  PATH=$(dirname "$python"):$PATH  # ninja, for the operators that DeepSpeed compiles at run time
}

# --- Checks

scripts() { grep -l '^# /// script' "$here"/*_*.py 2>/dev/null | sed 's|.*/||'; }

given() {  # is one of these flags among the script's? underscore and hyphen spell the same flag
  local flag name
  for flag in ${flags[@]+"${flags[@]}"}; do
    flag=${flag%%=*}
    for name in "$@"; do [[ ${flag//-/_} == "__$name" ]] && return; done
  done
  return 1
}

check_hub() {
  if ! given push_to_hub; then
    if given demo check predict prompt no_push_to_hub; then return; fi
    flags+=(--push_to_hub)
  fi
  # presence only: the value must not show, also under bash -x
  local missing=''
  [[ -n ${HF_USER_ID:+set} ]] || missing+=' HF_USER_ID'
  [[ -n ${HF_TOKEN:+set} ]] || missing+=' HF_TOKEN'
  [[ -z $missing ]] || die "not set:$missing. The run pushes its model: export$missing, or add --no_push_to_hub"
}

count_gpus() {  # sets have, devices (their indices, comma between) and gpu_table (index, uuid, name)
  local index
  gpu_table=$(nvidia-smi --query-gpu=index,uuid,name --format=csv,noheader 2>/dev/null) || gpu_table=''
  have=$(grep -c . <<<"$gpu_table") || true
  devices=$(seq -s, 0 $((have - 1)))
  if [[ -z ${CUDA_VISIBLE_DEVICES+x} ]]; then return; fi
  devices=${CUDA_VISIBLE_DEVICES// /}
  devices=${devices%%-1*}
  devices=${devices%,}
  for index in ${devices//,/ }; do
    [[ $index =~ ^[0-9]+$ ]] || die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed takes indices only (nvidia-smi -L shows them)"
    ((have == 0 || index < have)) || die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: this machine has $have GPUs, 0 is the first"
  done
  have=$(tr ',' '\n' <<<"$devices" | grep -c .) || true
}

warn_of_busy_gpus() {
  local uuid pid memory index
  while IFS=, read -r uuid pid memory; do
    index=$(awk -F', ' -v uuid="$uuid" '$2 == uuid { print $1 }' <<<"$gpu_table")
    if [[ -n $index && ,$devices, == *,$index,* ]]; then warn "GPU $index is in use: pid$pid holds$memory"; fi
  done < <(nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader 2>/dev/null)
}

check_gpus() {  # sets placement, the launcher's arguments about GPUs
  local cores
  count_gpus
  cores=$(env -u OMP_NUM_THREADS nproc)
  if ((have == 0)); then
    given demo check predict prompt ||
      die "no GPU is visible (CUDA_VISIBLE_DEVICES, nvidia-smi). On the CPU: ./run.sh $name --demo; to debug: python $name ..."
    if [[ -n ${CUDA_VISIBLE_DEVICES+x} ]]; then hidden=1; fi
    gpus=${gpus:-1}
    if ((gpus > cores)); then warn "$gpus processes asked for, this machine has $cores cores: taking $cores"; gpus=$cores; fi
    say "no GPU is visible: running on the CPU, processes: $gpus"
    settings=(DS_ACCELERATOR=cpu)
    placement=(--num_gpus "$gpus")
  else
    gpus=${gpus:-$have}
    if ((gpus > have)); then warn "$gpus GPUs asked for, $have visible: taking $have"; gpus=$have; fi
    devices=$(cut -d, -f"1-$gpus" <<<"$devices")
    if [[ -n ${CUDA_VISIBLE_DEVICES+x} ]]; then
      settings=("CUDA_VISIBLE_DEVICES=$devices")  # DeepSpeed obeys it only when --num_gpus is absent
      placement=()
    else
      placement=(--num_gpus "$gpus")
    fi
    warn_of_busy_gpus
  fi
  settings+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / gpus > 0 ? cores / gpus : 1))}")
}

check_deepspeed() {  # sets versions and port; metadata only, since importing torch takes seconds
  local facts
  facts=$("$python" -c '
import importlib.util as u, platform, socket
from importlib.metadata import version
assert u.find_spec("deepspeed") and u.find_spec("torch")
print(socket.create_server(("", 0)).getsockname()[1])
print("python", platform.python_version(), "torch", version("torch"), "deepspeed", version("deepspeed"))' 2>/dev/null) ||
    die "$python cannot import torch and deepspeed: install requirements.txt there, or without PYTHON= remove $venv and repeat"
  { read -r port; read -r versions; } <<<"$facts"
}

# --- Run

open_log() {  # sets log; its name has a second's resolution, so a second run in that second adds its pid
  mkdir -p logs
  log=logs/$(date +%Y%m%d_%H%M%S)_${name%.py}.log
  (umask 077; set -C; : >"$log") 2>/dev/null || { log=${log%.log}_$$.log; (umask 077; : >"$log"); }
  ln -sfn "$(basename "$log")" logs/latest.log
  export PYTHON_RUN_STATUS=$PWD/${log%.log}.status  # rank 0 writes its exit code there; DeepSpeed hands PYTHON* to other hosts
  {
    echo "given:    $as_given"
    echo "command:  $shown"
    echo "revision: $(git -C "$here" describe --always --dirty 2>/dev/null || echo none)"
    echo "versions: $versions"
    echo "gpus:     $(grep . <<<"${gpu_table:-}" | sed 's/, [^,]*,//' | paste -sd';' || true)"
    echo "host:     $(uname -n), started $(date '+%F %T %z')"
    printf '%s\n' "$warnings"
  } >>"$log"
  say "log $log"
}

note() { say "$*" | (trap '' INT TERM HUP PIPE; tee -a "$log") || true; }

children() { grep -slE "^PPid:\s+$1\$" /proc/[0-9]*/status | cut -d/ -f3 || true; }

survivors() { grep -slE "\) [^ZX] [0-9]+ [0-9]+ $job " /proc/[0-9]*/stat | cut -d/ -f3 || true; }  # the job's session

forward() {  # to the ranks alone: told itself, the launcher would kill them after 30 s, whether they have saved or not
  local signal=$1 whom='the ranks: they save and end; the third signal kills them' launcher targets=''
  signals=$((signals + 1))
  if [[ -z $job ]]; then return; fi
  for launcher in $(children "$job"); do targets+=" $(children "$launcher")"; done
  if [[ -n $hostfile || -z ${targets// /} ]]; then targets=$(survivors); fi  # DeepSpeed passes it on to other machines
  if ((signals >= 3)); then signal=KILL whom='every process of the run' targets=$(survivors); fi
  note "$signal goes to $whom"
  # shellcheck disable=SC2086  # a list of pids
  kill "-$signal" $targets 2>/dev/null || true
}

launch() {  # sets rc, the launcher's exit code
  # A session of its own: the terminal's Ctrl-C and a signal to our group come to the ranks through forward() only.
  # (bash starts background jobs with SIGINT ignored; python with SIGPIPE ignored: both back to normal.)
  local out tee detach='import os, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])'
  job='' signals=0 left_behind=0
  trap 'forward INT' INT
  trap 'forward TERM' TERM HUP
  exec {out}> >(trap '' INT TERM HUP PIPE; exec tee -a "$log")
  tee=$!
  env PYTHONUNBUFFERED=1 ${settings[@]+"${settings[@]}"} "$python" -c "$detach" "${command[@]}" >&"$out" 2>&1 </dev/null {out}>&- &
  job=$!
  exec {out}>&-
  if ((signals > 0)); then forward TERM; fi
  local seen=-1
  while ((seen < signals)); do seen=$signals rc=0; wait "$job" || rc=$?; done  # a trapped signal ends wait early
  empty_session
  for _ in {1..50}; do kill -0 "$tee" 2>/dev/null || break; sleep 0.2 || true; done
  kill -KILL "$tee" 2>/dev/null || true
}

empty_session() {  # a launcher that ended is no proof: DeepSpeed's can leave its ranks behind
  local signal=TERM deadline=$((SECONDS + GRACE)) left
  while left=$(survivors); [[ -n $left ]]; do
    if ((SECONDS >= deadline)); then
      note "the launcher has ended, these processes have not; $signal goes to: $(echo "$left" | paste -sd' ')"
      # shellcheck disable=SC2086  # a list of pids
      kill "-$signal" $left 2>/dev/null || true
      left_behind=1 signal=KILL deadline=$((SECONDS + GRACE))
    fi
    sleep 0.2 || true
  done
}

exit_code() {  # from the launcher's code and from what rank 0 wrote: torchrun turns 3 into 1, deepspeed 143 into 1
  local status=''
  if [[ -f $PYTHON_RUN_STATUS ]]; then status=$(<"$PYTHON_RUN_STATUS"); fi
  case $rc/$status in
    0/0) code=0 ;;
    */[234]) code=$status ;;
    [1-9]*/130 | [1-9]*/143) code=$((signals > 0 ? status : rc)) ;;  # unasked, 143 only means that another rank crashed
    0/*) code=1; note "the launcher reports success, rank 0 does not" ;;
    # a rank that died of signal n comes up as 256-n; a shell calls that 128+n
    241/* | 245/* | 247/* | 250/* | 254/*) code=$((384 - rc)) ;;
    *) code=$rc ;;
  esac
  case $code in 130 | 143) [[ $status == "$code" ]] || note "stopped before rank 0 could report a checkpoint" ;; esac
  case $code in 0 | 130 | 143) code=$((left_behind ? 1 : code)) ;; esac
  rm -f "$PYTHON_RUN_STATUS"
}

finish() {
  local word=FAILED
  case $code in 0) word=SUCCESS ;; 130 | 143) word=STOPPED ;; esac
  printf '%s exit=%s seconds=%s\n' "$word" "$code" "$SECONDS" | (trap '' INT TERM HUP PIPE; tee -a "$log") || true
  exit "$code"
}

run_tests() {  # a process for each core, 4 at most; the demos one after the other, for they have threads of their own
  local cores=$(($(nproc) < 4 ? $(nproc) : 4)) parallel=()
  choose_python
  cd "$here"
  if [[ " $* " != *" --demos "* ]]; then parallel=(-n "$cores" --dist loadfile --no-loadscope-reorder); fi
  exec "$python" -m pytest tests ${parallel[@]+"${parallel[@]}"} "$@"
}

# --- Main

as_given=$(quoted "$0" "$@") hostfile='' gpus='' hidden='' settings=()
if [[ ${1:-} == --hostfile ]]; then
  hostfile=${2:-}
  [[ -f $hostfile ]] || die "--hostfile $hostfile: no such file"
  shift 2
fi
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
  tests) run_tests "${@:2}" ;;
esac
name=${1##*/}
if ! scripts | grep -qxF -- "$name" || ! [[ $1 == "$name" || $1 -ef $here/$name ]]; then
  die "no script '$1'; there are: $(scripts | paste -sd' ')"
fi
shift
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  gpus=$((10#$1))
  ((gpus >= 1)) || die "GPUS $1: ask for 1 or more (CUDA_VISIBLE_DEVICES= with --demo stays on the CPU)"
  shift
fi
flags=("$@")
if given help || [[ ${1:-} == -h ]]; then choose_python; exec "$python" "$here/$name" --help; fi

check_hub
if [[ -n $hostfile ]]; then  # its slots say how many GPUs each machine has
  placement=(--hostfile "$hostfile" ${gpus:+--num_gpus "$gpus"})
else
  check_gpus
fi
choose_python
check_deepspeed

launcher=("$python" -m deepspeed.launcher.runner -q ${placement[@]+"${placement[@]}"} --master_port "$port")
command=("${launcher[@]}" "$here/$name" ${flags[@]+"${flags[@]}"})
if [[ -n $hidden ]]; then  # DeepSpeed overwrites CUDA_VISIBLE_DEVICES and so would show the GPUs that the user hid
  command=("${launcher[@]}" --no_python --no_local_rank env CUDA_VISIBLE_DEVICES= "$python" -u "$here/$name" ${flags[@]+"${flags[@]}"})
fi
shown=$(quoted ${settings[@]+"${settings[@]}"} "${command[@]}")
if [[ -n ${DRY_RUN:-} ]]; then echo "$shown"; exit 0; fi
open_log
launch
exit_code
finish
