#!/usr/bin/env bash
# Train with one script on the GPUs of this machine, with its environment, checks, log and signals taken care of.
#
#   ./run.sh [--hostfile FILE] SCRIPT [GPUS] [FLAGS...]
#   ./run.sh tests [PYTEST FLAGS...]
#
#   ./run.sh t2v_ddpm.py                          on every GPU that is visible, pushes to the Hub at the end
#   ./run.sh t2v_ddpm.py 4 --steps 2000           on 4 GPUs
#   ./run.sh t2v_ddpm.py --demo                   minutes, tiny, also without a GPU (there GPUS counts processes)
#   ./run.sh t2v_ddpm.py --help                   the script's own manual
#   DRY_RUN=1 ./run.sh t2v_ddpm.py 4              set-up and checks, prints the command, starts nothing
#   CUDA_VISIBLE_DEVICES=2,3 ./run.sh t2v_ddpm.py
#
# First use makes .venv beside this file (PYTHON=/path/to/python uses that one and installs nothing).
# A run pushes, so it needs HF_USER_ID and HF_TOKEN; --demo, --check, --predict, --prompt and --no_push_to_hub do not.
# runs/ and logs/ lie in the current directory; logs/latest.log is the newest log and ends with SUCCESS, FAILED or STOPPED.
# Ctrl-C or SIGTERM once: every rank saves a checkpoint and ends, however long it takes; the third one kills.
# A rank that crashes ends the others: SIGTERM, and SIGKILL after GRACE=60 seconds. If run.sh is killed (-9) the ranks go on alone.
# --hostfile: DeepSpeed's launcher, from the first machine listed, same paths on all; ssh carries no HF_* variables: set them there.
# Exit: 0 done, 2 a check failed, 3 trained but not pushed, 4 diverged, 130/143 stopped with a checkpoint, else a crash.

# shellcheck disable=SC2329  # quit, ask and finish are called by traps
[ -n "${BASH_VERSION:-}" ] || { command -v bash >/dev/null && exec bash "$0" "$@"; echo "run.sh: install bash" >&2; exit 2; }  # sh run.sh
set +o posix -euo pipefail

TORCH=2.13.0 TORCHVISION=0.28.0  # for machines that bring no CUDA torch of their own
GRACE=${GRACE:-60}
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$here/.venv warnings=''

say() { printf 'run.sh: %s\n' "$*"; }
warn() { say "warning: $*" >&2; warnings+="warning: $*"$'\n'; }
die() { say "$*" >&2; exit 2; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
scripts() { grep -l '^# /// script' "$here"/*_*.py 2>/dev/null | sed 's|.*/||'; }
quoted() { printf '%q ' "$@" | sed 's/\\,/,/g'; }

quit() {  # on a signal before the run; a set-up ends too, with its pip
  for job in $(jobs -p); do say "set-up stopped; the same command again takes it up"; kill -- "-$job"; wait "$job"; done 2>/dev/null || true
  exit "$1"
}
trap 'quit 130' INT
trap 'quit 143' TERM HUP
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "this is bash $BASH_VERSION: install 4.4 or newer"

# --- Environment

has_cuda_torch() {
  "$1" -c 'import sys, torch as t; sys.exit(not t.version.cuda or [*map(int, t.__version__.split(".")[:2])] < [2, 6])' 2>/dev/null
}

find_python() {  # sets base: one with a CUDA torch (rented images bring it), else the first that is new enough
  local candidate; base=''
  for candidate in python3 python python3.13 python3.12 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if has_cuda_torch "$candidate"; then base=$candidate; break; fi
    base=${base:-$candidate}
  done
  [[ -n $base ]] || die "Python 3.11 or newer is needed, and none is in PATH; install one, or PYTHON=/path/to/python ./run.sh ..."
}

stamp() { { cat "$here/requirements.txt"; echo "$TORCH" "$TORCHVISION"; readlink -f "$venv/bin/python"; } | sha256sum; }  # what .venv was made from
is_ready() { [[ -f $venv/.ready && $(<"$venv/.ready") == "$(stamp)" ]]; }

make_venv() {
  local site='import sysconfig; print(sysconfig.get_path("purelib"))'
  say "making $venv with $("$base" --version); once, some minutes"
  if ! has_cuda_torch "$base"; then "$base" -m venv "$venv"; return; fi
  say "it stands on top of the CUDA torch of $(command -v "$base")"
  "$base" -m venv --system-site-packages "$venv"
  # if $base is a virtual environment itself, a venv made from it sees only the interpreter below
  has_cuda_torch "$venv/bin/python" || "$base" -c "$site" >"$("$venv/bin/python" -c "$site")/image.pth"
}

install_packages() {  # DeepSpeed comes as source; without its operators, in an isolated build, it needs neither compiler nor CUDA
  local index=() pip=(env DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --disable-pip-version-check --use-pep517)
  list_gpus  # without a GPU PyPI's build would pull gigabytes of CUDA; few retries, for machines that reach a mirror only
  [[ -n $gpu_table ]] || index=(--retries 2 --extra-index-url https://download.pytorch.org/whl/cpu)
  grep -q 'include-system-site-packages = true' "$venv/pyvenv.cfg" || "${pip[@]}" --no-deps "torch==$TORCH" "torchvision==$TORCHVISION" "${index[@]}"
  "$venv/bin/python" -c 'from importlib.metadata import distributions
print(*{f"{d.name}=={d.version}" for d in distributions() if d.name.startswith("torch")}, sep="\n")' >"$venv/constraints.txt"
  "${pip[@]}" -r "$here/requirements.txt" -c "$venv/constraints.txt"
  [[ -z $gpu_table ]] || env -u CUDA_VISIBLE_DEVICES "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    warn "torch does not see the GPU: is the driver too old for its CUDA? An older torch (>=2.6): PYTHON=/its/python ./run.sh ..."
}

set_up() {  # in a process of its own, which holds the lock
  local mark=$venv/.made_by_run_sh lock='import fcntl; fcntl.flock(9, fcntl.LOCK_EX'
  exec 9>>"$here/.venv.lock"
  "$base" -c "$lock | fcntl.LOCK_NB)" 2>/dev/null || { say "another set-up of $venv is running: waiting for it"; "$base" -c "$lock)"; }
  if is_ready; then return; fi
  [[ -e $mark || -z $(ls -A "$venv" 2>/dev/null) ]] ||
    die "$venv was not made by run.sh: move it away, or use it as it is with PYTHON=$venv/bin/python"
  if [[ ! -e $venv/.ready ]]; then  # else the requirements have changed
    mkdir -p "$venv" && touch "$mark"
    find "$venv" -mindepth 1 ! -path "$mark" -delete  # begun and not finished
    make_venv
  fi
  rm -f "$venv/.ready"
  install_packages
  stamp >"$venv/.ready"
}

choose_python() {
  python=$venv/bin/python
  if [[ -n ${PYTHON:-} ]]; then
    python=$(realpath -s "$(command -v "$PYTHON")" 2>/dev/null) || die "PYTHON=$PYTHON: no such program"
  elif ! is_ready; then
    find_python
    [[ -w $here ]] || die "$here is read-only, .venv cannot be made in it: copy it, or PYTHON=/path/to/python ./run.sh ..."
    set -m  # a process group of its own, so that quit() ends all of it
    set_up </dev/null &
    set +m
    wait $! || die "set-up failed, the reason stands above; the same command again takes it up"
  fi
  PATH=$(dirname "$python"):$PATH  # ninja, for the operators that DeepSpeed compiles at run time
}

# --- GPUs

ask_driver() {  # nvidia-smi's answer and "exit N"; a broken driver can make it unkillable, so nothing waits for its end
  local answer
  IFS= read -r -d '' -t 12 answer < <(timeout 10 nvidia-smi "$@" 2>&1; echo "exit $?") || (($? < 128)) || answer='exit 124'
  echo "${answer/%exit 124*/no answer in 10 seconds}"
}

list_gpus() {  # sets gpu_table, a line for each GPU: index, UUID, name; a slice of one (MIG) has "mig" for an index
  local answer odd known='^GPU [0-9]+:.*\(UUID: GPU-|^ +MIG .*\(UUID: MIG-|^exit 0$|^$'
  gpu_table=''
  command -v nvidia-smi >/dev/null || return 0
  answer=$(ask_driver -L)
  odd=$(grep -vE "$known" <<<"$answer") && warn "nvidia-smi -L says: ${odd%%$'\n'*}"
  [[ $answer != *"exit 0" ]] || gpu_table=$(sed -nE 's/^GPU ([0-9]+): (.*) \(UUID: ([^)]+).*/\1 \3 \2/p
    s/^ +(MIG .*): \(UUID: ([^)]+).*/mig \2 \1/p' <<<"$answer")
}

choose_gpus() {  # sets devices: what CUDA_VISIBLE_DEVICES names, by index or (the beginning of) UUID, else all; and their uuids
  local all value values uuid
  all=$(awk '$1 == "mig" { all = $2; exit } NF { all = all $1 "," } END { print all }' <<<"$gpu_table")
  IFS=', ' read -ra values <<<"${CUDA_VISIBLE_DEVICES-$all}"
  for value in "${values[@]}"; do
    case $value in -1 | NoDevFiles) break ;; esac  # the rest is hidden
    uuid=$(awk -v v="$value" 'v ~ /^[0-9]+$/ && $1 == v || v ~ /^(GPU|MIG)-/ && index($2, v) == 1 { print $2 }' <<<"$gpu_table")
    [[ $uuid =~ ^[^[:space:]]+$ && " ${uuids[*]} " != *" $uuid "* ]] ||
      die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: '$value' is not one GPU of this machine (nvidia-smi -L), or is there twice"
    if [[ $uuid == MIG-* ]]; then devices=("$value") uuids=("$uuid"); return; fi  # CUDA shows one slice, and nothing beside it
    devices+=("$value") uuids+=("$uuid")
  done
}

warn_of_busy_gpus() {
  local i uuid pid memory
  while IFS=', ' read -r uuid pid memory; do
    for i in "${!devices[@]}"; do
      if [[ $uuid == "${uuids[i]}" ]]; then warn "GPU ${devices[i]} is in use: pid $pid holds $memory"; fi
    done
  done < <(ask_driver --query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader)
}

# --- Checks

given() {  # is one of these flags among the script's? underscore and hyphen spell the same flag
  local flag names=" $* "
  for flag in "${flags[@]%%=*}"; do
    flag=${flag//-/_}
    if [[ $flag == __* && $names == *" ${flag#__} "* ]]; then return; fi
  done
  return 1
}

check_hub() {  # presence only: the token must not show, also under bash -x
  local missing=''
  if ! given push_to_hub && given demo check predict prompt no_push_to_hub; then return; fi
  [[ -n ${HF_USER_ID:+set} ]] || missing+=' HF_USER_ID'
  [[ -n ${HF_TOKEN:+set} ]] || missing+=' HF_TOKEN'
  [[ -z $missing ]] || die "not set:$missing. The run pushes its model: export$missing, or add --no_push_to_hub"
  given push_to_hub || flags+=(--push_to_hub)
}

check_gpus() {  # sets world, the number of ranks, and settings, the variables that all of them get
  local cores most what devices=() uuids=()
  cores=$(env -u OMP_NUM_THREADS nproc)
  choose_gpus
  most=${#devices[@]} what="GPUs asked for, ${#devices[@]} visible"
  if ((most == 0)); then
    given demo check predict prompt ||
      die "no GPU is visible (CUDA_VISIBLE_DEVICES, nvidia-smi). On the CPU: ./run.sh $name --demo; to debug: python $name ..."
    most=$cores gpus=${gpus:-1} what="processes asked for, this machine has $cores cores"
    settings+=(DS_ACCELERATOR=cpu)
  fi
  world=${gpus:-$most}
  if ((world > most)); then warn "$world $what: taking $most"; world=$most; fi
  devices=("${devices[@]:0:world}")
  settings+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]}")")
  settings+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > world ? cores / world : 1))}")
  if ((${#devices[@]} > 0)); then warn_of_busy_gpus; else say "no GPU is visible: running on the CPU, processes: $world"; fi
}

check_deepspeed() {  # sets port and versions; metadata only, since importing torch takes seconds
  { read -r port && read -r versions; } < <("$python" -c '
import importlib.util as u, platform, socket
from importlib.metadata import version
assert u.find_spec("deepspeed") and u.find_spec("torch")
print(socket.create_server(("", 0)).getsockname()[1])
print("python", platform.python_version(), "torch", version("torch"), "deepspeed", version("deepspeed"))' 2>/dev/null) ||
    die "$python cannot import torch and deepspeed: install requirements.txt there, or without PYTHON= remove $venv and repeat"
}

# --- Run

open_log() {  # sets log, and status, the file for rank 0's exit code; a second run in the same second adds its pid
  local stem
  stem=logs/$(date +%Y%m%d_%H%M%S)_${name%.py}
  mkdir -p logs 2>/dev/null || true
  for log in "$stem.log" "${stem}_$$.log"; do
    status=$PWD/${log%.log}.status
    (umask 077; set -C; printf '%s\n' "given:    $as_given" "command:  $shown" "versions: $versions" \
      "revision: $(git -C "$here" describe --always --dirty 2>/dev/null || echo none)" \
      "gpus:     $(cut -d' ' -f1,3- <<<"$gpu_table" | paste -sd';')" \
      "host:     $(uname -n), started $(date '+%F %T %z')" "$warnings" >"$log") 2>/dev/null || continue
    ln -sfn "${log##*/}" logs/latest.log 2>/dev/null || true  # some network disks know no links
    say "log $log"
    return
  done
  die "cannot write $PWD/$log: start where you may write, with room on the disk, and where logs is a folder"
}

note() { say "$*" | (trap '' INT TERM HUP PIPE; tee -a "$log") || true; }
pause() { read -r -t 0.1 -u "$never" || true; }  # a sleep that a signal ends at once
is_alive() { kill -0 -- "$1" 2>/dev/null; }
processes() {  # of this run, on this machine, found by a variable that no other run has; $1: one that they must have too
  grep -slFxz "PYTHON_RUN_STATUS=$status" /proc/[0-9]*/environ | xargs -r grep -slFxz "${1:-PYTHON_RUN_STATUS=$status}" | cut -d/ -f3 || true
}

launch() {  # starts the ranks, each in a session of its own, where the terminal's Ctrl-C does not reach it
  # bash starts background jobs deaf to SIGINT, and SIGPIPE is ignored here: both back to normal, and only then the new session
  local rank pid place=() alone='import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.setsid()
os.execvp(sys.argv[1], sys.argv[1:])'
  exec {never}<> <(:)
  exec {out}> >(trap '' INT TERM HUP PIPE; exec tee -a "$log")
  tee=$!
  for ((rank = 0; rank < world && signals == 0; rank++)); do
    [[ -n $hostfile ]] || place=("RANK=$rank" "LOCAL_RANK=$rank")
    env "${settings[@]}" "${place[@]}" "PYTHON_RUN_STATUS=$status" "$python" -IS -c "$alone" "${command[@]}" >&"$out" 2>&1 </dev/null {out}>&- &
    ranks[rank]=$!
  done
  exec {out}>&-
  for pid in "${ranks[@]}"; do while is_alive "$pid" && ! is_alive "-$pid"; do pause; done; done  # until then it would lose a signal
}

tell() {  # sends the signal $1 to the ranks, or, when they have ended or must, to every process of the run
  local pids=("${ranks[@]}")
  if [[ $1 == KILL || ${#ranks[@]} == 0 ]]; then
    mapfile -t -O "${#ranks[@]}" pids < <(processes)
  elif [[ -n $hostfile ]]; then  # told itself, the launcher would kill its ranks after 30 s, saved or not; rank 0 stops them all
    mapfile -t pids < <(processes RANK=0 | sort -n | head -n 1)
  fi
  ((${#pids[@]} > 0)) || pids=("${ranks[@]}")
  note "SIG$1 goes to ${pids[*]}, $2"
  kill "-$1" "${pids[@]}" 2>/dev/null || true
}

reap() {  # takes the exit code of rank $1, which has ended
  local rc seen
  for ((seen = -1; seen < signals; )); do seen=$signals rc=0; wait "${ranks[$1]}" || rc=$?; done  # a signal ends wait early
  unset "ranks[$1]"
  codes[$1]=$rc
  if ((rc == 0 || asked)) || [[ -n $first ]]; then return; fi
  note "rank $1 ended with exit code $rc"
  case $rc in
    130 | 143) asked=1 told=-1 ;;  # somebody asked this rank alone: the others may save too
    [234]) first=$rc due=$((SECONDS + GRACE)) ;;  # an end that all ranks come to
    *) first=$rc due=$SECONDS ;;
  esac
}

watch() {  # until the ranks, and after them all that they started, have ended
  local rank
  while true; do
    for rank in "${!ranks[@]}"; do is_alive "${ranks[rank]}" || reap "$rank"; done
    if ((${#ranks[@]} == 0)); then
      if [[ -z $(processes) ]]; then break; fi
      due=${due:-$((SECONDS + GRACE))}
    elif ((told < signals && signals < 3)); then
      told=$signals
      tell "$signal" "the ranks: they save and end, give them time; the third signal kills them"
    fi
    if [[ -n $due ]] && ((SECONDS >= due)); then
      if [[ -n $hostfile && ${#ranks[@]} == 0 ]]; then first=${first:-1}; fi  # the launcher ended before its ranks, maybe with 0
      tell "$next" "what is left of the run"
      next=KILL due=$((SECONDS + GRACE))
    fi
    pause
  done
  for _ in {1..99}; do is_alive "$tee" || return 0; pause; done
  kill -KILL "$tee"
}

exit_code() {  # sets code: 2, 3 or 4 if rank 0 wrote that, else that of the first rank that failed unasked, else rank 0's
  local word='' rc
  if [[ -f $status ]]; then word=$(<"$status"); fi
  code=${codes[0]:-$((128 + $(kill -l "$signal")))}  # a signal came before the ranks
  if [[ -n $hostfile ]]; then code=${word:-$code}; fi  # the launcher makes 1 of 143
  for rc in "${codes[@]}"; do if ((code == 0)); then code=$rc; fi; done
  code=${first:-$code}
  if ((code == 1 && asked)) && [[ -z $word ]]; then code=$((128 + $(kill -l "$signal"))); fi  # Python was still starting
  if [[ $word == [234] ]]; then code=$word; fi
  if [[ -n $hostfile ]] && ((code > 192)); then code=$((384 - code)); fi  # and 256 - n, not 128 + n, of signal n
  if [[ $code == 0 && $word != 0 ]]; then code=1; note "no rank failed, and yet rank 0 did not report success"; fi
  if [[ $code == 130 || $code == 143 ]] && [[ $word != "$code" ]]; then note "stopped before rank 0 could report a checkpoint"; fi
}

finish() {  # on every way out: the last line, on the terminal and in the log
  local word=FAILED
  case $code in 0) word=SUCCESS ;; 130 | 143) word=STOPPED ;; esac
  printf '%s exit=%s seconds=%s\n' "$word" "$code" "$SECONDS" | (trap '' INT TERM HUP PIPE; tee -a "$log") || true
  rm -f "$status"
  exit "$code"
}

# --- Main

run_tests() {  # a process for each core, 4 at most, and one, for many wait; the demos one by one: they have threads of their own
  local parallel=(-n $(($(nproc) < 4 ? $(nproc) + 1 : 5)) --dist loadfile --no-loadscope-reorder)
  if [[ " $* " == *" --demos "* ]]; then parallel=(); fi
  choose_python
  cd "$here"
  exec "$python" -m pytest tests "${parallel[@]}" "$@"
}

as_given=$(quoted "$0" "$@") hostfile='' gpus='' settings=(PYTHONUNBUFFERED=1)
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
scripts | grep -qxF -- "$name" && [[ $1 -ef $here/$name || $1 == "$name" ]] ||
  die "no script '$1'; there are: $(scripts | paste -sd' ')"
shift
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  gpus=$((10#$1))
  ((gpus >= 1)) || die "GPUS $1: ask for 1 or more (CUDA_VISIBLE_DEVICES= with --demo stays on the CPU)"
  shift
fi
flags=("$@")
if given help || [[ ${1:-} == -h ]]; then choose_python; exec "$python" "$here/$name" --help; fi

check_hub
list_gpus
[[ -n $hostfile ]] || check_gpus
choose_python
check_deepspeed
command=("$python" "$here/$name" "${flags[@]}")
if [[ -n $hostfile ]]; then  # its slots say how many GPUs each machine has
  world=1  # process to start here
  command=("$python" -m deepspeed.launcher.runner -q --hostfile "$hostfile" ${gpus:+--num_gpus "$gpus"} --master_port "$port" "${command[@]:1}")
  shown=$(quoted "${settings[@]}" "${command[@]}")
else
  export PYTHON_RUN_COMMAND=${as_given% }  # what to type again, for the script's messages
  settings+=("WORLD_SIZE=$world" "LOCAL_WORLD_SIZE=$world" "LOCAL_SIZE=$world" MASTER_ADDR=127.0.0.1 "MASTER_PORT=$port")
  shown="for i in {0..$((world - 1))}; do RANK=\$i LOCAL_RANK=\$i $(quoted "${settings[@]}" "${command[@]}")& done; wait"
fi
if [[ -n ${DRY_RUN:-} ]]; then echo "$shown"; exit 0; fi

ranks=() codes=() first='' code=1     # pids and exit codes by rank; the code of the first that failed unasked
signals=0 told=0 asked=0 signal=TERM  # how many came, how many of them the ranks know; was the run, or a rank, asked to stop
due='' next=TERM                      # when which signal goes out unasked
ask() { signals=$((signals + 1)) asked=1 signal=$1; if ((signals >= 3)); then due=$SECONDS next=KILL; fi; }
trap 'ask INT' INT
trap 'ask TERM' TERM HUP
trap '' PIPE  # a closed terminal ends no training
open_log
trap finish EXIT
launch; watch; exit_code; exit  # on one line: bash reads as it goes, and an update of this file must not change the run
