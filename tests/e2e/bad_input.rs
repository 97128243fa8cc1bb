//! Wrong input: one clear sentence, the right code, and nothing left behind.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::Mount;
use ttrpc::Code;

use crate::fixture::{BUSYBOX, Host, directory, host, stderr, succeeded};
use crate::shim::{Direct, refusal, spec};

/// A user must not wait longer than this for any refusal.
const DEADLINE: Duration = Duration::from_secs(40);

/// Runs busybox with a configuration and returns the complaint.
fn refused_by(host: &Host, configuration: &str) -> String {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    fs::write(file.path(), configuration).unwrap();
    complaint(host, &["--runtime-config-path", file.path().to_str().unwrap()], &["true"])
}

fn complaint(host: &Host, options: &[&str], command: &[&str]) -> String {
    let started = Instant::now();
    let output = host.run(options, BUSYBOX, command);
    assert!(!output.status.success());
    assert!(started.elapsed() < DEADLINE, "took {:?}", started.elapsed());
    let text = stderr(&output);
    assert!(!text.contains("Error {") && !text.contains("backtrace"), "a debug dump: {text}");
    host.assert_nothing_left();
    text
}

fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn a_missing_config_json() {
    let host = host();
    let shim = Direct::start(&host, None);
    let (code, text) = refusal(shim.create(vec![]));
    shim.give_up(&host);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert_says(&text, &["config.json"]);
    host.assert_nothing_left();
}

#[test]
fn a_malformed_config_json() {
    let host = host();
    for config in ["", "{", "[]", r#"{"ociVersion":1}"#, r#"{"ociVersion":"1.0.2","process":{"args":"x"}}"#] {
        let shim = Direct::start(&host, Some(config));
        let (code, text) = refusal(shim.create(vec![]));
        shim.give_up(&host);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{config}: {text}");
        assert_says(&text, &["config.json"]);
    }
    host.assert_nothing_left();
}

#[test]
fn a_rootfs_mount_of_unknown_type() {
    let host = host();
    let config = spec(&host, &["true"]).to_string();
    let shim = Direct::start(&host, Some(&config));
    let mount = Mount { type_: "zfs-magic".into(), source: "/dev/null".into(), ..Default::default() };
    let (code, text) = refusal(shim.create(vec![mount]));
    shim.give_up(&host);
    assert!(matches!(code, Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED), "{code:?} {text}");
    assert_says(&text, &["zfs-magic"]);
    host.assert_nothing_left();
}

#[test]
fn a_program_that_is_not_in_the_image_fails_create() {
    let host = host();
    let text = complaint(&host, &[], &["/no/such/program"]);
    assert_says(&text, &["/no/such/program", "no such file or directory"]);
    assert!(!host.events().contains("/tasks/start"), "the task was started");
}

#[test]
fn a_kernel_that_does_not_exist() {
    let text = refused_by(&host(), "[hypervisor]\nkernel = \"/nonexistent/vmlinux\"\n");
    assert_says(&text, &["/nonexistent/vmlinux"]);
}

#[test]
fn a_kernel_that_is_none() {
    let text = refused_by(&host(), "[hypervisor]\nkernel = \"/etc/passwd\"\n");
    assert_says(&text, &["kernel"]);
}

#[test]
fn too_little_memory_for_the_guest() {
    let text = refused_by(&host(), "[hypervisor]\ndefault_memory_mib = 1\n");
    assert_says(&text, &["memory"]);
}

#[test]
fn an_unknown_key_names_its_place_and_the_nearest_known_key() {
    let text = refused_by(&host(), "[hypervisor]\nkernle = \"/boot/vmlinux\"\n");
    assert_says(&text, &["kernle", "`kernel`", "line 2"]);
}

#[test]
fn a_machine_without_kvm() {
    let host = host();
    fs::rename("/dev/kvm", "/dev/kvm.hidden").unwrap();
    let output = host.run(&[], BUSYBOX, &["true"]);
    fs::rename("/dev/kvm.hidden", "/dev/kvm").unwrap();
    assert!(!output.status.success());
    assert_says(&stderr(&output), &["/dev/kvm"]);
    host.assert_nothing_left();
}

#[test]
fn a_root_image_that_is_none() {
    let text = refused_by(&host(), "[hypervisor]\nroot_image = \"/etc/passwd\"\n");
    assert_says(&text, &["root image", "erofs"]);
}

#[test]
fn an_agent_that_never_calls_back() {
    let text = refused_with_init("silent", "exec /busybox sleep 100000", 8);
    assert_says(&text, &["boot_timeout_seconds"]);
}

#[test]
fn a_first_process_that_fails_is_quoted() {
    // As the agent does it: what is written to a terminal is sent by interrupts, and a panic may come before them.
    let script = "/busybox mount -t devtmpfs dev /dev\necho '<3>there is no agent here' > /dev/kmsg\nexit 1";
    let text = refused_with_init("failing", script, 180);
    assert_says(&text, &["panicked", "there is no agent here"]);
}

/// What a guest comes to whose /init is `script` and that has some seconds for its boot.
fn refused_with_init(name: &str, script: &str, seconds: u32) -> String {
    let initramfs = directory("VMSHIM_TEST_DIR").join(format!("{name}.cpio"));
    write_initramfs(&initramfs, script);
    refused_by(
        &host(),
        &format!(
            "[hypervisor]\nroot_image = \"{}\"\nboot_timeout_seconds = {seconds}\n",
            initramfs.display()
        ),
    )
}

fn write_initramfs(path: &Path, script: &str) {
    let tree = tempfile::tempdir().unwrap();
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(busybox.expect("busybox-static is installed"), tree.path().join("busybox")).unwrap();
    let init = tree.path().join("init");
    fs::write(&init, format!("#!/busybox sh\n{script}\n")).unwrap();
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let line =
        format!("cd {} && find . | cpio --quiet -o -H newc > {}", tree.path().display(), path.display());
    assert!(std::process::Command::new("sh").args(["-c", &line]).status().unwrap().success());
}

#[test]
fn a_container_id_twice() {
    let host = host();
    {
        let container = host.background(&[]);
        let output = host.daemon_run(&container.id);
        assert!(stderr(&output).contains("already exists"), "{}", stderr(&output));
        assert_eq!(container.status(), "RUNNING");
    }
    host.assert_nothing_left();
}

#[test]
fn a_bundle_path_with_odd_characters() {
    let host = host();
    let scratch = directory("VMSHIM_TEST_DIR").join("odd dir,=:\"'ü%\\");
    let programs = directory("VMSHIM_TEST_CONTAINERD");
    let daemon = vmshim_tests::containerd::Containerd::start(&programs, &scratch);
    // Some containerds can't serve from such a path themselves; then there is nothing to hold us to.
    let Ok(daemon) = daemon else { return };
    daemon.import(&directory("VMSHIM_TEST_IMAGES").join("busybox.tar"), "native").unwrap();
    let output = daemon.run(&["--snapshotter", "native"], BUSYBOX, "odd", &["echo", "fine"]).unwrap();
    assert_eq!(succeeded(&output), "fine\n");
    drop(daemon);
    host.assert_nothing_left();
}
