#!/bin/sh
# Makes .venv ready: `sh scripts/setup.sh demo` (what a user needs), `test` (with the dev extras) or `docs` (with those and
# the documentation's).
#
#   PYTHON=python3.12    the interpreter to use (default: the first of python3.11 .. python3.14, python3 that is new enough)
#   TORCH_INDEX=URL      package index for the torch step alone, e.g. one with CPU-only or other CUDA builds
#   V=1                  show everything pip says
#
# Two stamps in .venv remember what was finished, so a second run is instant and an interrupted one goes on where it
# was. The only truth about versions is constraints.txt.
set -eu

mode=${1:-demo}
case $mode in
  demo) enough='demo test docs' ;;
  test) enough='test docs' ;;
  docs) enough=docs ;;
  *) echo "setup: say 'demo', 'test' or 'docs', not '$mode'." >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
venv=.venv
min_free_mb=4096
started=$(date +%s)

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# ---- a Python -------------------------------------------------------------------------------------------------------

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
if [ -n "${PYTHON:-}" ]; then
  command -v "$PYTHON" >/dev/null 2>&1 || die "PYTHON=$PYTHON is not a program; set PYTHON to a Python 3.11 or newer."
  python=$PYTHON
  "$python" -c "$new_enough" 2>/dev/null || die "PYTHON=$PYTHON is older than 3.11 or does not start; set PYTHON to a Python 3.11 or newer."
else
  python=
  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$new_enough" 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || die "no Python 3.11 or newer found; install python3.11, or set PYTHON=/path/to/python."
fi

# One line each: the interpreter's version; a digest of what the package stamp depends on; torch's pin.
facts=$("$python" - <<'PY'
import hashlib, pathlib, platform, re
sources = sorted(pathlib.Path("src/sfumato/ring/csrc").iterdir())
parts = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "hatch_build.py", *sources)]
print(platform.python_version())
print(hashlib.sha256(b"\0".join([*parts, platform.python_version().encode()])).hexdigest()[:24])
print(re.search(r"^torch==(\S+)", parts[1].decode(), re.M).group(1))
PY
)
version=$(echo "$facts" | sed -n 1p)
digest=$(echo "$facts" | sed -n 2p)
torch=$(echo "$facts" | sed -n 3p)

# ---- nothing to do? -------------------------------------------------------------------------------------------------

stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }
torch_stamp=$venv/.sfumato-torch
package_stamp=$venv/.sfumato-package
marker=$venv/.sfumato-installing
torch_want="$torch $version ${TORCH_INDEX:-default}"
# Without TORCH_INDEX any finished torch of the right version will do: `make test` need not repeat `make demo`'s setting.
if [ -z "${TORCH_INDEX:-}" ] && [ -f "$torch_stamp" ]; then
  case $(cat "$torch_stamp") in "$torch $version "*) torch_want=$(cat "$torch_stamp") ;; esac
fi
# A tree that moved has a stale .venv: its scripts name the old folder.
here=$(pwd -P)
package_want="$digest $here"
ready() {
  stamped "$torch_stamp" "$torch_want" || return 1
  for finished in $enough; do if stamped "$package_stamp" "$package_want $finished"; then return 0; fi; done
  return 1
}
if ready; then exit 0; fi

# ---- room and tools -------------------------------------------------------------------------------------------------

"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  die "$python has no venv module; install it (Debian, Ubuntu: apt install python${version%.*}-venv), or set PYTHON to another Python."
if ! stamped "$torch_stamp" "$torch_want"; then
  free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
  [ "$free_mb" -ge "$min_free_mb" ] ||
    die "only $free_mb MB are free in $here and at least $min_free_mb MB are needed; free some space, or put the project on a bigger disk."
fi

# ---- pip with a sign of life ----------------------------------------------------------------------------------------

ticker=
stop_ticker() { [ -z "$ticker" ] || { kill "$ticker" 2>/dev/null || true; wait "$ticker" 2>/dev/null || true; ticker=; }; }
trap stop_ticker EXIT
trap 'stop_ticker; echo; say "interrupted; the same command goes on from here."; exit 130' INT
trap 'stop_ticker; exit 143' TERM

tick() { # on a terminal a counter, elsewhere a line a minute; ends with the script, however that ends
  seconds=0
  while sleep 1 && kill -0 $$ 2>/dev/null; do
    seconds=$((seconds + 1))
    if [ -t 1 ]; then printf '\r  %s s ' "$seconds"; elif [ $((seconds % 60)) -eq 0 ]; then echo "  ... $seconds s"; fi
  done
}

pip() {
  if [ -n "${V:-}" ]; then
    "$venv/bin/python" -m pip "$@"
    return
  fi
  tick &
  ticker=$!
  status=0
  "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@" || status=$?
  stop_ticker
  if [ -t 1 ]; then printf '\r          \r'; fi
  return $status
}

# ---- the environment ------------------------------------------------------------------------------------------------

have=
[ ! -f $venv/pyvenv.cfg ] || have=$("$venv/bin/python" -c 'import platform; print(platform.python_version())' 2>/dev/null || true)
moved=
[ ! -f $package_stamp ] || case $(cat $package_stamp) in *" $here "*) ;; *) moved=yes ;; esac
if [ "$have" != "$version" ] || [ -n "$moved" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  say "making $venv with $python ($version)"
  rm -rf "$venv"
  "$python" -m venv "$venv" || die "$python could not make $venv; see the message above."
fi
if [ -f "$marker" ]; then
  say "an earlier install was interrupted; going on"
  # pip writes INSTALLER after a package's files: a .dist-info without it belongs to a half-copied package.
  for info in "$venv"/lib/python*/site-packages/*.dist-info; do
    if [ -d "$info" ] && [ ! -s "$info/INSTALLER" ]; then rm -rf "$info"; fi
  done
  rm -rf "$venv"/lib/python*/site-packages/~*
fi
: >"$marker"

if ! stamped "$torch_stamp" "$torch_want"; then
  if [ -n "${TORCH_INDEX:-}" ]; then
    say "installing torch $torch from TORCH_INDEX"
    # Another build of the same version counts as installed for pip, so it goes first.
    [ ! -f "$torch_stamp" ] || pip uninstall --yes torch
    rm -f "$torch_stamp"
    set -- --index-url "$TORCH_INDEX"
  else
    say "installing torch $torch (a CPU build is a download of about 190 MB; the CUDA build that pip picks by default on Linux is about 3 GB)"
    rm -f "$torch_stamp"
    set -- --constraint constraints.txt
  fi
  pip install "torch==$torch" "$@" || die "\
torch $torch did not install for Python $version (see above): if your index lacks it, set TORCH_INDEX to one that has it; it is tested on Python 3.11, so PYTHON=python3.11 may help too."
  "$venv/bin/python" -W ignore -c 'import torch' || die "torch $torch is installed but does not import (see above); remove $venv and try another TORCH_INDEX."
  echo "$torch_want" >"$torch_stamp"
fi

case $mode in
  demo) extras= note="about 90 MB to download" ;;
  test) extras='[dev]' note="about 130 MB to download, 40 MB when the demo is installed" ;;
  docs) extras='[dev,docs]' note="about 15 MB more than for the tests" ;;
esac
say "installing sfumato and what it needs ($note)"
rm -f "$package_stamp"
pip install --constraint constraints.txt --editable ".$extras" ||
  die "sfumato's requirements did not install for Python $version (see above); run the same command again after a network fault, or set PYTHON=python3.11, for which the pins are tested."
say "$("$venv/bin/python" -W ignore -c 'from sfumato.ring import native; print(native.describe())')"
"$venv/bin/python" -m pip check >/dev/null || die "the installed packages contradict each other: $("$venv/bin/python" -m pip check 2>&1 | head -n 1); remove $venv and run again."
echo "$package_want $mode" >"$package_stamp"
rm -f "$marker"
say "ready after $(($(date +%s) - started)) s; $venv takes $(du -sm "$venv" | cut -f1) MB"
