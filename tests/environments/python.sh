#!/bin/sh
# python.sh VARIABLE VERSION...: prints a Python of the first of these versions that is here, on PATH or one of pyenv's.
variable=$1
shift
for version; do
  for python in "python$version" "$(pyenv root 2>/dev/null)/versions/$version".*/bin/python; do
    "$python" -c "import sys; print(sys.executable)" 2>/dev/null && exit
  done
done
echo "no Python of version $* is here, on PATH or in pyenv: install one, or name it: $variable=/path/to/python" >&2
exit 1
