#!/usr/bin/env bash
# Wheels of what `make test-cuda` and `make bench-cuda` need beside PyTorch, torchvision, NumPy, SciPy, scikit-learn,
# Pillow and PyYAML, and what these bring, for a GPU machine without network: PYTHON=.venv/bin/python experiments/gpu/wheels.sh FOLDER [3.12]
# There: pip install --no-index --no-deps FOLDER/*.whl && make bench-cuda PY=python READY=
set -euo pipefail
folder=$1 version=${2:-3.12}
mkdir -p "$folder"
mapfile -t packages < "$(dirname "$0")/wheels.txt"
"${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$folder" --only-binary=:all: --python-version "$version" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
  "${packages[@]}"
# Hydra's parser has no wheel on PyPI: one is made here, the same for every Python 3.
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$folder" antlr4-python3-runtime==4.9.3
megabytes=$(du --summarize --block-size=1048576 "$folder" | cut --fields=1)
echo "$folder: $(find "$folder" -name '*.whl' | wc --lines) wheels, $megabytes MiB"
if [ "$megabytes" -gt 64 ]; then
  echo "error: $folder has $megabytes MiB, more than 64: take what the machine has out of wheels.txt" >&2
  exit 1
fi
