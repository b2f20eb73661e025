#!/bin/sh
# SPU, CrypTen and sfumato on the same cases, in turn, on this machine; see README.md.
#
#   sh beside.sh PEER_SCRIPTS SPU_PYTHON CRYPTEN_PYTHON OUT [CASE...]
#
# PUBLIC=1: weights public (the cases that have some).  SFUMATO: the command, default `sfumato`.
set -u

[ $# -ge 4 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
scripts=$1 spu=$2 crypten=$3 out=$4
shift 4
sfumato=${SFUMATO:-sfumato}
public=${PUBLIC:+--public}
mkdir -p "$out/peers" || exit 2

[ $# -gt 0 ] || set -- $($sfumato bench --list | awk '!/only when named/ { print $1 }')
for case in "$@"; do
  echo "== $case"
  # One that fails says so in its own record or log; the others go on.
  "$spu" "$scripts/spu_bench.py" --cases "^$case\$" $public --out "$out/peers/spu.jsonl" >"$out/spu.log" 2>&1 ||
    echo "   SPU: see $out/spu.log"
  "$crypten" "$scripts/crypten_bench.py" --cases "^$case\$" $public --out "$out/peers/crypten.jsonl" >"$out/crypten.log" 2>&1 ||
    echo "   CrypTen: see $out/crypten.log"
  $sfumato bench "$case" $public --json "$out/ours.jsonl" --peers "$out/peers" --out "$out/page.md" || exit $?
done
