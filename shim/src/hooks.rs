//! Hooks of the OCI runtime spec that run on the host: programs of the administrator's, told of a container's state.
//!
//! They are trusted, and they may hang: each runs on a thread that may wait, with a limit, and is killed after it. A
//! `startContainer` hook lies in the container and is the guest's; a `createContainer` hook would need the host's files
//! and the guest's namespaces at once, which nothing has.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::oci::SpecError;
use crate::state::{ProcessId, wait_gone};

/// How long a hook without a limit of its own may take.
const DEFAULT_LIMIT: Duration = Duration::from_secs(30);

/// Bytes kept of what a failed hook has written.
const MOST_OUTPUT: usize = 512;

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("the {kind} hook {} cannot be run: {source}", path.display())]
    Run {
        /// Which of the spec's lists it is in.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It failed.
    #[error("the {kind} hook {} failed: {ending}", path.display())]
    Failed {
        /// Which of the spec's lists it is in.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// How it ended, and what it said.
        ending: String,
    },
    /// It took too long.
    #[error("the {kind} hook {} did not end within {} s", path.display(), limit.as_secs())]
    TimedOut {
        /// Which of the spec's lists it is in.
        kind: &'static str,
        /// The program.
        path: PathBuf,
        /// What it had.
        limit: Duration,
    },
}

/// One hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    path: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    args: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    env: Option<Vec<String>>,
    /// Seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timeout: Option<i64>,
}

/// The spec's lists that are the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Run when the container is made, before `create_runtime`.
    pub prestart: Vec<Hook>,
    /// Run when the container is made.
    pub create_runtime: Vec<Hook>,
    /// Run when its program has been started.
    pub poststart: Vec<Hook>,
    /// Run when it has been deleted.
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// Takes the host's hooks out of the spec's object, and leaves the guest's there.
    ///
    /// # Errors
    /// A list that is malformed, or cannot be honoured, is named.
    pub fn take(object: &mut Option<Value>) -> Result<Self, SpecError> {
        let Some(value) = object.take() else { return Ok(Self::default()) };
        let lists: BTreeMap<String, Option<Vec<Hook>>> = serde_json::from_value(value).map_err(|error| {
            SpecError::Field { field: "hooks", problem: format!("is malformed: {error}") }
        })?;
        let mut hooks = Self::default();
        for (name, list) in lists {
            let list = list.unwrap_or_default();
            list.iter().try_for_each(|hook| hook.check())?;
            match name.as_str() {
                _ if list.is_empty() => {}
                "prestart" => hooks.prestart = list,
                "createRuntime" => hooks.create_runtime = list,
                "poststart" => hooks.poststart = list,
                "poststop" => hooks.poststop = list,
                "startContainer" => *object = Some(serde_json::json!({ "startContainer": list })),
                "createContainer" => {
                    let problem = "cannot be run: its program lies on the host, the container's namespaces are in \
                                   the VM; use createRuntime or startContainer";
                    return Err(SpecError::Field {
                        field: "hooks.createContainer",
                        problem: problem.to_owned(),
                    });
                }
                _ => {
                    let problem = format!("has a list {name:?} that this runtime does not know");
                    return Err(SpecError::Field { field: "hooks", problem });
                }
            }
        }
        Ok(hooks)
    }
}

impl Hook {
    fn check(&self) -> Result<(), SpecError> {
        let refused = |problem: String| Err(SpecError::Field { field: "hooks", problem });
        if !self.path.is_absolute() {
            return refused(format!("has the path {}, which is not absolute", self.path.display()));
        }
        match self.timeout {
            Some(seconds) if seconds <= 0 => {
                refused(format!("has the timeout {seconds}, which is not above 0"))
            }
            _ => Ok(()),
        }
    }

    fn limit(&self) -> Duration {
        let own = self.timeout.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
        own.unwrap_or(DEFAULT_LIMIT)
    }
}

/// What a hook is told of its container.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Of the spec.
    pub oci_version: &'static str,
    /// The container.
    pub id: String,
    /// As the spec calls it.
    pub status: &'static str,
    /// The host's process that stands for the container; none when it is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The spec's annotations.
    pub annotations: BTreeMap<String, String>,
}

/// The version of [`State`].
pub const STATE_VERSION: &str = "1.2.0";

/// Runs hooks in turn, up to the first that fails. `wait` collects the exit status of a child that has ended.
///
/// # Errors
/// The hook that failed is named.
pub fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &State,
    end: Instant,
    wait: impl Fn(&mut Child) -> io::Result<ExitStatus>,
) -> Result<(), HookError> {
    hooks.iter().try_for_each(|hook| run_one(kind, hook, state, end, &wait))
}

fn run_one(
    kind: &'static str,
    hook: &Hook,
    state: &State,
    end: Instant,
    wait: impl Fn(&mut Child) -> io::Result<ExitStatus>,
) -> Result<(), HookError> {
    let path = hook.path.clone();
    let limit = hook.limit().min(end.saturating_duration_since(Instant::now()));
    match execute(hook, state, limit, wait) {
        Ok(Some((status, _))) if status.success() => Ok(()),
        Ok(Some((status, output))) => Err(HookError::Failed { kind, path, ending: ending(status, &output) }),
        Ok(None) => Err(HookError::TimedOut { kind, path, limit }),
        Err(source) => Err(HookError::Run { kind, path, source }),
    }
}

/// The exit status with the output; none when it took too long.
fn execute(
    hook: &Hook,
    state: &State,
    limit: Duration,
    wait: impl Fn(&mut Child) -> io::Result<ExitStatus>,
) -> io::Result<Option<(ExitStatus, String)>> {
    let state = memory_file(&serde_json::to_vec(state)?)?;
    let output = memory_file(&[])?;
    let mut command = Command::new(&hook.path);
    if let Some((name, args)) = hook.args.as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(args);
    }
    command.env_clear().stdin(state).stdout(output.try_clone()?).stderr(output.try_clone()?);
    command.envs(hook.env.iter().flatten().filter_map(|entry| entry.split_once('=')));
    command.process_group(0);
    let mut child = command.spawn()?;
    // A child that was reaped already has ended.
    let process = ProcessId::of(child.id()).and_then(|id| id.open()).unwrap_or_default();
    let in_time = process.map_or(Ok(true), |process| wait_gone(&process, limit))?;
    if !in_time {
        kill_group(&child);
    }
    let status = wait(&mut child)?;
    Ok(in_time.then(|| (status, first_words(output))))
}

/// A hook that hangs may hang in a child of its own.
fn kill_group(child: &Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // The group is the hook's, and the child is not reaped before `wait`.
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
    }
}

fn memory_file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"hook", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

fn first_words(mut output: File) -> String {
    let mut bytes = Vec::new();
    let limit = u64::try_from(MOST_OUTPUT).unwrap_or(u64::MAX);
    // What cannot be read is left out: it only adds to the status.
    let _ = output.seek(SeekFrom::Start(0)).and_then(|_| output.take(limit).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn ending(status: ExitStatus, output: &str) -> String {
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    };
    if output.is_empty() { how } else { format!("{how} ({output})") }
}

/// Runs a deleted container's last hooks. They cannot undo the deletion, so a failure is only told.
pub fn run_poststop(
    hooks: &[Hook],
    state: &State,
    end: Instant,
    wait: impl Fn(&mut Child) -> io::Result<ExitStatus>,
) {
    for hook in hooks {
        if let Err(error) = run_one("poststop", hook, state, end, &wait) {
            log::warn!("{error}");
        }
    }
}

/// Runs the last hooks of a container whose shim is gone, as its bundle has them.
///
/// # Errors
/// When the bundle cannot be read.
pub fn run_left_poststop(id: &str, bundle: &Path) -> io::Result<()> {
    let text = match std::fs::read(bundle.join("config.json")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let mut spec: Value = serde_json::from_slice(&text)?;
    let mut object = spec.get_mut("hooks").map(Value::take);
    let hooks = Hooks::take(&mut object).map_err(io::Error::other)?;
    let annotations = spec.get_mut("annotations").map(Value::take).unwrap_or_default();
    let state = State {
        oci_version: STATE_VERSION,
        id: id.to_owned(),
        status: "stopped",
        pid: None,
        bundle: bundle.to_owned(),
        annotations: serde_json::from_value(annotations).unwrap_or_default(),
    };
    run_poststop(&hooks.poststop, &state, Instant::now() + DEFAULT_LIMIT, Child::wait);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state() -> State {
        State {
            oci_version: STATE_VERSION,
            id: "c1".to_owned(),
            status: "creating",
            pid: Some(7),
            bundle: "/b".into(),
            annotations: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        }
    }

    fn shell(line: &str, timeout: Option<i64>) -> Hook {
        let args = ["sh", "-c", line].map(str::to_owned).to_vec();
        Hook { path: "/bin/sh".into(), args: Some(args), env: Some(vec!["A=b=c".to_owned()]), timeout }
    }

    fn run_shell(line: &str, timeout: Option<i64>) -> Result<(), HookError> {
        let end = Instant::now() + Duration::from_secs(20);
        run("createRuntime", &[shell(line, timeout)], &state(), end, Child::wait)
    }

    #[test]
    fn a_hook_reads_the_state_and_has_its_environment_only() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("out");
        run_shell(&format!("{{ cat; echo; echo $A; }} > {}", file.display()), None).unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        let (state, rest) = text.split_once('\n').unwrap();
        let expected = json!({
            "ociVersion": "1.2.0", "id": "c1", "status": "creating", "pid": 7, "bundle": "/b",
            "annotations": { "k": "v" },
        });
        assert_eq!(serde_json::from_str::<Value>(state).unwrap(), expected);
        assert_eq!(rest, "b=c\n");
    }

    #[test]
    fn failures_name_the_hook() {
        let said = run_shell("echo no such net >&2; exit 3", None).unwrap_err().to_string();
        assert_eq!(said, "the createRuntime hook /bin/sh failed: exit code 3 (no such net)");
        let said = run_shell("sleep 60 & wait", Some(1)).unwrap_err().to_string();
        assert_eq!(said, "the createRuntime hook /bin/sh did not end within 1 s");
        let missing = Hook { path: "/nonexistent".into(), ..shell("", None) };
        let said =
            run("prestart", &[missing], &state(), Instant::now(), Child::wait).unwrap_err().to_string();
        assert!(said.starts_with("the prestart hook /nonexistent cannot be run"), "{said}");
    }

    #[test]
    fn the_guests_hooks_stay_and_the_hosts_are_taken() {
        let hook = json!({ "path": "/h", "args": ["h", "x"], "timeout": 5 });
        let mut object = Some(json!({
            "createRuntime": [hook], "poststop": [hook], "startContainer": [hook], "prestart": null,
        }));
        let hooks = Hooks::take(&mut object).unwrap();
        assert_eq!((hooks.create_runtime.len(), hooks.poststop.len(), hooks.prestart.len()), (1, 1, 0));
        assert_eq!(object, Some(json!({ "startContainer": [hook] })));
        assert_eq!(Hooks::take(&mut None).unwrap(), Hooks::default());
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        let refused = |object: Value| Hooks::take(&mut Some(object)).unwrap_err().to_string();
        assert!(refused(json!({ "createContainer": [{ "path": "/h" }] })).contains("hooks.createContainer"));
        assert!(refused(json!({ "poststop": [{ "path": "h" }] })).contains("not absolute"));
        assert!(refused(json!({ "poststop": [{ "path": "/h", "timeout": 0 }] })).contains("timeout 0"));
        assert!(refused(json!({ "later": [{ "path": "/h" }] })).contains("\"later\""));
        assert!(refused(json!([1])).contains("hooks is malformed"));
    }

    #[test]
    fn a_left_containers_last_hooks_are_run_from_its_bundle() {
        let bundle = tempfile::tempdir().unwrap();
        run_left_poststop("c1", bundle.path()).unwrap();
        let mark = bundle.path().join("mark");
        let line = format!("cat > {}", mark.display());
        let spec = json!({ "hooks": { "poststop": [{ "path": "/bin/sh", "args": ["sh", "-c", line] }] } });
        std::fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        run_left_poststop("c1", bundle.path()).unwrap();
        assert!(std::fs::read_to_string(mark).unwrap().contains("\"status\":\"stopped\""));
    }
}
