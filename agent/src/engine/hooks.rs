//! `startContainer` hooks, which run in the container just before its program.

use super::error::{Context, Error, Result};
use crate::sys::check_fd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::Hook;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Runs one hook to its end; it gets the container's state on stdin.
pub fn run(hook: &Hook, container: &str) -> Result<()> {
    let shown = hook.path().display();
    let doing = || format!("run the hook {shown}");
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(arguments);
    }
    command.env_clear().stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    for (name, value) in hook.env().iter().flatten().filter_map(|entry| entry.split_once('=')) {
        command.env(name, value);
    }
    let mut child = command.spawn().doing(doing)?;
    let state = serde_json::json!({
        "ociVersion": "1.2.0", "id": container, "status": "created", "pid": std::process::id(), "bundle": "/"
    });
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read its input.
        let _ = stdin.write_all(state.to_string().as_bytes());
    }
    if let Some(seconds) = hook.timeout()
        && !ends_within(&child, Duration::from_secs(u64::try_from(seconds).unwrap_or(0))).doing(doing)?
    {
        child.kill().and_then(|()| child.wait()).doing(doing)?;
        return Err(Error::TimedOut(format!("hooks.startContainer: {shown} did not end within {seconds} s")));
    }
    let status = child.wait().doing(doing)?;
    if status.success() {
        return Ok(());
    }
    Err(Error::invalid("hooks.startContainer", format!("{shown} ended with {status}")))
}

fn ends_within(child: &Child, limit: Duration) -> io::Result<bool> {
    // SAFETY: plain integers; the child is not reaped, so its id is its own.
    let process = check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) })?;
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout)? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(line: &str, timeout: &str) -> Hook {
        let text = format!(r#"{{"path":"/bin/sh","args":["sh","-c","{line}"]{timeout}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_hook_that_takes_too_long_is_named() {
        let said = run(&hook("sleep 60", r#","timeout":1"#), "c").unwrap_err().to_string();
        assert_eq!(said, "hooks.startContainer: /bin/sh did not end within 1 s");
        run(&hook("grep -q created", r#","timeout":60"#), "c").unwrap();
        assert!(run(&hook("exit 3", ""), "c").unwrap_err().to_string().contains("exit status: 3"));
    }
}
