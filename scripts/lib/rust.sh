# The Rust toolchain: the one on PATH when it is new enough, else Debian's.
# Needs common.sh.
# shellcheck shell=bash

RUST_NEEDED=1.95

rust_new_enough() {
  local v
  v=$(cargo --version 2>/dev/null | awk '{ print $2 }') && [[ $v ]] &&
    [[ $(printf '%s\n' "$RUST_NEEDED" "$v" | sort -V | head -n 1) == "$RUST_NEEDED" ]]
}

need_rust() {
  need_packages gcc libc6-dev make pkg-config libseccomp-dev libelf-dev zlib1g-dev ca-certificates
  rust_new_enough && return
  # Debian 12 keeps a current toolchain beside its old one, for its browsers.
  if [[ $(candidate cargo-web) ]]; then
    need_packages rustc-web cargo-web
  fi
  rust_new_enough || die "cargo $RUST_NEEDED or newer is needed (found: $(cargo --version 2>/dev/null || echo none)); install Debian's cargo-web and rustc-web, or rustup"
}

need_rust_lints() {
  cargo fmt --version >/dev/null 2>&1 || need_packages rustfmt-web
  cargo clippy --version >/dev/null 2>&1 || need_packages rust-web-clippy
}

# test_programs CARGO-ARGUMENT…: builds tests and prints the programs, one a line
# as "NAME PATH".
test_programs() {
  cargo test --locked --no-run --message-format=json-render-diagnostics "$@" |
    python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m.get("profile", {}).get("test"):
        print(m["package_id"].split("#")[0].rsplit("/", 1)[-1] + ":" + m["target"]["name"], m["executable"])'
}
