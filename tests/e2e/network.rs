//! A pod in a network namespace, which is connected to another one where its peer lives.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use vmshim_tests::containerd::digest;

use crate::fixture::{BUSYBOX, Background, host, stderr, stdout, succeeded};
use crate::kill::{processes, wait_for};

/// What is sent in one piece: more than fits into any buffer on the way.
const MUCH: usize = 16 << 20;

/// The same where it is only to be shown that it arrives, since an emulated CPU takes half a minute for [`MUCH`].
pub const SOME: usize = 1 << 20;

const MAC: &str = "02:00:00:00:00:aa";
const DMZ_MAC: &str = "02:00:00:00:00:dd";

/// The networks of a pair, `N` for the host's number.
const NET_V4: &str = "10.9.0.N/24";
const NET_V6: &str = "fd00:9::N/64";

/// A kind of interface that both ends need.
const VLAN: &[&str] = &["vlan", "id", "5"];

/// Two network namespaces joined by an interface of the pod's, deleted when dropped.
pub struct Pair {
    pod: String,
    peer: String,
    /// The one in between, where the pod's interface is not the end of a cable itself.
    node: Option<String>,
    /// The peer's interface.
    far: &'static str,
}

impl Pair {
    /// With nothing in the pod's but the interface `eth0`, which is up.
    fn bare(name: &str) -> Self {
        let pair =
            Self { pod: format!("{name}-pod"), peer: format!("{name}-peer"), node: None, far: "veth0" };
        pair.make_namespaces();
        pair.cable("veth0", "eth0", &pair.pod);
        ip(&["-n", &pair.pod, "link", "set", "eth0", "address", MAC]);
        pair
    }

    /// As [`Pair::bare`], with an interface of a kind that stands on another one.
    fn over(name: &str, kind: &[&str]) -> Self {
        let node = format!("{name}-node");
        let far = if kind == VLAN { "vlan0" } else { "veth0" };
        let pair =
            Self { pod: format!("{name}-pod"), peer: format!("{name}-peer"), node: Some(node.clone()), far };
        pair.make_namespaces();
        pair.cable("veth0", "up0", &node);
        let link = ["-n", &node, "link", "add", "link", "up0", "name", "eth0", "netns", &pair.pod, "type"];
        ip(&[&link, kind].concat());
        ip(&["-n", &pair.pod, "link", "set", "eth0", "up"]);
        if kind == VLAN {
            let link = ["-n", &pair.peer, "link", "add", "link", "veth0", "name", far, "type"];
            ip(&[&link, kind].concat());
            ip(&["-n", &pair.peer, "link", "set", far, "up"]);
        }
        pair
    }

    fn namespaces(&self) -> impl Iterator<Item = &String> {
        [&self.pod, &self.peer].into_iter().chain(&self.node)
    }

    fn make_namespaces(&self) {
        for netns in self.namespaces() {
            ip(&["netns", "add", netns]);
            ip(&["-n", netns, "link", "set", "lo", "up"]);
        }
    }

    /// A cable from the peer to another namespace.
    fn cable(&self, near: &str, end: &str, netns: &str) {
        ip(&["-n", &self.peer, "link", "add", near, "type", "veth", "peer", "name", end, "netns", netns]);
        ip(&["-n", &self.peer, "link", "set", near, "mtu", "1400", "up"]);
        ip(&["-n", netns, "link", "set", end, "mtu", "1400", "up"]);
    }

    /// Gives both ends of a link an address in each network, of which only the host's number is missing.
    fn address(&self, far: &str, near: &str, networks: &[&str]) {
        for network in networks {
            for (netns, link, host) in [(&self.peer, far, "1"), (&self.pod, near, "2")] {
                let address = network.replace('N', host);
                let detection = if network.contains(':') { &["nodad"][..] } else { &[] };
                ip(&[&["-n", netns, "address", "add", &address, "dev", link], detection].concat());
            }
        }
    }

    /// With addresses, routes and a neighbour, as CNI makes them.
    pub fn new(name: &str) -> Self {
        let pair = Self::bare(name);
        pair.address("veth0", "eth0", &[NET_V4, NET_V6]);
        let pod = |arguments: &[&str]| ip(&[&["-n", pair.pod.as_str()], arguments].concat());
        pod(&["route", "add", "default", "via", "10.9.0.1"]);
        pod(&["route", "add", "192.0.2.0/24", "via", "10.77.0.1", "dev", "eth0", "onlink"]);
        pod(&["route", "add", "198.51.100.0/24", "dev", "eth0", "scope", "link"]);
        pod(&["-6", "route", "add", "default", "via", "fd00:9::1"]);
        pod(&["neigh", "add", "10.9.0.77", "lladdr", "02:00:00:00:00:77", "dev", "eth0", "nud", "permanent"]);
        pair
    }

    /// Adds a second interface to the pod's namespace.
    fn add_second(&self) {
        let pod = |arguments: &[&str]| ip(&[&["-n", self.pod.as_str()], arguments].concat());
        pod(&["link", "add", "dmz0", "address", DMZ_MAC, "type", "dummy"]);
        pod(&["link", "set", "dmz0", "up"]);
        pod(&["address", "add", "10.10.0.2/24", "dev", "dmz0"]);
    }

    /// The option of `ctr run` by which a container joins.
    pub fn option(&self) -> String {
        format!("network:/run/netns/{}", self.pod)
    }

    /// Everything that is set in the pod's namespace.
    pub fn settings(&self) -> String {
        let pod = |arguments: &[&str]| ip(&[&["-n", self.pod.as_str()], arguments].concat());
        // Without what passes of itself: counters, and neighbours that were heard of.
        [
            pod(&["-o", "link"]),
            pod(&["-o", "address"]).replace(" tentative", ""),
            pod(&["route"]),
            pod(&["-6", "route"]),
            pod(&["neigh", "show", "nud", "permanent"]),
            run("tc", &["-n", &self.pod, "qdisc"]),
        ]
        .concat()
    }

    /// What a program says that runs in the pod's namespace.
    pub fn in_pod(&self, program: &str, arguments: &[&str]) -> String {
        ip(&[&["netns", "exec", &self.pod, program], arguments].concat())
    }

    /// A server of the peer that does `serve` with its first client.
    fn serve(&self, address: &str, serve: impl FnOnce(TcpStream) + Send + 'static) -> JoinHandle<()> {
        serve_at(&self.peer, address, serve)
    }
}

/// A server in a named namespace that does `serve` with its first client.
fn serve_at(netns: &str, address: &str, serve: impl FnOnce(TcpStream) + Send + 'static) -> JoinHandle<()> {
    let address: SocketAddr = address.parse().unwrap();
    let listener = at(netns, move || TcpListener::bind(address).unwrap()).join().unwrap();
    std::thread::spawn(move || serve(listener.accept().unwrap().0))
}

impl Drop for Pair {
    fn drop(&mut self) {
        for netns in self.namespaces() {
            let _ = Command::new("ip").args(["netns", "delete", netns]).output();
        }
    }
}

/// Runs `act` on a thread in a named namespace.
fn at<T: Send + 'static>(name: &str, act: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let netns = File::open(format!("/run/netns/{name}")).unwrap();
    std::thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        act()
    })
}

/// Calls until a server is there and has said something, and returns that.
fn first_answer(address: &str) -> String {
    let mut answer = String::new();
    wait_for("the container's server", Duration::from_secs(60), || {
        TcpStream::connect(address)
            .is_ok_and(|mut server| server.read_to_string(&mut answer).is_ok() && !answer.is_empty())
    });
    answer
}

fn ip(arguments: &[&str]) -> String {
    run("ip", arguments)
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// What a container and its peer say to each other.
pub struct Talk<'a> {
    pub pair: &'a Pair,
    pub container: &'a Background<'a>,
    pub bytes: usize,
}

impl Talk<'_> {
    fn inside(&self, name: &str, line: &str) -> String {
        succeeded(&self.container.exec(name, &["sh", "-c", line]))
    }

    fn ping(&self, address: &str) {
        self.inside(&format!("ping-{}", name_of(address)), &format!("ping -c 1 -W 5 {address}"));
    }

    /// The container calls and the peer sends.
    pub fn down(&self, address: &str) {
        self.down_by("", address);
    }

    /// The same, calling by `nc` behind another program.
    pub fn down_by(&self, by: &str, address: &str) {
        let pattern = pattern(self.bytes);
        let (expected, _) = digest(&pattern[..]).unwrap();
        let served = self.pair.serve(address, move |mut client| client.write_all(&pattern).unwrap());
        let line = format!("{by}nc -w 60 {} </dev/null | sha256sum", words(address));
        let digested = self.inside(&format!("down-{}", name_of(address)), &line);
        served.join().unwrap();
        assert_eq!(digested.split_whitespace().next(), Some(expected.as_str()), "{address}");
    }

    /// The container calls and sends.
    pub fn up(&self, address: &str) {
        self.up_by("", address);
    }

    /// The same, calling by `nc` behind another program.
    pub fn up_by(&self, by: &str, address: &str) {
        let length = u64::try_from(self.bytes).unwrap();
        let served = self.pair.serve(address, move |client| {
            assert_eq!(digest(client).unwrap(), digest(std::io::repeat(0).take(length)).unwrap());
        });
        let line = format!("head -c {length} /dev/zero | {by}nc -w 60 {}", words(address));
        self.inside(&format!("up-{}", name_of(address)), &line);
        served.join().unwrap();
    }

    /// Somebody in a namespace calls and the container sends.
    pub fn inwards(&self, from: &str, address: &'static str) {
        let caller = at(from, move || first_answer(address));
        let port = address.rsplit(':').next().unwrap();
        self.inside(&format!("server-{port}"), &format!("echo hello from the guest | nc -l -p {port}"));
        assert_eq!(caller.join().unwrap(), "hello from the guest\n", "{address}");
    }
}

/// An address and a port as `nc` takes them.
fn words(address: &str) -> String {
    let address: SocketAddr = address.parse().unwrap();
    format!("{} {}", address.ip(), address.port())
}

/// What an exec can be called.
fn name_of(address: &str) -> String {
    address.chars().filter(char::is_ascii_hexdigit).collect()
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
}

#[test]
fn a_pod_looks_and_talks_as_its_namespace() {
    let pair = Pair::new("talk");
    pair.add_second();
    let host = host();
    let before = pair.settings();
    {
        let container = host.background(&["--with-ns", &pair.option()]);
        let inside = |name: &str, line: &str| succeeded(&container.exec(name, &["sh", "-c", line]));

        let seen = inside("look", "ls /sys/class/net; cat /sys/class/net/eth0/mtu /sys/class/net/*0/address");
        assert_eq!(seen.split_whitespace().collect::<Vec<_>>(), ["dmz0", "eth0", "lo", "1400", DMZ_MAC, MAC]);
        assert!(inside("second", "ip address show dev dmz0").contains("inet 10.10.0.2/24"));
        let seen = inside("routes", "ip addr show dev eth0; ip route; ip -6 route; ip neigh");
        for line in [
            "inet 10.9.0.2/24",
            "inet6 fd00:9::2/64 scope global",
            "default via 10.9.0.1 dev eth0",
            "192.0.2.0/24 via 10.77.0.1 dev eth0",
            "198.51.100.0/24 dev eth0 scope link",
            "10.9.0.0/24 dev eth0 scope link  src 10.9.0.2",
            "default via fd00:9::1 dev eth0",
            "10.9.0.77 dev eth0 lladdr 02:00:00:00:00:77",
        ] {
            assert!(seen.contains(line), "{line:?} is not in:\n{seen}");
        }
        inside("ping", "ping -c 1 -W 5 10.9.0.1 && ping -c 1 -W 5 fd00:9::1");

        // Outwards, and what comes back; IPv4 down, IPv6 up.
        let talk = Talk { pair: &pair, container: &container, bytes: MUCH };
        talk.down("10.9.0.1:7000");
        talk.up("[fd00:9::1]:7001");
        // Inwards: the container listens, for the peer, and for the pod's own localhost.
        talk.inwards(&pair.peer, "10.9.0.2:7002");
        talk.inwards(&pair.pod, "127.0.0.1:7003");
        talk.inwards(&pair.pod, "[::1]:7004");

        let second = host.run(&["--with-ns", &pair.option()], BUSYBOX, &["true"]);
        assert!(!second.status.success());
        assert!(
            stderr(&second).contains("interface eth0 is connected to another VM already"),
            "{}",
            stderr(&second)
        );
        assert!(pair.settings() != before, "the tap is not in the pod's namespace");
        inside("still", "ping -c 1 -W 5 10.9.0.1");
    }
    host.assert_nothing_left();
    assert_eq!(pair.settings(), before);
}

/// The pod talks through whatever it has, and the interface stays as it is.
fn talks_over(name: &str, kind: &[&str]) {
    let pair = Pair::over(name, kind);
    pair.address(pair.far, "eth0", &[NET_V4, NET_V6]);
    let host = host();
    let before = pair.settings();
    {
        let container = host.background(&["--with-ns", &pair.option()]);
        let talk = Talk { pair: &pair, container: &container, bytes: SOME };
        let mac = talk.inside("mac", "cat /sys/class/net/eth0/address");
        assert!(before.contains(&format!("link/ether {} ", mac.trim())), "{mac} is not in {before}");
        talk.ping("10.9.0.1");
        talk.ping("fd00:9::1");
        talk.down("10.9.0.1:7000");
        talk.up("[fd00:9::1]:7001");
        talk.inwards(&pair.peer, "10.9.0.2:7002");
        talk.inwards(&pair.peer, "[fd00:9::2]:7003");
    }
    host.assert_nothing_left();
    assert_eq!(pair.settings(), before);
}

#[test]
fn a_pod_talks_over_macvlan() {
    talks_over("macvlan", &["macvlan", "mode", "bridge"]);
}

#[test]
fn a_pod_talks_over_ipvlan_with_the_address_of_the_interface_below() {
    talks_over("ipvlan", &["ipvlan", "mode", "l2"]);
}

/// Nobody has told the shim of this kind: that it carries Ethernet frames is enough.
#[test]
fn a_pod_talks_over_any_other_kind() {
    talks_over("vlan", VLAN);
}

#[test]
fn a_pod_of_ipv6_alone_talks() {
    let pair = Pair::bare("six");
    pair.address("veth0", "eth0", &[NET_V6]);
    ip(&["-n", &pair.pod, "-6", "route", "add", "default", "via", "fd00:9::1"]);
    let host = host();
    let before = pair.settings();
    {
        let container = host.background(&["--with-ns", &pair.option()]);
        let talk = Talk { pair: &pair, container: &container, bytes: SOME };
        let seen = talk.inside("look", "ip address show dev eth0; ip -6 route");
        assert!(!seen.contains("inet ") && seen.contains("default via fd00:9::1 dev eth0"), "{seen}");
        talk.down("[fd00:9::1]:7000");
        talk.inwards(&pair.peer, "[fd00:9::2]:7001");
        talk.inwards(&pair.pod, "[::1]:7002");
    }
    host.assert_nothing_left();
    assert_eq!(pair.settings(), before);
}

#[test]
fn a_pod_talks_over_each_of_its_interfaces() {
    let pair = Pair::new("two");
    pair.cable("veth1", "eth1", &pair.pod);
    pair.address("veth1", "eth1", &["10.10.0.N/24"]);
    let host = host();
    let before = pair.settings();
    {
        let container = host.background(&["--with-ns", &pair.option()]);
        let talk = Talk { pair: &pair, container: &container, bytes: SOME };
        talk.down("10.9.0.1:7000");
        talk.down("10.10.0.1:7001");
        talk.inwards(&pair.peer, "10.9.0.2:7002");
        talk.inwards(&pair.peer, "10.10.0.2:7003");
    }
    host.assert_nothing_left();
    assert_eq!(pair.settings(), before);
}

#[test]
fn the_network_belongs_to_the_users_of_a_container() {
    let pair = Pair::new("users");
    let host = host();
    let before = pair.settings();
    {
        let (netns, map) = (pair.option(), "0:100000:65536");
        let users = ["--uidmap", map, "--gidmap", map, "--cap-add", "CAP_NET_ADMIN"];
        let container = host.background(&[&["--with-ns", netns.as_str()][..], &users].concat());
        let inside = |name: &str, line: &str| succeeded(&container.exec(name, &["sh", "-c", line]));
        assert!(inside("map", "cat /proc/1/uid_map").contains("100000"));
        let seen = inside("look", "ls /sys/class/net; ip addr show dev eth0; ip route");
        for line in ["eth0\nlo\n", "inet 10.9.0.2/24", "default via 10.9.0.1 dev eth0"] {
            assert!(seen.contains(line), "{line:?} is not in:\n{seen}");
        }
        // A raw socket and an address are for whoever is root where the network belongs to.
        inside("ping", "ping -c 1 -W 5 10.9.0.1 && ping -c 1 -W 5 fd00:9::1");
        inside("add", "ip address add 10.9.0.9/24 dev eth0");
        let caller = at(&pair.pod, || first_answer("127.0.0.1:7003"));
        inside("server", "echo hello from the guest | nc -l -p 7003");
        assert_eq!(caller.join().unwrap(), "hello from the guest\n");
    }
    host.assert_nothing_left();
    assert_eq!(pair.settings(), before);
}

#[test]
fn a_server_of_the_host_in_the_pods_namespace_is_reached() {
    let pair = Pair::new("inner");
    let host = host();
    {
        let echo = |mut client: TcpStream| {
            let mut word = [0; 6];
            client.read_exact(&mut word).unwrap();
            client.write_all(&word).unwrap();
        };
        let addresses = ["10.9.0.2:7200", "127.0.0.1:7201", "[fd00:9::2]:7202", "[::]:7203"];
        let servers = addresses.map(|address| serve_at(&pair.pod, address, echo));
        let container = host.background(&["--with-ns", &pair.option()]);
        let inside = |name: &str, line: &str| container.exec(name, &["sh", "-c", line]);
        let taken = inside("taken", "nc -l -p 7203");
        assert!(stderr(&taken).contains("Address already in use"), "{}", stderr(&taken));
        for address in ["10.9.0.2 7200", "127.0.0.1 7201", "fd00:9::2 7202", "10.9.0.2 7203"] {
            let name = format!("call-{}", name_of(address));
            let answer = inside(&name, &format!("echo hello | nc -w 20 {address}"));
            assert_eq!(succeeded(&answer), "hello\n", "{address}");
        }
        for server in servers {
            server.join().unwrap();
        }
    }
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_leaves_the_interface_as_it_was() {
    let pair = Pair::new("kill");
    let host = host();
    let before = pair.settings();
    {
        let container = host.background(&["--with-ns", &pair.option()]);
        // The slot that nobody needs is not to be seen.
        let seen = succeeded(&container.exec("look", &["ls", "/sys/class/net"]));
        assert_eq!(seen.split_whitespace().collect::<Vec<_>>(), ["eth0", "lo"]);
        for process in processes("containerd-shim-vmshim-v2") {
            kill(process, Signal::SIGKILL).unwrap();
        }
        wait_for("the end of the shim", Duration::from_secs(10), || {
            processes("containerd-shim-vmshim-v2").is_empty()
        });
    }
    host.assert_nothing_left();
    assert_eq!(pair.settings(), before);
}

#[test]
fn a_namespace_that_cannot_be_had_is_one_clear_sentence() {
    let bare = Pair::bare("bare");
    let file = tempfile::NamedTempFile::new().unwrap();
    let host = host();
    let none = "/run/netns/none-such".to_owned();
    let other = file.path().to_str().unwrap().to_owned();
    let bare = format!("/run/netns/{}", bare.pod);
    for (path, complaint) in [
        (&none, format!("the network namespace {none} does not exist")),
        (&other, format!("{other} is not a network namespace")),
        (&bare, format!("no interface of the network namespace {bare} has an address")),
    ] {
        let output = host.run(&["--with-ns", &format!("network:{path}")], BUSYBOX, &["true"]);
        assert!(!output.status.success());
        assert!(stderr(&output).contains(&complaint), "{}", stderr(&output));
    }
    host.assert_nothing_left();
}

#[test]
fn without_a_namespace_there_is_loopback_only() {
    let host = host();
    let line = "ls /sys/class/net; ping -c 1 -W 5 127.0.0.1 >/dev/null && ping -c 1 -W 5 ::1 >/dev/null";
    for options in [&[][..], &["--net-host"]] {
        assert_eq!(succeeded(&host.sh(options, line)), "lo\n");
    }
    assert!(!fs::exists("/sys/class/net/vmshim0").unwrap());
    host.assert_nothing_left();
}
