//! Real programs of a whole distribution.

use std::process::Output;

use crate::fixture::{DEBIAN, Host, host, stderr, stdout, succeeded};

fn debian(host: &Host, line: &str) -> Output {
    host.import_debian();
    host.run(&[], DEBIAN, &["sh", "-ec", line])
}

#[test]
fn python_computes() {
    let host = host();
    let line = "python3 -c 'import math, hashlib; print(math.factorial(30)); \
                print(hashlib.sha256(b\"x\" * 1000000).hexdigest()[:16])'";
    let text = succeeded(&debian(&host, line));
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("265252859812191058636308480000000"));
    assert!(lines.next().is_some_and(|digest| digest.len() == 16));
    host.assert_nothing_left();
}

#[test]
fn dpkg_unpacks_and_removes_a_package_of_many_files() {
    let host = host();
    let line = "mkdir -p /tmp/p/DEBIAN /tmp/p/usr/share/many && \
                printf 'Package: many\\nVersion: 1\\nArchitecture: all\\nMaintainer: t <t@example.org>\\n\
                Description: files\\n' > /tmp/p/DEBIAN/control && \
                for i in $(seq 500); do echo $i > /tmp/p/usr/share/many/$i; done && \
                dpkg-deb --root-owner-group -b /tmp/p /tmp/many.deb > /dev/null && \
                dpkg -i /tmp/many.deb > /dev/null && ls /usr/share/many | wc -l && dpkg -V many && \
                dpkg -r many > /dev/null && ! test -e /usr/share/many";
    assert_eq!(succeeded(&debian(&host, line)), "500\n");
    host.assert_nothing_left();
}

#[test]
fn a_server_serves_a_client_in_the_same_container() {
    let host = host();
    let line = "redis-server --daemonize yes --save '' --logfile /dev/null > /dev/null; \
                until redis-cli ping > /dev/null 2>&1; do sleep 0.1; done; \
                redis-cli set key value; redis-cli get key; redis-cli shutdown nosave";
    let output = debian(&host, line);
    assert_eq!(stdout(&output), "OK\nvalue\n", "{}", stderr(&output));
    host.assert_nothing_left();
}

#[test]
fn a_compiler_builds_a_program_that_runs() {
    let host = host();
    let line = "printf '#include <stdio.h>\\nint main(void) { return printf(\"built\\\\n\") != 6; }\\n' > /tmp/a.c; \
                cc -o /tmp/a /tmp/a.c; /tmp/a";
    assert_eq!(succeeded(&debian(&host, line)), "built\n");
    host.assert_nothing_left();
}
