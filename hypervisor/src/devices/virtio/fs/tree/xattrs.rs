//! Extended attributes.
//!
//! What the host's own mechanisms keep there is none of the guest's business: `trusted.*`, overlayfs' marks in either
//! name space, and security modules' labels are neither shown nor taken.

use std::ffi::CStr;

use nix::errno::Errno;

use super::Tree;
use super::inodes::NodeId;
use super::sys;
use super::worker::Worker;

/// The largest value and the longest list that Linux allows.
const MAX: usize = 64 * 1024;

/// Which attributes the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `user.*` and file capabilities.
    Plain,
    /// POSIX access control lists.
    Acl,
    /// Not shown.
    Hidden,
    /// No such name space.
    Unsupported,
}

fn kind(name: &[u8]) -> Kind {
    match name {
        b"security.capability" => Kind::Plain,
        b"system.posix_acl_access" | b"system.posix_acl_default" => Kind::Acl,
        _ if name.starts_with(b"user.overlay.") => Kind::Hidden,
        _ if name.starts_with(b"user.") => Kind::Plain,
        _ if name.starts_with(b"trusted.") || name.starts_with(b"security.") => Kind::Hidden,
        _ => Kind::Unsupported,
    }
}

impl Tree {
    /// An attribute's value, or its length where `size` is 0.
    pub fn getxattr(
        &mut self,
        node: NodeId,
        name: &CStr,
        value: &mut Vec<u8>,
        size: usize,
    ) -> Result<usize, Errno> {
        let inode = self.inodes.get(node)?;
        let kind = kind(name.to_bytes());
        match kind {
            Kind::Hidden => return Err(Errno::ENODATA),
            Kind::Unsupported => return Err(Errno::EOPNOTSUPP),
            Kind::Plain | Kind::Acl => {}
        }
        match sys::get_xattr(inode.fd(), name, value, size.min(MAX)) {
            // To the guest's kernel that is a reason to refuse access, where "no list" is meant.
            Err(Errno::EOPNOTSUPP) if kind == Kind::Acl => Err(Errno::ENODATA),
            result => result,
        }
    }

    /// The names of the attributes, or their length where `size` is 0.
    pub fn listxattr(&mut self, node: NodeId, names: &mut Vec<u8>, size: usize) -> Result<usize, Errno> {
        sys::list_xattr(self.inodes.get(node)?.fd(), names, MAX)?;
        let shown: Vec<u8> = names
            .split_inclusive(|&byte| byte == 0)
            .filter(|name| matches!(kind(name.strip_suffix(b"\0").unwrap_or(name)), Kind::Plain | Kind::Acl))
            .flatten()
            .copied()
            .collect();
        *names = shown;
        let length = names.len();
        match size {
            0 => names.clear(),
            size if size < length => return Err(Errno::ERANGE),
            _ => {}
        }
        Ok(length)
    }

    /// Sets an attribute. An access ACL set by a `privileged` process leaves the set-group-id bit.
    pub fn setxattr(
        &mut self,
        worker: &Worker,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
        privileged: bool,
    ) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        may_change(name)?;
        let flags = i32::try_from(flags).map_err(|_| Errno::EINVAL)?;
        let keep = privileged && kind(name.to_bytes()) == Kind::Acl && inode.has_set_id();
        worker.keeping_set_id(keep, || sys::set_xattr(inode.fd(), name, value, flags))
    }

    /// Removes an attribute.
    pub fn removexattr(&mut self, node: NodeId, name: &CStr) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        may_change(name)?;
        sys::remove_xattr(inode.fd(), name)
    }
}

fn may_change(name: &CStr) -> Result<(), Errno> {
    match kind(name.to_bytes()) {
        Kind::Plain | Kind::Acl => Ok(()),
        Kind::Hidden => Err(Errno::EPERM),
        Kind::Unsupported => Err(Errno::EOPNOTSUPP),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_keeps_for_itself_is_hidden() {
        for (name, expected) in [
            (&b"user.a"[..], Kind::Plain),
            (b"security.capability", Kind::Plain),
            (b"system.posix_acl_access", Kind::Acl),
            (b"trusted.overlay.opaque", Kind::Hidden),
            (b"user.overlay.whiteout", Kind::Hidden),
            (b"security.selinux", Kind::Hidden),
            (b"system.nfs4_acl", Kind::Unsupported),
            (b"", Kind::Unsupported),
        ] {
            assert_eq!(kind(name), expected, "{name:?}");
        }
    }
}
