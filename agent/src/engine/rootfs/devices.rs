//! What `/dev` holds: the nodes every container has, those the spec adds, and the usual links.

use super::mounts::open_location;
use super::tree::Tree;
use crate::engine::error::{Context, Error, Result};
use crate::sys::mountfd;
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Name, major, minor: the character devices that the OCI runtime spec promises to every container.
const DEFAULT: &[(&str, u32, u32)] =
    &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

struct Node {
    path: PathBuf,
    kind: SFlag,
    major: u32,
    minor: u32,
    mode: u32,
    owner: (u32, u32),
}

/// Makes the nodes and links.
pub fn make(tree: &Tree, extra: &[LinuxDevice], user_namespace: bool) -> Result<()> {
    for (name, major, minor) in DEFAULT {
        let path = Path::new("/dev").join(name);
        let node =
            Node { path, kind: SFlag::S_IFCHR, major: *major, minor: *minor, mode: 0o666, owner: (0, 0) };
        make_node(tree, &node, user_namespace)?;
    }
    for device in extra {
        let node = Node::of(device)?;
        node.check_present()?;
        make_node(tree, &node, user_namespace)?;
    }
    for (target, link) in LINKS {
        make_link(tree, target, Path::new(link))?;
    }
    if Path::new("/proc/kcore").exists() {
        make_link(tree, "/proc/kcore", Path::new("/dev/core"))?;
    }
    replace_ptmx(tree)
}

impl Node {
    fn of(device: &LinuxDevice) -> Result<Self> {
        let field = format!("linux.devices[{}]", device.path().display());
        let number = |n: i64| {
            u32::try_from(n).map_err(|_| Error::invalid(&field, format!("{n} is not a device number")))
        };
        let (kind, major, minor) = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => {
                (SFlag::S_IFCHR, number(device.major())?, number(device.minor())?)
            }
            LinuxDeviceType::B => (SFlag::S_IFBLK, number(device.major())?, number(device.minor())?),
            LinuxDeviceType::P => (SFlag::S_IFIFO, 0, 0),
            LinuxDeviceType::A => return Err(Error::invalid(field, "a device node cannot be of type \"a\"")),
        };
        Ok(Self {
            path: device.path().clone(),
            kind,
            major,
            minor,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
        })
    }

    /// Where the guest has the device. Only a disk has another name in the container.
    fn guests(&self) -> Result<PathBuf> {
        if self.kind != SFlag::S_IFBLK {
            return Ok(self.path.clone());
        }
        let link = format!("/sys/dev/block/{}:{}", self.major, self.minor);
        let disk =
            std::fs::read_link(&link).doing(|| format!("look for the disk {}", self.path.display()))?;
        Ok(Path::new("/dev").join(disk.file_name().unwrap_or_default()))
    }

    /// The numbers were meant for the host; only a device that the guest has too may get a node.
    fn check_present(&self) -> Result<()> {
        let class = match self.kind {
            SFlag::S_IFCHR => "char",
            SFlag::S_IFBLK => "block",
            _ => return Ok(()),
        };
        if Path::new(&format!("/sys/dev/{class}/{}:{}", self.major, self.minor)).exists() {
            return Ok(());
        }
        Err(Error::unsupported(
            format!("linux.devices[{}]", self.path.display()),
            format!("it has no {class} device {}:{}", self.major, self.minor),
        ))
    }
}

fn make_node(tree: &Tree, node: &Node, user_namespace: bool) -> Result<()> {
    let shown = node.path.display();
    if user_namespace && node.kind != SFlag::S_IFIFO {
        return bind_from_guest(tree, &node.guests()?, &node.path);
    }
    let (parent, name) = tree.parent(&node.path).doing(|| format!("make the directory of {shown}"))?;
    let mode = Mode::from_bits_truncate(node.mode);
    let number = makedev(node.major.into(), node.minor.into());
    match mknodat(&parent, name, node.kind, mode, number) {
        Err(nix::Error::EEXIST) => return Ok(()),
        other => other.doing(|| format!("make the device node {shown}"))?,
    }
    let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
    if node.owner != (0, 0) {
        fchownat(&parent, name, Some(uid), Some(gid), nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)
            .doing(|| format!("give {shown} to its owner"))?;
    }
    Ok(())
}

/// A process in a user namespace may not make nodes, but may use those it is given.
fn bind_from_guest(tree: &Tree, source: &Path, path: &Path) -> Result<()> {
    let doing = || format!("bind the device {}", path.display());
    let source = open_location(source).doing(doing)?;
    let kind = super::tree::kind(&fstat(&source).doing(doing)?);
    if kind != SFlag::S_IFCHR && kind != SFlag::S_IFBLK {
        return Err(Error::invalid(
            format!("linux.devices[{}]", path.display()),
            "is no device in the guest",
        ));
    }
    let detached = mountfd::clone_tree(source.as_fd(), Path::new(""), false).doing(doing)?;
    let target = tree.file(path).doing(doing)?;
    mountfd::attach(detached.as_fd(), target.as_fd()).doing(doing)
}

fn make_link(tree: &Tree, target: &str, link: &Path) -> Result<()> {
    let doing = || format!("make the link {}", link.display());
    let (parent, name) = tree.parent(link).doing(doing)?;
    match symlinkat(target, &parent, name) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        other => other.doing(doing),
    }
}

/// `/dev/ptmx` must be that of the container's own devpts, whatever the image brought along.
fn replace_ptmx(tree: &Tree) -> Result<()> {
    let doing = || "make the link /dev/ptmx";
    let (parent, name) = tree.parent(Path::new("/dev/ptmx")).doing(doing)?;
    match nix::unistd::unlinkat(&parent, name, nix::unistd::UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(nix::Error::ENOENT) => {}
        other => other.doing(doing)?,
    }
    symlinkat("pts/ptmx", &parent, name).doing(doing)
}
