# Packages of other Debian suites, without touching this machine's apt
# configuration: the mirror is the one already configured, lists and package
# cache are our own. Needs common.sh.
# shellcheck shell=bash

# The configured Debian entries as "URI suite component", mirror first.
debian_entries() {
  apt_lists
  apt-get indextargets --format '$(ORIGIN) $(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)' |
    awk '$1 == "Debian" && $2 == "Packages" { print $3, $4, $5 }' | sort -u
}

# suite_apt SUITE TOOL ARG...: apt-get or apt-cache that also sees SUITE.
suite_apt() {
  local suite=$1 tool=$2 dir=$CACHE/apt/$1 mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg opt=''
  shift 2
  local apt=("$tool" -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache" -o APT::Sandbox::User=root
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
    -o APT::Install-Recommends=0 -o Dpkg::Use-Pty=0)
  if [[ ! -e $dir/ready || $(find "$dir/ready" -mmin +1440) ]]; then
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    mirror=$(debian_entries | awk '$2 !~ /security|updates|backports/ && !m { m = $1 } END { print m }')
    [[ $mirror ]] || die "no Debian archive in this machine's apt configuration"
    [[ -e $keyring ]] && opt="[signed-by=$keyring] "
    { debian_entries; echo "$mirror $suite main"; } | sort -u | sed "s|^|deb $opt|" >"$dir/sources.list"
    log "reading the package lists of $suite"
    "${apt[@]/#apt-cache/apt-get}" -qq update >&2 || return 1
    touch "$dir/ready"
  fi
  DEBIAN_FRONTEND=noninteractive "${apt[@]}" "$@"
}

# unpack_debs SUITE DIR PACKAGE…: the packages as SUITE has them, unpacked into DIR.
unpack_debs() {
  local suite=$1 dir=$2 tmp deb
  shift 2
  tmp=$(mktemp -d)
  # A stale list names files the mirror no longer has: refresh and try again.
  (cd "$tmp" && suite_apt "$suite" apt-get -qq download "${@/%//$suite}" >&2) ||
    { rm -f "$CACHE/apt/$suite/ready" && (cd "$tmp" && suite_apt "$suite" apt-get -qq download "${@/%//$suite}" >&2); } ||
    { rm -rf "$tmp"; die "could not download from $suite: $*"; }
  mkdir -p "$dir"
  for deb in "$tmp"/*.deb; do
    dpkg-deb -x "$deb" "$dir"
  done
  rm -rf "$tmp"
}
