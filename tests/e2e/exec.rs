//! `ctr task exec`.

use std::process::Stdio;
use std::time::SystemTime;

use crate::fixture::{host, stderr, stdout, succeeded};

#[test]
fn runs_beside_the_init_and_keeps_its_exit_code() {
    let host = host();
    {
        let container = host.background(&[]);
        assert!(succeeded(&container.exec("a", &["ps"])).contains("sleep 10000"));
        assert_eq!(container.exec("b", &["sh", "-c", "exit 42"]).status.code(), Some(42));
        assert_eq!(container.exec("c", &["sh", "-c", "kill -9 $$"]).status.code(), Some(137));
        assert_eq!(container.status(), "RUNNING");
    }
    host.assert_nothing_left();
}

#[test]
fn twenty_at_once_each_get_their_own_output() {
    let host = host();
    {
        let container = host.background(&[]);
        let children: Vec<_> = (0..20)
            .map(|number| {
                let (exec, line) = (format!("e{number}"), format!("echo {number}; sleep 1; exit {number}"));
                let arguments = ["task", "exec", "--exec-id", &exec, &container.id, "sh", "-c", &line];
                let mut command = host.ctr(arguments);
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for (number, child) in children.into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            let code = i32::try_from(number).unwrap();
            let seen = (stdout(&output), output.status.code());
            assert_eq!(seen, (format!("{number}\n"), Some(code)), "{}", stderr(&output));
        }
    }
    host.assert_nothing_left();
}

#[test]
fn a_missing_program_fails_with_its_name() {
    let host = host();
    let container = host.background(&[]);
    let output = container.exec("x", &["no-such-program"]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("no-such-program"), "{}", stderr(&output));
    assert_eq!(stdout(&container.exec("y", &["echo", "still here"])), "still here\n");
}

#[test]
fn a_background_child_that_keeps_stdout_does_not_hold_the_exit_back() {
    let host = host();
    let container = host.background(&[]);
    // ctr itself waits for the end of its output, so the child lets go of it after a while.
    let output = container.exec("bg", &["sh", "-c", "sleep 2 & echo parent; exit 5"]);
    assert_eq!((stdout(&output), output.status.code()), ("parent\n".into(), Some(5)));
}

#[test]
fn the_time_of_day_is_the_hosts() {
    let host = host();
    let container = host.background(&[]);
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let before = now();
    let seen: u64 = succeeded(&container.exec("x", &["date", "+%s"])).trim().parse().unwrap();
    // The guest's clock may be a little off while it is made to catch up.
    assert!((before - 1..=now() + 1).contains(&seen), "{seen} is not from {before} to {}", now());
}
