//! The mounts of a spec, each made detached and attached at its place in the container's tree.

use super::options::MountOptions;
use super::tree::{Tree, kind};
use crate::engine::error::{Context, Error, Result};
use crate::engine::idmap;
use crate::sockets;
use crate::sys::mountfd::{self, Attributes, FsContext};
use nix::sys::stat::{SFlag, fstat};
use oci_spec::runtime::Mount;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use vmshim_protocol::agent::SOCKET_SOURCE;
use vmshim_protocol::shared::SOURCE_PREFIX;

/// What mounting needs to know about the container.
pub struct Surroundings<'a> {
    /// The root of the virtio-fs mount.
    pub shared: &'a Path,
    /// The container's own directory in the guest.
    pub directory: &'a Path,
    /// The container's cgroup.
    pub cgroup: &'a Path,
    /// Whether it has a cgroup namespace.
    pub cgroup_namespace: bool,
    /// Whether it has a user namespace, in which some things cannot be mounted anew.
    pub user_namespace: bool,
    /// Whether its network is in a namespace that its user namespace owns.
    pub network_namespace: bool,
}

/// Mounts that become read-only once everything in them is made.
#[derive(Default)]
pub struct Later(Vec<(OwnedFd, String)>);

impl Later {
    /// Makes them so.
    pub fn seal(self) -> Result<()> {
        for (mount, field) in self.0 {
            let read_only = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };
            mountfd::set_attributes(mount.as_fd(), read_only, 0, false)
                .doing(|| format!("make {field} read-only"))?;
        }
        Ok(())
    }
}

/// Makes one mount of the spec.
pub fn make(mount: &Mount, tree: &Tree, around: &Surroundings<'_>, later: &mut Later) -> Result<()> {
    let destination = mount.destination();
    let field = format!("mounts[{}]", destination.display());
    let options = MountOptions::parse(mount.options().as_deref().unwrap_or_default(), &field)?;
    let kind = mount.typ().as_deref().unwrap_or_default();
    let job = Job { mount, destination, field: &field, options: &options, tree, around };
    match kind {
        _ if options.bind.is_some() || kind == "bind" => job.bind(),
        "cgroup" | "cgroup2" => job.cgroup(),
        "" | "none" => Err(Error::invalid(format!("{field}.type"), "is missing")),
        "tmpfs" => job.tmpfs(later),
        "sysfs" if around.user_namespace && !around.network_namespace => job.sysfs_of_guest(),
        _ => job.file_system(kind),
    }
}

struct Job<'a> {
    mount: &'a Mount,
    destination: &'a Path,
    field: &'a str,
    options: &'a MountOptions,
    tree: &'a Tree,
    around: &'a Surroundings<'a>,
}

impl Job<'_> {
    fn bind(&self) -> Result<()> {
        self.refuse_data()?;
        let source = self.source()?;
        let recursive = self.options.bind.unwrap_or(true);
        let detached = mountfd::clone_tree(source.as_fd(), Path::new(""), recursive)
            .doing(|| format!("bind the source of {}", self.field))?;
        self.map_ids(detached.as_fd())?;
        self.attach_like(detached, source.as_fd())
    }

    /// Attaches a detached tree at a directory or file like `model`, with all options.
    fn attach_like(&self, detached: OwnedFd, model: BorrowedFd<'_>) -> Result<()> {
        let stat = fstat(model).doing(|| format!("look at the source of {}", self.field))?;
        let target = if kind(&stat) == SFlag::S_IFDIR {
            self.tree.directory(self.destination)
        } else {
            self.tree.file(self.destination)
        };
        let target = target.doing(|| format!("make the mount point of {}", self.field))?;
        self.set(detached.as_fd(), self.options.attributes)?;
        self.attach(detached.as_fd(), target.as_fd())
    }

    fn cgroup(&self) -> Result<()> {
        if self.around.cgroup_namespace {
            return self.file_system("cgroup2");
        }
        let source = open_location(self.around.cgroup).doing(|| "open the container's cgroup")?;
        let detached = mountfd::clone_tree(source.as_fd(), Path::new(""), false)
            .doing(|| format!("bind the source of {}", self.field))?;
        self.attach_like(detached, source.as_fd())
    }

    /// In a user namespace that does not own the network namespace the kernel refuses a new sysfs.
    fn sysfs_of_guest(&self) -> Result<()> {
        let source = open_location(Path::new("/sys")).doing(|| "open /sys")?;
        let detached = mountfd::clone_tree(source.as_fd(), Path::new(""), true)
            .doing(|| format!("bind the source of {}", self.field))?;
        self.attach_like(detached, source.as_fd())
    }

    /// A tmpfs gets content (device nodes, mount points) before it becomes read-only.
    fn tmpfs(&self, later: &mut Later) -> Result<()> {
        let target = self.directory()?;
        let mut attributes = self.options.attributes.set;
        attributes &= !libc::MOUNT_ATTR_RDONLY;
        let source = self.mount.source().as_deref().unwrap_or(Path::new("tmpfs"));
        let detached = self.new_mount("tmpfs", Some(source), false, attributes)?;
        if self.options.copy_up {
            super::copy::tree(target.as_fd(), detached.as_fd())
                .doing(|| format!("copy the content of {}", self.field))?;
        }
        self.map_ids(detached.as_fd())?;
        self.attach(detached.as_fd(), target.as_fd())?;
        if self.options.read_only() {
            later.0.push((detached, self.field.to_owned()));
        }
        Ok(())
    }

    fn file_system(&self, kind: &str) -> Result<()> {
        let target = self.directory()?;
        if kind == "proc" {
            self.refuse_covered_proc()?;
        }
        let source = self.mount.source().as_deref();
        let set = self.options.attributes.set;
        let detached = self.new_mount(kind, source, self.options.read_only(), set)?;
        self.map_ids(detached.as_fd())?;
        self.attach(detached.as_fd(), target.as_fd())
    }

    fn new_mount(
        &self,
        kind: &str,
        source: Option<&Path>,
        read_only: bool,
        attributes: u64,
    ) -> Result<OwnedFd> {
        let doing = || format!("mount {kind} for {}", self.field);
        let context = FsContext::open(kind).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => {
                Error::unsupported(format!("{}.type", self.field), format!("its kernel has no {kind}"))
            }
            _ => Error::System { action: doing(), source: error },
        })?;
        if let Some(source) = source.and_then(Path::to_str) {
            context.set_string("source", source).doing(doing)?;
        }
        if read_only {
            context.set_flag("ro").doing(doing)?;
        }
        for (key, value) in &self.options.data {
            let result = match value {
                Some(value) => context.set_string(key, value),
                None => context.set_flag(key),
            };
            result.map_err(|error| {
                let reason = context.complaint().unwrap_or_else(|| error.to_string());
                Error::invalid(format!("{} option \"{key}\"", self.field), reason)
            })?;
        }
        context.mount(attributes).doing(doing)
    }

    fn set(&self, mount: BorrowedFd<'_>, attributes: Attributes) -> Result<()> {
        if attributes.is_empty() {
            return Ok(());
        }
        mountfd::set_attributes(mount, attributes, 0, false)
            .doing(|| format!("set the options of {}", self.field))
    }

    fn map_ids(&self, mount: BorrowedFd<'_>) -> Result<()> {
        let (uids, gids) = (self.mount.uid_mappings(), self.mount.gid_mappings());
        let (Some(uids), Some(gids)) = (uids, gids) else {
            return match self.options.id_map {
                Some(_) => Err(Error::invalid(
                    format!("{}.uidMappings", self.field),
                    "is needed by the option \"idmap\"",
                )),
                None => Ok(()),
            };
        };
        let namespace = idmap::namespace(uids, gids)?;
        mountfd::map_ids(mount, namespace.as_fd(), self.options.id_map.unwrap_or(false))
            .doing(|| format!("map the owners of {}", self.field))
    }

    /// Attaches with what reaches below the mount itself.
    fn attach(&self, mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
        mountfd::attach(mount, target).doing(|| format!("mount {}", self.field))?;
        if !self.options.recursive.is_empty() {
            mountfd::set_attributes(mount, self.options.recursive, 0, true)
                .doing(|| format!("set the recursive options of {}", self.field))?;
        }
        for propagation in &self.options.propagation {
            mountfd::set_attributes(mount, Attributes::default(), propagation.kind, propagation.recursive)
                .doing(|| format!("set the propagation of {}", self.field))?;
        }
        Ok(())
    }

    fn directory(&self) -> Result<OwnedFd> {
        self.tree.directory(self.destination).doing(|| format!("make the mount point of {}", self.field))
    }

    fn source(&self) -> Result<OwnedFd> {
        let field = format!("{}.source", self.field);
        let source = self.mount.source().as_deref().ok_or_else(|| Error::invalid(&field, "is missing"))?;
        let strip = |prefix| source.to_str().and_then(|source| source.strip_prefix(prefix));
        if let Some(number) = strip(SOCKET_SOURCE) {
            let number = number.parse::<u32>().map_err(|_| Error::invalid(&field, "names no socket"))?;
            let path = self.around.directory.join(sockets::DIRECTORY).join(number.to_string());
            return open_location(&path).doing(|| format!("open {field} {}", source.display()));
        }
        match strip(SOURCE_PREFIX) {
            Some(relative) => open_shared(self.around.shared, Path::new(relative)),
            None if source.is_absolute() => open_location(source),
            None => return Err(Error::invalid(field, "is neither absolute nor in the shared directory")),
        }
        .doing(|| format!("open {field} {}", source.display()))
    }

    fn refuse_data(&self) -> Result<()> {
        match self.options.data.first() {
            Some((key, _)) => Err(Error::invalid(
                format!("{} option \"{key}\"", self.field),
                "means nothing for a bind mount",
            )),
            None => Ok(()),
        }
    }

    /// An image must not redirect the new proc: the security of a container rests on what is there.
    fn refuse_covered_proc(&self) -> Result<()> {
        if self.destination != Path::new("/proc") {
            return Ok(());
        }
        let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_CLOEXEC;
        let entry = nix::fcntl::openat(self.tree.root(), "proc", flags, nix::sys::stat::Mode::empty());
        let stat = entry.and_then(fstat).doing(|| "look at /proc")?;
        if kind(&stat) == SFlag::S_IFLNK {
            return Err(Error::invalid(self.field, "the image has a symbolic link there"));
        }
        Ok(())
    }
}

/// Opens a location below the shared directory that no link leads out of.
pub fn open_shared(shared: &Path, relative: &Path) -> io::Result<OwnedFd> {
    let root = open_location(shared)?;
    let inside: PathBuf =
        relative.components().filter(|c| !matches!(c, std::path::Component::CurDir)).collect();
    if inside.as_os_str().is_empty() {
        return Ok(root);
    }
    mountfd::open_beneath(root.as_fd(), &inside)
}

/// Opens a location of the guest, links followed.
pub fn open_location(path: &Path) -> io::Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_shared_directory_has_no_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        std::fs::create_dir_all(shared.join("volume")).unwrap();
        std::fs::create_dir(dir.path().join("secret")).unwrap();
        symlink("../secret", shared.join("up")).unwrap();
        symlink("/", shared.join("root")).unwrap();
        symlink("volume", shared.join("fine")).unwrap();
        let open = |path: &str| open_shared(&shared, Path::new(path));
        assert!(open("volume").is_ok());
        assert!(open("fine").is_ok());
        assert!(open(".").is_ok());
        for path in ["up", "root", "../secret", "/etc", "volume/../../secret"] {
            assert!(open(path).is_err(), "{path}");
        }
    }
}
