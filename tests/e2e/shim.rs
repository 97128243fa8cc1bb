//! The shim called as containerd calls it, for what `ctr` can't be made to send.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Mount, ShutdownRequest, StartRequest, StateRequest, WaitRequest,
};
use containerd_shim_protos::shim_sync::TaskClient;
use serde_json::Value;
use ttrpc::context::{self, Context};

use crate::fixture::{BUSYBOX, Host, directory, host};

/// The program under test, where `scripts/install` puts it.
pub const SHIM: &str = "/usr/local/bin/containerd-shim-vmshim-v2";

/// A copy of busybox's file tree on the host.
pub fn tree(host: &Host) -> &'static Path {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let scratch = directory("VMSHIM_TEST_DIR");
        let (mount, tree) = (scratch.join("mount"), scratch.join("tree"));
        fs::create_dir_all(&mount).unwrap();
        let place = mount.to_str().unwrap();
        host.ctr_ok(["image", "mount", BUSYBOX, place]).unwrap();
        let copied = Command::new("cp").arg("-a").args([&mount, &tree]).status().unwrap();
        host.ctr_ok(["image", "unmount", "--rm", place]).unwrap();
        assert!(copied.success());
        tree
    })
}

/// The spec `ctr` would make, for a command in the copied tree.
pub fn spec(host: &Host, command: &[&str]) -> Value {
    let mut spec: Value = serde_json::from_str(&host.ctr_ok(["oci", "spec"]).unwrap()).unwrap();
    spec["process"]["args"] = serde_json::json!(command);
    spec["process"]["terminal"] = false.into();
    spec["root"] = serde_json::json!({ "path": tree(host) });
    spec
}

/// `ctr run` of a spec of one's own.
pub fn spec_run(host: &Host, command: &[&str], change: impl FnOnce(&mut Value)) -> Output {
    let mut spec = spec(host, command);
    change(&mut spec);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(spec.to_string().as_bytes()).unwrap();
    let (config, id) = (file.path().to_str().unwrap().to_owned(), host.id());
    let runtime = vmshim_tests::containerd::VMSHIM;
    let arguments = ["run", "--rm", "--runtime", runtime, "--config", &config, &id];
    host.ctr(arguments).stdin(Stdio::null()).output().unwrap()
}

/// A shim started by hand over a bundle.
pub struct Direct {
    bundle: tempfile::TempDir,
    /// The container's id.
    pub id: String,
    /// The Task service.
    pub client: TaskClient,
}

impl Direct {
    /// Starts a shim in a bundle whose `config.json` is `config`, or missing.
    pub fn start(host: &Host, config: Option<&str>) -> Self {
        let bundle = tempfile::tempdir_in(directory("VMSHIM_TEST_DIR")).unwrap();
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        nix::unistd::mkfifo(&bundle.path().join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        if let Some(config) = config {
            fs::write(bundle.path().join("config.json"), config).unwrap();
        }
        let id = host.id();
        let output = program(host, &id, bundle.path(), "start");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let address = String::from_utf8(output.stdout).unwrap();
        let client = TaskClient::new(ttrpc::Client::connect(address.trim()).unwrap());
        Self { bundle, id, client }
    }

    /// Create with the given root file system mounts.
    pub fn create(&self, rootfs: Vec<Mount>) -> Result<u32, ttrpc::Error> {
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.path().to_str().unwrap().to_owned(),
            rootfs,
            ..Default::default()
        };
        Ok(self.client.create(minute(), &request)?.pid)
    }

    /// A whole life of the container, its output to an address; the exit status.
    pub fn run(&self, rootfs: Vec<Mount>, stdout: &str) -> Result<u32, ttrpc::Error> {
        let id = self.id.clone();
        let request = CreateTaskRequest {
            id: id.clone(),
            bundle: self.bundle.path().to_str().unwrap().to_owned(),
            rootfs,
            stdout: stdout.to_owned(),
            stderr: stdout.to_owned(),
            ..Default::default()
        };
        self.client.create(minute(), &request)?;
        self.client.start(minute(), &StartRequest { id: id.clone(), ..Default::default() })?;
        let exit = self.client.wait(minute(), &WaitRequest { id: id.clone(), ..Default::default() })?;
        self.client.delete(minute(), &DeleteRequest { id, ..Default::default() })?;
        Ok(exit.exit_status)
    }

    /// The calls with which containerd follows a Create that failed, and the end of the shim.
    pub fn give_up(self, host: &Host) {
        let _ = self.client.delete(minute(), &DeleteRequest { id: self.id.clone(), ..Default::default() });
        let shutdown = ShutdownRequest { id: self.id.clone(), ..Default::default() };
        let _ = self.client.shutdown(minute(), &shutdown);
        let output = program(host, &self.id, self.bundle.path(), "delete");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// State, as containerd asks for it.
    pub fn state(&self) -> Result<(), ttrpc::Error> {
        self.client.state(minute(), &StateRequest { id: self.id.clone(), ..Default::default() }).map(|_| ())
    }
}

fn program(host: &Host, id: &str, bundle: &Path, action: &str) -> Output {
    let mut command = Command::new(SHIM);
    command
        .current_dir(bundle)
        .args(["-namespace", "direct", "-publish-binary", "/bin/true", "-id", id, "-address"])
        .arg(host.address())
        .env("TTRPC_ADDRESS", host.address().with_extension("sock.ttrpc"))
        .stdin(Stdio::null());
    if action == "delete" {
        command.arg("-bundle").arg(bundle);
    }
    command.arg(action).output().unwrap()
}

/// How long a call may take.
pub fn minute() -> Context {
    context::with_duration(std::time::Duration::from_secs(60))
}

/// The code and text of a refusal.
pub fn refusal<T: std::fmt::Debug>(result: Result<T, ttrpc::Error>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

#[test]
fn version_and_info_answer_without_containerd() {
    let version = Command::new(SHIM).arg("-v").output().unwrap();
    assert!(String::from_utf8_lossy(&version.stdout).contains(env!("CARGO_PKG_VERSION")));
    let info = Command::new(SHIM).arg("-info").stdin(Stdio::null()).output().unwrap();
    assert!(info.status.success() && !info.stdout.is_empty());
}

#[test]
fn an_unknown_container_is_not_found() {
    let host = host();
    let shim = Direct::start(&host, Some("{}"));
    assert_eq!(refusal(shim.state()).0, ttrpc::Code::NOT_FOUND);
    shim.give_up(&host);
    host.assert_nothing_left();
}
