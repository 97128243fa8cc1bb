//! `startContainer` hooks, which run in the container just before its program.

use super::error::{Context, Error, Result};
use oci_spec::runtime::Hook;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Runs one hook to its end; it gets the container's state on stdin.
pub fn run(hook: &Hook, container: &str) -> Result<()> {
    let shown = hook.path().display();
    let doing = || format!("run the hook {shown}");
    if hook.timeout().is_some() {
        return Err(Error::unsupported(
            "hooks.startContainer.timeout",
            "the hook would have to be watched from outside",
        ));
    }
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
    let status = child.wait().doing(doing)?;
    if status.success() {
        return Ok(());
    }
    Err(Error::invalid("hooks.startContainer", format!("{shown} ended with {status}")))
}
