//! Hooks of the OCI runtime spec, which run on the host and in the container.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::fixture::{directory, host, stderr, succeeded};
use crate::shim::spec_run;

/// A hook that appends its name, whether the pid it is told lives, and the state it reads to a file.
fn noting(name: &str, file: &Path) -> Value {
    let line = format!(
        "read -r state; pid=$(echo \"$state\" | sed -n 's/.*\"pid\":\\([0-9]*\\).*/\\1/p'); \
         kill -0 \"${{pid:-none}}\" && alive=alive || alive=gone; echo \"{name} $alive $state\" >> {}",
        file.display()
    );
    json!([{ "path": "/bin/bash", "args": ["bash", "-c", line], "env": ["PATH=/usr/bin:/bin"] }])
}

#[test]
fn hooks_run_where_and_when_the_spec_says() {
    let host = host();
    let scratch = tempfile::tempdir_in(directory("VMSHIM_TEST_DIR")).unwrap();
    let notes = scratch.path().join("notes");
    let output = spec_run(&host, &["cat", "/from-a-hook"], |spec| {
        spec["hooks"] = json!({
            "prestart": noting("prestart", &notes),
            "createRuntime": noting("createRuntime", &notes),
            "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo inside > /from-a-hook"] }],
            "poststart": noting("poststart", &notes),
            "poststop": noting("poststop", &notes),
        });
        spec["root"]["readonly"] = false.into();
    });
    assert_eq!(succeeded(&output), "inside\n");
    let notes = fs::read_to_string(notes).unwrap();
    let found: Vec<(&str, &str, Value)> = notes
        .lines()
        .map(|line| {
            let (name, rest) = line.split_once(' ').unwrap();
            let (alive, state) = rest.split_once(' ').unwrap();
            (name, alive, serde_json::from_str(state).unwrap())
        })
        .collect();
    let order: Vec<_> = found.iter().map(|(name, _, state)| (*name, &state["status"])).collect();
    let (creating, running, stopped) = (json!("creating"), json!("running"), json!("stopped"));
    assert_eq!(
        order,
        [
            ("prestart", &creating),
            ("createRuntime", &creating),
            ("poststart", &running),
            ("poststop", &stopped)
        ]
    );
    // By the time of the third the program may have ended, and its VM with it.
    assert!(found.iter().take(2).all(|(_, alive, _)| *alive == "alive"));
    assert!(found.iter().all(|(.., state)| state["bundle"].is_string() && state["id"].is_string()));
    host.assert_nothing_left();
}

#[test]
fn a_failing_hook_fails_create_and_is_named() {
    let host = host();
    let scratch = tempfile::tempdir_in(directory("VMSHIM_TEST_DIR")).unwrap();
    let notes = scratch.path().join("notes");
    let output = spec_run(&host, &["true"], |spec| {
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo no such bridge >&2; exit 3"] });
        spec["hooks"] = json!({ "createRuntime": [hook], "poststop": noting("poststop", &notes) });
    });
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(said.contains("the createRuntime hook /bin/sh failed: exit code 3 (no such bridge)"), "{said}");
    assert!(fs::read_to_string(notes).unwrap().starts_with("poststop gone"));
    host.assert_nothing_left();
}
