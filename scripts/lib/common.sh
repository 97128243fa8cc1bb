# Shared by every script: messages, packages, the cache. Sourced, not run.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${VMSHIM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmshim}
DIST=$REPO/target/dist

log() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# Prints the comment block at the top of the calling script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//;t p;d;:p;p}' "$0"; }

have() { command -v "$1" >/dev/null 2>&1; }

# The package lists of a fresh machine are empty.
apt_lists() {
  if [[ ! ${APT_FRESH-} ]] && ! apt-cache show libc6 >/dev/null 2>&1; then
    log "reading package lists"
    apt-get -qq update >&2 || die "apt-get update failed; check /etc/apt and the network"
    APT_FRESH=1
  fi
}

# need_packages PACKAGE...: installs the ones that are missing.
need_packages() {
  local missing=() p
  for p in "$@"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q ' installed$' || missing+=("$p")
  done
  ((${#missing[@]})) || return 0
  ((EUID == 0)) || die "missing packages; as root: apt-get install ${missing[*]}"
  apt_lists
  log "installing ${missing[*]}"
  # A stale list names files the mirror no longer has: refresh and try again.
  DEBIAN_FRONTEND=noninteractive apt-get -yqq -o Dpkg::Use-Pty=0 install --no-install-recommends "${missing[@]}" >&2 ||
    { apt-get -qq update >&2 &&
      DEBIAN_FRONTEND=noninteractive apt-get -yqq -o Dpkg::Use-Pty=0 install --no-install-recommends "${missing[@]}" >&2; } ||
    die "could not install ${missing[*]}"
}

# candidate PACKAGE: the version this machine's own apt would install. Lists that
# do not know it may be older than it is.
candidate() {
  apt_lists
  if ! apt-cache show "$1" >/dev/null 2>&1 && [[ ! ${APT_FRESH-} ]]; then
    log "reading package lists again: they do not have $1"
    apt-get -qq update >&2 || die "apt-get update failed; check /etc/apt and the network"
    APT_FRESH=1
  fi
  apt-cache policy "$1" | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

# locked NAME: the rest of the calling (sub)shell runs with this cache entry locked.
locked() {
  mkdir -p "$CACHE/locks"
  exec {LOCK_FD}>"$CACHE/locks/${1//\//-}"
  flock -n "$LOCK_FD" || { log "waiting for another run that prepares $1"; flock "$LOCK_FD"; }
}
