# Sourced by the scripts that run tests on other Pythons.

python_at() { # the interpreter of version $1: on PATH, or kept by pyenv
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if "$candidate" -c '' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python $1: not on this machine" >&2
  return 1
}
