//! Root file systems of many layers, as containerd 2.2 hands them over.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim_protos::api::Mount;

use crate::fixture::{Host, directory, host};
use crate::shim::{Direct, spec, tree};

fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: source.to_str().unwrap().to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}

/// An erofs image of a directory.
fn erofs(scratch: &Path, name: &str, source: &Path) -> PathBuf {
    let image = scratch.join(name);
    let output = Command::new("mkfs.erofs").arg("--quiet").args([&image, source]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    image
}

/// Runs a shell line over the mounts and returns what it printed.
fn run(host: &Host, scratch: &Path, line: &str, mounts: Vec<Mount>) -> String {
    let mut spec = spec(host, &["sh", "-c", line]);
    spec["root"] = serde_json::json!({ "path": "rootfs", "readonly": false });
    let shim = Direct::start(host, Some(&spec.to_string()));
    let output = scratch.join("output");
    let status = shim.run(mounts, &format!("file://{}", output.display())).unwrap();
    shim.give_up(host);
    let text = fs::read_to_string(output).unwrap();
    assert_eq!(status, 0, "{text}");
    text
}

#[test]
fn a_hundred_layers_become_one_root() {
    let host = host();
    let scratch = tempfile::tempdir_in(directory("VMSHIM_TEST_DIR")).unwrap();
    let layer = |name: &str| {
        let directory = scratch.path().join(name);
        fs::create_dir_all(directory.join("added")).unwrap();
        fs::write(directory.join("added").join(name), name).unwrap();
        directory
    };
    let [top, _, low] = ["top", "middle", "low"].map(layer);
    fs::write(low.join("gone"), "not to be seen").unwrap();
    let whiteout = Command::new("mknod").arg(top.join("gone")).args(["c", "0", "0"]).status().unwrap();
    assert!(whiteout.success());
    let images = ["top", "middle", "low"]
        .map(|name| erofs(scratch.path(), &format!("{name}.erofs"), &scratch.path().join(name)));
    let base = erofs(scratch.path(), "base.erofs", tree(&host));
    let upper = scratch.path().join("upper.ext4");
    vmshim_tests::image::make_ext4(&upper, 16 << 20).unwrap();

    let mut mounts = vec![mount("ext4", &upper, &["rw", "loop"])];
    let [top, middle, low] = &images;
    let middles = std::iter::repeat_n(middle, 97);
    for image in [top].into_iter().chain(middles).chain([low, &base]) {
        mounts.push(mount("erofs", image, &["ro", "loop"]));
    }
    mounts.push(mount(
        "format/mkdir/overlay",
        Path::new("overlay"),
        &[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 100 }}",
        ],
    ));
    let line = "ls /added; ls /gone 2>/dev/null; echo kept > /added/new; cat /added/new; stat -c %a /";
    assert_eq!(run(&host, scratch.path(), line, mounts), "low\nmiddle\ntop\nkept\n755\n");
    host.assert_nothing_left();
}

#[test]
fn changes_to_layers_go_to_a_directory_of_the_host() {
    let host = host();
    let scratch = tempfile::tempdir_in(directory("VMSHIM_TEST_DIR")).unwrap();
    let base = erofs(scratch.path(), "base.erofs", tree(&host));
    let [extra, upper, work] = ["extra", "upper", "work"].map(|name| scratch.path().join(name));
    [&extra, &upper, &work].into_iter().for_each(|path| fs::create_dir(path).unwrap());
    fs::write(extra.join("file"), "layer\n").unwrap();
    let extra = erofs(scratch.path(), "extra.erofs", &extra);
    let options = [
        format!("workdir={}", work.display()),
        format!("upperdir={}", upper.display()),
        "lowerdir={{ overlay 0 1 }}".to_owned(),
    ];
    let mounts = vec![
        mount("erofs", &extra, &["ro", "loop"]),
        mount("erofs", &base, &["ro", "loop"]),
        mount("format/mkdir/overlay", Path::new("overlay"), &options.each_ref().map(String::as_str)),
    ];
    assert_eq!(run(&host, scratch.path(), "cat /file; echo new > /made", mounts), "layer\n");
    assert_eq!(fs::read_to_string(upper.join("made")).unwrap(), "new\n");
    host.assert_nothing_left();
}
