//! What users of containers see.

use crate::Case;
use crate::limits::{limits_can_change, memory_is_limited, processes_are_limited, statistics};
use crate::pod::a_pods_own_namespaces_outlive_its_containers;
use crate::shim::{Shim, process, read, read_until, script, soon, spec, write};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;
use vmshim_protocol::agent::ResizePtyRequest;
use vmshim_protocol::agent::event::Event as Happened;

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub const ALL: &[Case] = &[$((stringify!($name), |shim| Box::pin($name(shim)))),*];
    };
}

cases![
    output_and_exit_code,
    status_of_a_signal,
    input_reaches_its_end,
    a_missing_program_fails_at_creation,
    an_exec_of_a_missing_program_fails_at_once,
    an_id_is_taken_once,
    an_exec_is_inside,
    many_execs_at_once,
    a_background_child_keeps_its_output,
    an_exit_does_not_wait_for_output,
    large_streams_are_whole,
    a_terminal,
    an_exec_with_a_terminal,
    signals_reach_all,
    a_created_container_can_be_deleted,
    wrong_states_are_refused,
    a_paused_container_stands_still,
    processes_are_listed,
    the_root_can_be_read_only,
    paths_are_masked_and_protected,
    devices_are_ruled,
    the_user_is_the_specs,
    capabilities_are_the_specs,
    the_working_directory_is_made,
    a_working_directory_outside_is_refused,
    names_are_the_containers,
    bind_mounts,
    seccomp_is_enforced,
    user_namespaces,
    a_pod_shares_namespaces,
    a_pods_own_namespaces_outlive_its_containers,
    what_cannot_be_is_named,
    start_hooks_run_inside,
    memory_is_limited,
    processes_are_limited,
    limits_can_change,
    statistics,
];

fn code(error: &ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message.clone()),
        other => panic!("not a status: {other:?}"),
    }
}

/// The code and text of a refusal.
pub fn refused<T>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Ok(_) => panic!("was not refused"),
        Err(error) => code(&error),
    }
}

async fn output_and_exit_code(mut shim: Shim) {
    let (status, out, err) = shim.sh(&script("echo out; echo err >&2; exit 42")).await;
    assert_eq!((status, out.as_str(), err.as_str()), (42, "out\n", "err\n"));
    // A second container may have the same id, once the first is gone.
    let (status, out, _) = shim.sh(&script("echo again > /dev/stdout")).await;
    assert_eq!((status, out.as_str()), (0, "again\n"));
}

async fn status_of_a_signal(mut shim: Shim) {
    let (status, ..) = shim.sh(&script("sh -c 'kill -9 $$'; echo $?; exit 3")).await;
    assert_eq!(status, 3);
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    shim.signal("c", "", 9, false).await.unwrap();
    assert_eq!(shim.exit("c", "").await, 137);
    assert_eq!(
        refused(shim.signal("c", "", 9, false).await),
        (Code::NOT_FOUND, "process already finished".into())
    );
    shim.delete("c", "").await.unwrap();
}

async fn input_reaches_its_end(mut shim: Shim) {
    let mut streams = shim.create("c", &spec(&["cat"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let mut stdin = streams.stdin.take().unwrap();
    write(&mut stdin, "one\ntwo\n").await;
    stdin.shutdown().await.unwrap();
    assert_eq!(read(streams.stdout).await, "one\ntwo\n");
    assert_eq!(shim.exit("c", "").await, 0);
    shim.delete("c", "").await.unwrap();
}

async fn a_missing_program_fails_at_creation(mut shim: Shim) {
    for (args, said) in [
        (["nope"], "exec: \"nope\": executable file not found in $PATH"),
        (["/nope"], "exec: \"/nope\": stat /nope: no such file or directory"),
        (["/etc/passwd"], "exec: \"/etc/passwd\": permission denied"),
    ] {
        let (code, message) = refused(shim.create("c", &spec(&args), false).await.map(drop));
        assert_eq!((code, message.as_str()), (Code::NOT_FOUND, said));
        shim.leftovers_now();
    }
    assert!(shim.events.try_recv().is_err(), "nothing was announced");
}

async fn an_exec_of_a_missing_program_fails_at_once(mut shim: Shim) {
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let (_, message) = refused(shim.exec("c", "e", &process(&["nope"])).await.map(drop));
    assert_eq!(message, "exec: \"nope\": executable file not found in $PATH");
    shim.exec("c", "e", &process(&["true"])).await.unwrap();
    shim.start("c", "e").await.unwrap();
    assert_eq!(shim.exit("c", "e").await, 0);
    shim.signal("c", "", 9, false).await.unwrap();
    assert_eq!(shim.exit("c", "").await, 137);
    shim.delete("c", "").await.unwrap();
}

async fn an_id_is_taken_once(mut shim: Shim) {
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    assert_eq!(refused(shim.create("c", &spec(&["true"]), false).await.map(drop)).0, Code::ALREADY_EXISTS);
    let _exec = shim.exec("c", "e", &process(&["sleep", "100"])).await.unwrap();
    assert_eq!(refused(shim.exec("c", "e", &process(&["true"])).await.map(drop)).0, Code::ALREADY_EXISTS);
    assert_eq!(
        refused(shim.create("../x", &spec(&["true"]), false).await.map(drop)).0,
        Code::INVALID_ARGUMENT
    );
    assert_eq!(refused(shim.start("x", "").await).0, Code::NOT_FOUND);
    assert_eq!(refused(shim.start("c", "x").await).0, Code::NOT_FOUND);
    shim.signal("c", "", 9, true).await.unwrap();
    let mut ended = Vec::new();
    for _ in 0..2 {
        match shim.events.recv().await.unwrap() {
            Happened::Exited(exited) => ended.push((exited.exec_id, exited.status)),
            other => panic!("{other:?}"),
        }
    }
    ended.sort();
    assert_eq!(ended, [(String::new(), 137), ("e".into(), 137)]);
    shim.delete("c", "e").await.unwrap();
    shim.delete("c", "").await.unwrap();
}

async fn an_exec_is_inside(mut shim: Shim) {
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let mut inside = process(&[
        "/bin/sh",
        "-c",
        "hostname; pwd; id -u; cat /proc/1/comm; echo $A; readlink /proc/self/ns/cgroup /proc/1/ns/cgroup | uniq | wc -l; exit 7",
    ]);
    inside["env"] = json!(["A=b", "PATH=/bin"]);
    inside["cwd"] = json!("/tmp");
    inside["user"] = json!({"uid": 1000, "gid": 1000});
    let streams = shim.exec("c", "e", &inside).await.unwrap();
    shim.start("c", "e").await.unwrap();
    let out = read(streams.stdout).await;
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..5], ["inside", "/tmp", "1000", "sleep", "b"], "{out}");
    assert_eq!(shim.exit("c", "e").await, 7);
    shim.signal("c", "", 9, false).await.unwrap();
    assert_eq!(shim.exit("c", "").await, 137);
    assert_eq!(
        refused(shim.exec("c", "f", &process(&["true"])).await.map(drop)),
        (Code::FAILED_PRECONDITION, "cannot exec in a stopped container".into())
    );
    shim.delete("c", "").await.unwrap();
}

async fn many_execs_at_once(mut shim: Shim) {
    const MANY: usize = 20;
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let shim_ref = &shim;
    let one = |number: usize| async move {
        let id = format!("e{number}");
        let mut streams = shim_ref.exec("c", &id, &process(&["cat"])).await.unwrap();
        shim_ref.start("c", &id).await.unwrap();
        let mut stdin = streams.stdin.take().unwrap();
        write(&mut stdin, &id).await;
        stdin.shutdown().await.unwrap();
        assert_eq!(read(streams.stdout).await, id);
    };
    let mut running: Vec<_> = (0..MANY).map(|number| Box::pin(one(number))).collect();
    std::future::poll_fn(|cx| {
        running.retain_mut(|future| future.as_mut().poll(cx).is_pending());
        if running.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    drop(running);
    for _ in 0..MANY {
        assert!(matches!(shim.events.recv().await.unwrap(), Happened::Exited(exited) if exited.status == 0));
    }
    shim.signal("c", "", 9, false).await.unwrap();
    assert_eq!(shim.exit("c", "").await, 137);
    shim.delete("c", "").await.unwrap();
}

async fn a_background_child_keeps_its_output(mut shim: Shim) {
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let mut streams = shim
        .exec("c", "e", &process(&["/bin/sh", "-c", "(sleep 0.3; echo late) & echo early"]))
        .await
        .unwrap();
    shim.start("c", "e").await.unwrap();
    assert_eq!(shim.exit("c", "e").await, 0);
    let mut stdout = streams.stdout.take().unwrap();
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "early\nlate\n");
    shim.signal("c", "", 9, false).await.unwrap();
    shim.exit("c", "").await;
    shim.delete("c", "").await.unwrap();
}

async fn an_exit_does_not_wait_for_output(mut shim: Shim) {
    // More than all buffers on the way hold would block the process; what they hold must not delay its exit.
    let streams = shim.create("c", &script("head -c 30000 /dev/zero; exit 5"), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    assert_eq!(shim.exit("c", "").await, 5);
    shim.delete("c", "").await.unwrap();
    assert_eq!(read(streams.stdout).await.len(), 30000);
}

async fn large_streams_are_whole(mut shim: Shim) {
    const SIZE: usize = 64 << 20;
    const CHUNK: usize = 1 << 16;
    let mut streams = shim.create("c", &spec(&["cat"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let (mut stdin, mut stdout) = (streams.stdin.take().unwrap(), streams.stdout.take().unwrap());
    let begin = std::time::Instant::now();
    // A pattern whose period fits no buffer's size.
    let ring: std::sync::Arc<Vec<u8>> =
        std::sync::Arc::new((0..CHUNK + 251).map(|at| (at % 251) as u8).collect());
    let pattern = ring.clone();
    let writer = tokio::spawn(async move {
        for written in (0..SIZE).step_by(CHUNK) {
            stdin.write_all(&pattern[written % 251..][..CHUNK]).await.unwrap();
        }
        stdin.shutdown().await.unwrap();
    });
    let mut chunk = vec![0u8; CHUNK];
    let mut seen = 0usize;
    loop {
        let length = stdout.read(&mut chunk).await.unwrap();
        if length == 0 {
            break;
        }
        assert!(chunk[..length] == ring[seen % 251..][..length], "after {seen}");
        seen += length;
    }
    writer.await.unwrap();
    assert_eq!(seen, SIZE);
    println!("  {:.0} MB/s through cat", (SIZE >> 20) as f64 / begin.elapsed().as_secs_f64());
    assert_eq!(shim.exit("c", "").await, 0);
    shim.delete("c", "").await.unwrap();
}

async fn a_terminal(mut shim: Shim) {
    let mut interactive = spec(&["/bin/sh"]);
    interactive["process"]["terminal"] = json!(true);
    let mut streams = shim.create("c", &interactive, true).await.unwrap();
    shim.start("c", "").await.unwrap();
    let terminal = streams.stdout.as_mut().unwrap();
    write(terminal, "tty; stty size; stat -c %t:%T /dev/console\n").await;
    let text = read_until(terminal, "88:0").await;
    assert!(text.contains("/dev/pts/0") && text.contains("24 80"), "{text}");
    let resize = ResizePtyRequest { container_id: "c".into(), width: 101, height: 33, ..Default::default() };
    shim.agent.resize_pty(soon(), &resize).await.unwrap();
    write(terminal, "stty size\n").await;
    read_until(terminal, "33 101").await;
    write(terminal, "exit 9\n").await;
    assert_eq!(shim.exit("c", "").await, 9);
    read(streams.stdout).await;
    shim.delete("c", "").await.unwrap();
}

async fn an_exec_with_a_terminal(mut shim: Shim) {
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let mut interactive = process(&["/bin/sh", "-c", "tty; cat"]);
    interactive["terminal"] = json!(true);
    let mut streams = shim.exec("c", "e", &interactive).await.unwrap();
    shim.start("c", "e").await.unwrap();
    let terminal = streams.stdout.as_mut().unwrap();
    read_until(terminal, "/dev/pts/0").await;
    write(terminal, "echoed\n").await;
    read_until(terminal, "echoed\r\nechoed").await;
    // The end of input that a user types.
    write(terminal, "\x04").await;
    assert_eq!(shim.exit("c", "e").await, 0);
    shim.signal("c", "", 9, false).await.unwrap();
    shim.exit("c", "").await;
    shim.delete("c", "").await.unwrap();
}

async fn signals_reach_all(mut shim: Shim) {
    let text = "trap 'exit 3' TERM; sleep 100 & echo up; wait";
    let mut streams = shim.create("c", &script(text), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    read_until(streams.stdout.as_mut().unwrap(), "up").await;
    shim.signal("c", "", 15, true).await.unwrap();
    assert_eq!(shim.exit("c", "").await, 3);
    assert_eq!(refused(shim.signal("c", "", 15, true).await).0, Code::NOT_FOUND);
    assert_eq!(refused(shim.signal("x", "", 15, true).await).0, Code::NOT_FOUND);
    shim.delete("c", "").await.unwrap();
    assert_eq!(refused(shim.delete("c", "").await).0, Code::NOT_FOUND);
}

async fn a_created_container_can_be_deleted(mut shim: Shim) {
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.delete("c", "").await.unwrap();
    assert_eq!(shim.exit("c", "").await, 137);
}

async fn wrong_states_are_refused(mut shim: Shim) {
    let _streams = shim.create("c", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    assert_eq!(refused(shim.start("c", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refused(shim.delete("c", "").await).0, Code::FAILED_PRECONDITION);
    let _exec = shim.exec("c", "e", &process(&["sleep", "100"])).await.unwrap();
    shim.start("c", "e").await.unwrap();
    assert_eq!(refused(shim.delete("c", "e").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refused(shim.signal("c", "", 99, false).await).0, Code::INVALID_ARGUMENT);
    shim.signal("c", "e", 9, false).await.unwrap();
    assert_eq!(shim.exit("c", "e").await, 137);
    shim.signal("c", "", 9, false).await.unwrap();
    shim.exit("c", "").await;
    shim.delete("c", "").await.unwrap();
}

async fn a_paused_container_stands_still(mut shim: Shim) {
    let mut streams =
        shim.create("c", &script("while :; do echo tick; sleep 0.02; done"), false).await.unwrap();
    shim.start("c", "").await.unwrap();
    let stdout = streams.stdout.as_mut().unwrap();
    read_until(stdout, "tick").await;
    let request = shim.container("c");
    shim.agent.pause_container(soon(), &request).await.unwrap();
    assert_eq!(refused(shim.agent.pause_container(soon(), &request).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(
        refused(shim.exec("c", "e", &process(&["true"])).await.map(drop)).0,
        Code::FAILED_PRECONDITION
    );
    // What is on its way arrives; then nothing does.
    let mut bytes = [0; 65536];
    while let Ok(Ok(1..)) =
        tokio::time::timeout(std::time::Duration::from_millis(200), stdout.read(&mut bytes)).await
    {}
    shim.agent.resume_container(soon(), &request).await.unwrap();
    assert_eq!(refused(shim.agent.resume_container(soon(), &request).await).0, Code::FAILED_PRECONDITION);
    read_until(stdout, "tick").await;
    shim.agent.pause_container(soon(), &request).await.unwrap();
    shim.signal("c", "", 9, false).await.unwrap();
    assert_eq!(shim.exit("c", "").await, 137);
    shim.delete("c", "").await.unwrap();
}

async fn processes_are_listed(mut shim: Shim) {
    let mut streams = shim.create("c", &script("sleep 100 & echo up; wait"), false).await.unwrap();
    let pid = shim.start("c", "").await.unwrap();
    read_until(streams.stdout.as_mut().unwrap(), "up").await;
    let _exec = shim.exec("c", "e", &process(&["sleep", "100"])).await.unwrap();
    let exec_pid = shim.start("c", "e").await.unwrap();
    let listed = shim.agent.list_processes(soon(), &shim.container("c")).await.unwrap().processes;
    assert_eq!(listed.len(), 3);
    assert!(listed.iter().any(|process| process.pid == pid && process.exec_id.is_empty()));
    assert!(listed.iter().any(|process| process.pid == exec_pid && process.exec_id == "e"));
    shim.signal("c", "", 9, true).await.unwrap();
    shim.events.recv().await.unwrap();
    shim.events.recv().await.unwrap();
    assert!(shim.agent.list_processes(soon(), &shim.container("c")).await.unwrap().processes.is_empty());
    shim.delete("c", "").await.unwrap();
}

async fn the_root_can_be_read_only(mut shim: Shim) {
    let mut read_only = script("touch /x; touch /dev/shm/y && echo shm; touch /sys/z");
    read_only["root"]["readonly"] = json!(true);
    let (_, out, err) = shim.sh(&read_only).await;
    assert_eq!(out, "shm\n");
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
}

async fn paths_are_masked_and_protected(mut shim: Shim) {
    let text = "cat /proc/timer_list | wc -c; echo 1 > /proc/sys/kernel/printk; ls /sys/firmware | wc -l; cat /proc/keys";
    let (_, out, err) = shim.sh(&script(text)).await;
    assert_eq!(out, "0\n0\n", "{err}");
    assert!(err.contains("Read-only file system"), "{err}");
}

async fn devices_are_ruled(mut shim: Shim) {
    // A node of a disk can be made, but not opened; the rules are what holds CAP_MKNOD.
    let text = "mknod /dev/d b 7 0 && dd if=/dev/d of=/dev/null count=1; mknod /dev/k c 240 77 && cat /dev/k; \
                echo x > /dev/null && head -c 4 /dev/zero | wc -c; for l in fd stdout ptmx; do readlink /dev/$l; done";
    let (_, out, err) = shim.sh(&script(text)).await;
    assert_eq!(out, "4\n/proc/self/fd\n/proc/self/fd/1\npts/ptmx\n", "{err}");
    assert_eq!(err.matches("Operation not permitted").count(), 2, "{err}");
    // Past the rules there is no such device.
    let mut allowed = script("mknod /dev/k c 240 77 && cat /dev/k; mknod /dev/l c 240 78 && cat /dev/l");
    allowed["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 240, "minor": 77, "access": "r"}]);
    let (_, _, err) = shim.sh(&allowed).await;
    assert!(
        err.contains("/dev/k': No such device") && err.contains("/dev/l': Operation not permitted"),
        "{err}"
    );
    let mut missing = script("true");
    missing["linux"]["devices"] = json!([{"path": "/dev/none", "type": "c", "major": 240, "minor": 77}]);
    let (code, said) = refused(shim.create("c", &missing, false).await.map(drop));
    assert_eq!(
        (code, said.as_str()),
        (
            Code::UNIMPLEMENTED,
            "linux.devices[/dev/none] is not supported in the guest: it has no char device 240:77"
        )
    );
    let mut given = script("stat -c '%t:%T %a %u' /dev/mine");
    given["linux"]["devices"] =
        json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 11, "fileMode": 0o640, "uid": 7}]);
    let (_, out, err) = shim.sh(&given).await;
    assert_eq!(out, "1:b 640 7\n", "{err}");
}

async fn the_user_is_the_specs(mut shim: Shim) {
    let mut user = script(
        "id -u; id -g; id -G; echo $HOME; umask; echo x > /dev/stdout; touch /tmp/f; stat -c %a /tmp/f",
    );
    user["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o077});
    let root = shim.rootfs("c");
    std::fs::set_permissions(root.join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let (_, out, err) = shim.sh(&user).await;
    assert_eq!(out, "1000\n1000\n1000 5 6\n/home/user\n0077\nx\n600\n", "{err}");
}

async fn capabilities_are_the_specs(mut shim: Shim) {
    let (_, out, _) = shim.sh(&script("grep -E 'Cap|NoNewPrivs|SigIgn|SigBlk' /proc/self/status")).await;
    let fields: std::collections::HashMap<_, _> =
        out.lines().filter_map(|line| line.split_once(":\t")).collect();
    // The 14 default capabilities of containerd.
    assert_eq!(fields["CapEff"], "00000000a80425fb");
    assert_eq!(fields["CapBnd"], "00000000a80425fb");
    assert_eq!(fields["CapInh"], "0000000000000000");
    assert_eq!(fields["NoNewPrivs"], "1");
    assert_eq!(fields["SigBlk"], "0000000000000000");
    // SIGPIPE, which the agent itself ignores.
    assert_eq!(u64::from_str_radix(fields["SigIgn"], 16).unwrap() & 1 << 12, 0);
    let mut ambient = script("grep -E 'CapEff|CapAmb' /proc/self/status");
    ambient["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    ambient["process"]["capabilities"] = json!({"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]});
    let (_, out, _) = shim.sh(&ambient).await;
    assert_eq!(out, "CapEff:\t0000000000000020\nCapAmb:\t0000000000000020\n");
}

async fn the_working_directory_is_made(mut shim: Shim) {
    let mut cwd = script("pwd; ls -la /proc/self/fd | wc -l");
    cwd["process"]["cwd"] = json!("/not/there/yet");
    let (_, out, err) = shim.sh(&cwd).await;
    // 0, 1, 2 and the listing's own; plus ".", ".." and the head line.
    assert_eq!(out, "/not/there/yet\n7\n", "{err}");
}

async fn a_working_directory_outside_is_refused(shim: Shim) {
    // An image can name a descriptor that the runtime might have left open.
    for fd in 3..40 {
        let mut leaking = script("true");
        leaking["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
        let (_, message) = refused(shim.create("c", &leaking, false).await.map(drop));
        assert!(message.contains("process.cwd"), "{message}");
    }
}

async fn names_are_the_containers(mut shim: Shim) {
    let mut named = script(
        "hostname; cat /proc/sys/kernel/domainname; cat /proc/1/comm; cat /proc/self/cgroup; cat /proc/sys/kernel/shmmni",
    );
    named["domainname"] = json!("example");
    named["linux"]["sysctl"] = json!({"kernel.shmmni": "77"});
    let (_, out, err) = shim.sh(&named).await;
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..3], ["inside", "example", "sh"], "{err}");
    assert!(lines.contains(&"0::/"), "{out}");
    assert_eq!(lines.last(), Some(&"77"));
}

async fn bind_mounts(mut shim: Shim) {
    let volume = shim.directory.join("shared/volume");
    std::fs::create_dir_all(volume.join("inner")).unwrap();
    std::fs::write(volume.join("file"), "content\n").unwrap();
    let mut bound = script(
        "cat /data/file /etc/one; touch /data/new && echo rw; touch /ro/x; ls /ro; touch /ro/inner/y; mount -o remount,rw /ro",
    );
    let mounts = bound["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/data", "type": "bind", "source": "vmshim-shared:volume", "options": ["rbind", "rw"]}));
    mounts.push(json!({"destination": "/etc/one", "type": "bind", "source": "vmshim-shared:volume/file", "options": ["bind", "ro"]}));
    mounts.push(json!({"destination": "/ro", "type": "bind", "source": "vmshim-shared:volume", "options": ["rbind", "rro", "rprivate"]}));
    let (_, out, err) = shim.sh(&bound).await;
    assert_eq!(out, "content\ncontent\nrw\nfile\ninner\nnew\n", "{err}");
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
    assert!(volume.join("new").exists());
    let mut outside = script("true");
    outside["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/x", "type": "bind", "source": "vmshim-shared:../../etc", "options": ["bind"]}));
    let (_, said) = refused(shim.create("c", &outside, false).await.map(drop));
    assert!(said.starts_with("open mounts[/x].source vmshim-shared:../../etc: "), "{said}");
}

async fn seccomp_is_enforced(mut shim: Shim) {
    for no_new_privileges in [true, false] {
        let mut filtered = script("mkdir /tmp/x; mkdir /tmp/y 2>/dev/null || echo refused");
        filtered["process"]["noNewPrivileges"] = json!(no_new_privileges);
        filtered["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]});
        let (_, out, err) = shim.sh(&filtered).await;
        assert_eq!(out, "refused\n");
        assert!(err.contains("Permission denied"), "{err}");
    }
}

async fn user_namespaces(mut shim: Shim) {
    let mut mapped = script(
        "id -u; cat /proc/self/uid_map; stat -c %u /bin/busybox; echo x > /dev/null; touch /owned; stat -c %u /owned",
    );
    mapped["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    mapped["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    mapped["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    let root = shim.rootfs("c");
    for entry in
        [root.clone(), root.join("bin"), root.join("bin/busybox"), root.join("dev"), root.join("proc")]
    {
        std::os::unix::fs::lchown(entry, Some(100000), Some(100000)).unwrap();
    }
    let (status, out, err) = shim.sh(&mapped).await;
    let words: Vec<&str> = out.split_whitespace().collect();
    // Copying busybox anew gave it back to the first user.
    assert_eq!(status, 0, "{out} {err}");
    assert_eq!(words[..4], ["0", "0", "100000", "65536"], "{err}");
    assert_eq!(words.last(), Some(&"0"), "{err}");
}

async fn a_pod_shares_namespaces(mut shim: Shim) {
    let _pod = shim.create("pod", &spec(&["sleep", "100"]), false).await.unwrap();
    shim.start("pod", "").await.unwrap();
    let mut member = script("hostname; cat /proc/1/comm");
    member["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "uts", "path": "vmshim-container:pod"},
        {"type": "pid", "path": "vmshim-container:pod"}, {"type": "ipc", "path": "vmshim-container:pod"}]);
    member.as_object_mut().unwrap().remove("hostname");
    let (status, out, err) = shim.sh(&member).await;
    assert_eq!((status, out.as_str()), (0, "inside\nsleep\n"), "{err}");
    shim.signal("pod", "", 9, false).await.unwrap();
    shim.exit("pod", "").await;
    member["process"]["args"] = json!(["true"]);
    assert_eq!(refused(shim.create("c", &member, false).await.map(drop)).0, Code::FAILED_PRECONDITION);
    shim.delete("pod", "").await.unwrap();
}

async fn what_cannot_be_is_named(shim: Shim) {
    let with = |pointer: &str, value| {
        let mut changed = script("true");
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        changed.pointer_mut(parent).unwrap()[name] = value;
        changed
    };
    for (pointer, value, code, said) in [
        ("/process/apparmorProfile", json!("x"), Code::UNIMPLEMENTED, "process.apparmorProfile"),
        ("/process/selinuxLabel", json!("x"), Code::UNIMPLEMENTED, "process.selinuxLabel"),
        ("/process/cwd", json!("x"), Code::INVALID_ARGUMENT, "process.cwd"),
        ("/process/args", json!([]), Code::INVALID_ARGUMENT, "process.args"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_NOPE", "hard": 1, "soft": 1}]),
            Code::INVALID_ARGUMENT,
            "config.json",
        ),
        (
            "/linux/sysctl",
            json!({"vm.swappiness": "1"}),
            Code::INVALID_ARGUMENT,
            "linux.sysctl[vm.swappiness]",
        ),
        ("/linux/intelRdt", json!({}), Code::UNIMPLEMENTED, "linux.intelRdt"),
        ("/linux/rootfsPropagation", json!("odd"), Code::INVALID_ARGUMENT, "linux.rootfsPropagation"),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), Code::UNIMPLEMENTED, "linux.seccomp"),
        (
            "/linux/resources",
            json!({"memory": {"swappiness": 3}}),
            Code::UNIMPLEMENTED,
            "linux.resources.memory.swappiness",
        ),
        ("/mounts", json!([{"destination": "/x", "type": "nofs"}]), Code::UNIMPLEMENTED, "mounts[/x].type"),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "tmpfs", "options": ["nope=1"]}]),
            Code::INVALID_ARGUMENT,
            "mounts[/x] option \"nope\"",
        ),
        (
            "/mounts",
            json!([{"destination": "/x", "type": "bind", "source": "/nope"}]),
            Code::INTERNAL,
            "open mounts[/x].source",
        ),
    ] {
        let (got, message) = refused(shim.create("c", &with(pointer, value), false).await.map(drop));
        assert!(got == code && message.starts_with(said), "{pointer}: {got:?} {message}");
    }
}

async fn start_hooks_run_inside(mut shim: Shim) {
    let mut hooked = script("cat /hooked");
    hooked["hooks"] = json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "cat > /hooked; echo $A >> /hooked"], "env": ["A=b", "PATH=/bin"]}],
        "createRuntime": [{"path": "/on/the/host"}]});
    let (_, out, err) = shim.sh(&hooked).await;
    assert!(out.starts_with(r#"{"bundle""#) && out.ends_with("b\n"), "{out} {err}");
    let mut failing = script("true");
    failing["hooks"] = json!({"startContainer": [{"path": "/bin/false"}]});
    let _streams = shim.create("c", &failing, false).await.unwrap();
    assert!(refused(shim.start("c", "").await).1.starts_with("hooks.startContainer: /bin/false"));
    assert_eq!(shim.exit("c", "").await, 127);
    shim.delete("c", "").await.unwrap();
}
