//! What the shim does, as far as the agent can tell.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};
use vmshim_agent::boot::Readiness;
use vmshim_agent::containers::{Containers, Places};
use vmshim_agent::events::Events;
use vmshim_agent::link::{Dialer, Stream};
use vmshim_agent::reaper::Reaper;
use vmshim_agent::server::{self, Service};
use vmshim_protocol::agent::event::Event as Happened;
use vmshim_protocol::agent::{
    AgentClient, ContainerRequest, CreateContainerRequest, Empty, ExecProcessRequest, ProcessRequest,
    RootFilesystem, SignalProcessRequest, Stdio, root_filesystem::Source,
};

/// The streams that the agent dials, by port: each end is there for who comes first.
#[derive(Default, Clone)]
struct Ports(Arc<Mutex<HashMap<u32, Ends>>>);

struct Ends {
    host: Option<StdStream>,
    guest: Option<StdStream>,
}

impl Ports {
    fn take(&self, port: u32, end: impl FnOnce(&mut Ends) -> Option<StdStream>) -> Option<StdStream> {
        let mut ports = self.0.lock().unwrap();
        end(ports.entry(port).or_insert_with(|| {
            let (host, guest) = StdStream::pair().unwrap();
            host.set_nonblocking(true).unwrap();
            guest.set_nonblocking(true).unwrap();
            Ends { host: Some(host), guest: Some(guest) }
        }))
    }
}

#[async_trait::async_trait]
impl Dialer for Ports {
    async fn dial(&self, port: u32) -> io::Result<Stream> {
        let guest = self.take(port, |ends| ends.guest.take()).expect("a port is dialled once");
        Stream::new(OwnedFd::from(guest))
    }
}

/// The shim, with one agent.
pub struct Shim {
    pub agent: AgentClient,
    pub events: mpsc::UnboundedReceiver<Happened>,
    ports: Ports,
    next_port: AtomicU32,
    pub directory: PathBuf,
    pub cgroups: PathBuf,
}

/// The host's ends of a process's streams.
pub struct Streams {
    pub stdin: Option<UnixStream>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
}

pub fn soon() -> Context {
    context::with_duration(Duration::from_secs(20))
}

/// What a case makes must not be seen outside, nor stay.
pub fn separate_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

fn cgroup_root() -> PathBuf {
    let unified = Path::new("/sys/fs/cgroup/unified");
    if unified.join("cgroup.procs").exists() { unified.to_owned() } else { "/sys/fs/cgroup".into() }
}

impl Shim {
    pub async fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("vmshim-agent-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        mount(Some("tmpfs"), &directory, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::create_dir_all(directory.join("containers")).unwrap();
        fs::create_dir_all(directory.join("shared/rootfs")).unwrap();
        let root = cgroup_root();
        let cgroups = root.join(format!("vmshim-{}-{number}", std::process::id()));
        // Where the machine keeps processes in the root's children this fails, and cases without limits still run.
        let _ = vmshim_agent::cgroup::delegate(&root);
        fs::create_dir(&cgroups).unwrap();
        let _ = vmshim_agent::cgroup::delegate(&cgroups);

        let reaper = Arc::new(Reaper::default());
        let ports = Ports::default();
        let places = Places {
            engine: PathBuf::from(env!("CARGO_BIN_EXE_vmshim-agent")),
            containers: directory.join("containers"),
            cgroups: cgroups.clone(),
            shared: directory.join("shared"),
        };
        let containers = Arc::new(Containers::new(
            places,
            reaper.clone(),
            Arc::new(Events::default()),
            Box::new(ports.clone()),
        ));
        let (server, connections) =
            server::serve(Service::new(containers, Readiness::complete())).await.unwrap();
        tokio::spawn(async move { reaper.run().await });
        let (ours, theirs) = StdStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        drop(connections.add(Stream::new(theirs.into()).unwrap()));
        let agent =
            AgentClient::new(ttrpc::r#async::Client::new(Socket::new(UnixStream::from_std(ours).unwrap())));
        let (sender, events) = mpsc::unbounded_channel();
        let listener = agent.clone();
        tokio::spawn(async move {
            // The server goes with its last task.
            let _server = server;
            let mut stream = listener.events(context::Context::default(), &Empty::new()).await.unwrap();
            while let Ok(Some(event)) = stream.recv().await {
                if sender.send(event.event.unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { agent, events, ports, next_port: AtomicU32::new(100), directory, cgroups }
    }

    /// A root file system with busybox in it.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        let root = self.directory.join("shared/rootfs").join(id);
        for directory in ["bin", "proc", "dev", "sys", "etc", "tmp"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for name in [
            "sh",
            "echo",
            "cat",
            "sleep",
            "true",
            "false",
            "id",
            "ls",
            "env",
            "pwd",
            "mknod",
            "dd",
            "mount",
            "umount",
            "stat",
            "touch",
            "readlink",
            "hostname",
            "stty",
            "tty",
            "kill",
            "head",
            "wc",
            "grep",
            "ulimit",
            "chmod",
            "mkdir",
            "sysctl",
            "setsid",
            "yes",
            "sha256sum",
            "unshare",
            "test",
            "rm",
            "ps",
            "nproc",
            "tail",
        ] {
            let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(name));
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        root
    }

    /// Streams for all three, or for a terminal.
    pub fn stdio(&self, terminal: bool) -> Stdio {
        let port = || self.next_port.fetch_add(1, Ordering::Relaxed);
        if terminal {
            return Stdio { stdout: port(), terminal, width: 80, height: 24, ..Default::default() };
        }
        Stdio { stdin: port(), stdout: port(), stderr: port(), ..Default::default() }
    }

    /// The host's ends of streams that the agent has dialled, or will.
    pub fn streams(&self, stdio: &Stdio) -> Streams {
        let take = |port| {
            let stream = if port == 0 { None } else { self.ports.take(port, |ends| ends.host.take()) };
            stream.map(|stream| UnixStream::from_std(stream).unwrap())
        };
        Streams { stdin: take(stdio.stdin), stdout: take(stdio.stdout), stderr: take(stdio.stderr) }
    }

    /// Makes a container with a spec.
    pub async fn create(&self, id: &str, spec: &Value, terminal: bool) -> ttrpc::Result<Streams> {
        self.rootfs(id);
        let stdio = self.stdio(terminal);
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: serde_json::to_vec(spec).unwrap(),
            rootfs: Some(RootFilesystem {
                source: Some(Source::Shared(format!("rootfs/{id}"))),
                ..Default::default()
            })
            .into(),
            stdio: Some(stdio.clone()).into(),
            ..Default::default()
        };
        self.agent.create_container(soon(), &request).await?;
        Ok(self.streams(&stdio))
    }

    /// Adds a process.
    pub async fn exec(&self, id: &str, exec_id: &str, process: &Value) -> ttrpc::Result<Streams> {
        let terminal = process["terminal"].as_bool().unwrap_or(false);
        let stdio = self.stdio(terminal);
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio.clone()).into(),
            ..Default::default()
        };
        self.agent.exec_process(soon(), &request).await?;
        Ok(self.streams(&stdio))
    }

    pub async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request =
            ProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.agent.start_process(soon(), &request).await.map(|created| created.pid)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        let request =
            ProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.agent.delete_process(soon(), &request).await.map(drop)
    }

    pub async fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            all,
            ..Default::default()
        };
        self.agent.signal_process(soon(), &request).await.map(drop)
    }

    pub fn container(&self, id: &str) -> ContainerRequest {
        ContainerRequest { container_id: id.into(), ..Default::default() }
    }

    /// Waits for the exit of a process, which must be the next event.
    pub async fn exit(&mut self, id: &str, exec_id: &str) -> u32 {
        match self.events.recv().await.unwrap() {
            Happened::Exited(exited) => {
                assert_eq!((exited.container_id.as_str(), exited.exec_id.as_str()), (id, exec_id));
                exited.status
            }
            other => panic!("unexpected event {other:?}"),
        }
    }

    /// Runs a shell script in a container to its end: status, stdout and stderr.
    pub async fn sh(&mut self, spec: &Value) -> (u32, String, String) {
        let streams = self.create("c", spec, false).await.unwrap();
        self.start("c", "").await.unwrap();
        drop(streams.stdin);
        let out = read(streams.stdout).await;
        let err = read(streams.stderr).await;
        let status = self.exit("c", "").await;
        self.delete("c", "").await.unwrap();
        (status, out, err)
    }

    pub fn leftovers(&self) -> Leftovers {
        Leftovers { directory: self.directory.clone(), cgroups: self.cgroups.clone() }
    }

    /// Nothing is left of a container that has failed.
    pub fn leftovers_now(&self) {
        assert!(fs::read_dir(self.directory.join("containers")).unwrap().next().is_none());
        assert!(
            fs::read_dir(&self.cgroups).unwrap().flatten().all(|entry| entry.file_type().unwrap().is_file())
        );
    }

    /// Whether containers here can be limited.
    pub fn has_controllers(&self) -> bool {
        fs::read_to_string(self.cgroups.join("cgroup.subtree_control"))
            .is_ok_and(|text| text.contains("memory"))
    }
}

/// What a case must not leave behind.
pub struct Leftovers {
    directory: PathBuf,
    cgroups: PathBuf,
}

impl Leftovers {
    pub fn assert_nothing(&self) {
        let containers: Vec<_> = fs::read_dir(self.directory.join("containers")).unwrap().collect();
        assert!(containers.is_empty(), "left: {containers:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let place = self.directory.join("containers");
        assert!(!mounts.contains(place.to_str().unwrap()), "mounts left");
        fs::remove_dir(&self.cgroups).expect("a cgroup is left");
        nix::mount::umount2(&self.directory, nix::mount::MntFlags::MNT_DETACH).unwrap();
        fs::remove_dir(&self.directory).unwrap();
    }
}

/// Everything until the end of a stream.
pub async fn read(stream: Option<UnixStream>) -> String {
    let mut text = Vec::new();
    stream.unwrap().read_to_end(&mut text).await.unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// Reads a terminal until a text has come.
pub async fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut text = String::new();
    let mut bytes = [0; 4096];
    while !text.contains(wanted) {
        let length = stream.read(&mut bytes).await.unwrap();
        assert!(length > 0, "the terminal has closed after {text:?}");
        text.push_str(&String::from_utf8_lossy(&bytes[..length]));
    }
    text
}

/// Writes and goes on.
pub async fn write(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}

/// A process object.
pub fn process(args: &[&str]) -> Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    json!({
        "user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/",
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": true
    })
}

/// A spec as containerd's default one.
pub fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0", "process": process(args), "root": {"path": "rootfs"}, "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// A spec that runs a shell script.
pub fn script(text: &str) -> Value {
    spec(&["/bin/sh", "-c", text])
}
