//! What a pod's interface is made of: queues, offloads, and limits of what it carries.

use std::fs;
use std::time::{Duration, Instant};

use crate::fixture::{Background, host, succeeded};
use crate::network::{Pair, SOME, Talk};

/// Bits of what driver and device have agreed on (virtio 1.2, section 5.1.3): checksums left to the other in both
/// directions, and segmentation of IPv4 and IPv6.
const OFFLOADS: [usize; 6] = [0, 1, 7, 8, 11, 12];

/// The control queue, and several pairs of queues.
const SEVERAL: [usize; 2] = [17, 22];

/// Bytes of an interface's MTU here and an Ethernet header.
const LONGEST_ON_THE_WIRE: u64 = 1400 + 14;

fn inside(container: &Background<'_>, name: &str, line: &str) -> String {
    succeeded(&container.exec(name, &["sh", "-c", line]))
}

/// Whether each of these bits is agreed on.
fn agreed(container: &Background<'_>, bits: &[usize]) -> bool {
    let features = inside(container, "features", "cat /sys/class/net/eth0/device/features");
    bits.iter().all(|bit| features.as_bytes().get(*bit) == Some(&b'1'))
}

#[test]
fn checksums_and_segmentation_are_left_to_who_has_to_do_them() {
    let pair = Pair::new("offloads");
    let host = host();
    {
        let container = host.background(&["--with-ns", &pair.option()]);
        assert!(agreed(&container, &OFFLOADS) && !agreed(&container, &SEVERAL[..1]));
        assert_eq!(inside(&container, "queues", "ls /sys/class/net/eth0/queues"), "rx-0\ntx-0\n");
        let talk = Talk { pair: &pair, container: &container, bytes: SOME };
        talk.down("10.9.0.1:7000");
        talk.up("[fd00:9::1]:7001");
        // Frames as long as no wire carries them have come and gone.
        let counted = inside(
            &container,
            "count",
            "cd /sys/class/net/eth0/statistics; cat rx_bytes rx_packets tx_bytes tx_packets",
        );
        let counted: Vec<u64> = counted.lines().map(|line| line.parse().unwrap()).collect();
        let [received, frames_in, sent, frames_out] = counted[..] else { panic!("{counted:?}") };
        assert!(received / frames_in > LONGEST_ON_THE_WIRE, "{counted:?}");
        assert!(sent / frames_out > LONGEST_ON_THE_WIRE, "{counted:?}");
    }
    host.assert_nothing_left();
}

#[test]
fn a_pod_of_several_vcpus_talks_by_several_queues() {
    let pair = Pair::new("queues");
    let host = host();
    let before = pair.settings();
    {
        let container = host.background(&["--cpus", "2", "--with-ns", &pair.option()]);
        assert!(agreed(&container, &OFFLOADS) && agreed(&container, &SEVERAL));
        let queues = "rx-0\nrx-1\ntx-0\ntx-1\n";
        assert_eq!(inside(&container, "queues", "ls /sys/class/net/eth0/queues"), queues);
        // The host's queues are those that the guest has said it uses.
        assert_eq!(pair.in_pod("ls", &["/sys/class/net/vmshim0/queues"]), queues);
        assert!(pair.in_pod("tc", &["qdisc", "show", "dev", "vmshim0"]).contains("noqueue"));

        // Each CPU sends by the queue of its own, and what comes back is spread over both.
        std::thread::scope(|scope| {
            for flow in 0..6u16 {
                let (pair, container) = (&pair, &container);
                scope.spawn(move || {
                    let talk = Talk { pair, container, bytes: SOME / 4 };
                    let cpu = format!("taskset {} ", 1 + flow % 2);
                    talk.down_by(&cpu, &format!("10.9.0.1:{}", 7000 + flow));
                    talk.up_by(&cpu, &format!("[fd00:9::1]:{}", 7100 + flow));
                });
            }
        });
        // As many digits as the machine can have CPUs.
        let masks = inside(&container, "masks", "cat /sys/class/net/eth0/queues/tx-*/xps_cpus");
        let masks: Vec<_> = masks.lines().map(|mask| mask.trim_start_matches('0')).collect();
        assert_eq!(masks, ["1", "2"]);
        let talk = Talk { pair: &pair, container: &container, bytes: SOME };
        talk.inwards("queues-peer", "10.9.0.2:7002");

        // One VM a namespace: the second one must not become a queue of the first one's.
        let second = host.sh(&["--cpus", "2", "--with-ns", &pair.option()], "true");
        let complaint = crate::fixture::stderr(&second);
        assert!(complaint.contains("interface eth0 is connected to another VM already"), "{complaint}");
    }
    host.assert_nothing_left();
    assert_eq!(pair.settings(), before);
}

/// Bytes a second, far below what any test host carries.
const RATE: u64 = 32 << 10;

/// What the settings of the test have for a burst.
const BURST: u64 = 64 << 10;

/// How much is carried.
const CARRIED: usize = 512 << 10;

/// How long it takes until the container has received, and has sent, so many bytes.
fn durations(talk: &Talk<'_>) -> [Duration; 2] {
    let begin = Instant::now();
    talk.down("10.9.0.1:7000");
    let down = begin.elapsed();
    let begin = Instant::now();
    talk.up("10.9.0.1:7001");
    [down, begin.elapsed()]
}

#[test]
fn a_pod_carries_no_more_than_it_may() {
    let pair = Pair::new("rate");
    let host = host();
    let drop_in = std::path::Path::new("/etc/vmshim/config.d/rate.toml");
    let settings = "[hypervisor]\nnetwork_burst_kib = 64\nmax_receive_kib_per_second = 100000\n[runtime]\n\
                    left_to_pods = [\"hypervisor.receive_kib_per_second\", \"hypervisor.send_kib_per_second\"]\n";
    let annotations = [
        &format!("io.vmshim.hypervisor.receive_kib_per_second={}", RATE >> 10)[..],
        &format!("io.vmshim.hypervisor.send_kib_per_second={}", RATE >> 10)[..],
    ];
    let [receive, send] = annotations;
    let free = {
        let container = host.background(&["--with-ns", &pair.option()]);
        durations(&Talk { pair: &pair, container: &container, bytes: CARRIED })
    };
    fs::write(drop_in, settings).unwrap();
    let limited = {
        let options = ["--with-ns", &pair.option(), "--annotation", receive, "--annotation", send];
        let container = host.background(&options);
        durations(&Talk { pair: &pair, container: &container, bytes: CARRIED })
    };
    let beyond = "io.vmshim.hypervisor.receive_kib_per_second=100001";
    let beyond = host.sh(&["--annotation", beyond], "true");
    fs::remove_file(drop_in).unwrap();
    assert!(crate::fixture::stderr(&beyond).contains("is larger than `max_receive_kib_per_second`"));

    // What is over a burst takes its time; headers make it some more.
    let least = Duration::from_secs((u64::try_from(CARRIED).unwrap() - BURST) / RATE);
    println!("unlimited {free:?}, limited {limited:?}, at least {least:?}");
    for (free, limited) in free.into_iter().zip(limited) {
        assert!(limited > least && limited < 2 * least + free, "{free:?} {limited:?} {least:?}");
    }
    host.assert_nothing_left();
}
