//! The host's end of a link: a tap of `/dev/net/tun`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_int, c_short, c_uint, iovec};

use super::feature;
use super::header::HEADER;

/// Why a descriptor cannot be a slot's tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Something else.
    #[error("the descriptor is not a tap")]
    NotTap(#[source] io::Error),
    /// A tap that speaks another way.
    #[error("the tap must be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Mode,
    /// Another number of queues.
    #[error("the slot needs {needed} queues of its tap, and {came} came along")]
    Queues {
        /// Descriptors that came.
        came: usize,
        /// Queue pairs of the slot.
        needed: usize,
    },
    /// The host refuses what the driver has negotiated.
    #[error("the host refuses to set up the tap")]
    Host(#[source] io::Error),
}

mod request {
    use nix::libc::{c_int, c_uint, ifreq};

    nix::ioctl_read_bad!(get_features, 0x8004_54cf, c_uint);
    nix::ioctl_read_bad!(get_interface, 0x8004_54d2, ifreq);
    nix::ioctl_write_ptr_bad!(set_header_size, 0x4004_54d8, c_int);
    nix::ioctl_write_int_bad!(set_offload, 0x4004_54d0);
    nix::ioctl_write_ptr_bad!(set_queue, 0x4004_54d9, ifreq);
}

/// What the host may leave to the guest (`TUN_F_*`).
mod offload {
    use nix::libc::c_int;

    pub const CSUM: c_int = 1;
    pub const TSO4: c_int = 2;
    pub const TSO6: c_int = 4;
    pub const ECN: c_int = 8;
}

/// What the host calls the use of a queue (`TUNSETQUEUE`).
mod queue {
    use nix::libc::c_short;

    pub const ATTACH: c_short = 0x0200;
    pub const DETACH: c_short = 0x0400;
}

/// A queue of a tap whose frames have a header of [`HEADER`] bytes in front. Reading and writing never wait.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// A stand-in of a test takes no requests.
    #[cfg(test)]
    played: bool,
}

impl Tap {
    /// Takes over the queues of one tap, of which all but the first are detached.
    pub fn all(fds: Vec<OwnedFd>) -> Result<Vec<Self>, TapError> {
        let mut fds = fds.into_iter();
        let first = fds.next().map(Self::new);
        first.into_iter().chain(fds.map(Self::detached)).collect()
    }

    /// Takes over a queue that is detached, of which the host says no more than whose it is.
    fn detached(fd: OwnedFd) -> Result<Self, TapError> {
        let mut features: c_uint = 0;
        // SAFETY: the request fills the number.
        unsafe { request::get_features(fd.as_raw_fd(), &raw mut features) }
            .map_err(|errno| TapError::NotTap(errno.into()))?;
        Self::of(fd)
    }

    fn new(fd: OwnedFd) -> Result<Self, TapError> {
        // SAFETY: `ifreq` is a plain structure, all zero is a valid value of it.
        let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the request fills the structure.
        unsafe { request::get_interface(fd.as_raw_fd(), &raw mut interface) }
            .map_err(|errno| TapError::NotTap(errno.into()))?;
        // SAFETY: the call before has filled in this member of the union.
        let flags = c_int::from(unsafe { interface.ifr_ifru.ifru_flags });
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & needed != needed {
            return Err(TapError::Mode);
        }
        let size = c_int::try_from(HEADER).map_err(|_| TapError::Mode)?;
        // SAFETY: the request reads one number.
        unsafe { request::set_header_size(fd.as_raw_fd(), &raw const size) }
            .map_err(|errno| TapError::Host(errno.into()))?;
        Self::of(fd)
    }

    fn of(fd: OwnedFd) -> Result<Self, TapError> {
        set_non_blocking(&fd).map_err(|errno| TapError::Host(errno.into()))?;
        Ok(Self {
            fd,
            #[cfg(test)]
            played: false,
        })
    }

    /// Lets the host put frames into a queue that is detached.
    pub fn attach(&self) -> Result<(), TapError> {
        self.set_queue(queue::ATTACH)
    }

    /// Has the host drop what is in the queue, and put no more into it.
    pub fn detach(&self) -> Result<(), TapError> {
        self.set_queue(queue::DETACH)
    }

    fn set_queue(&self, to: c_short) -> Result<(), TapError> {
        #[cfg(test)]
        if self.played {
            return Ok(());
        }
        // SAFETY: `ifreq` is a plain structure, all zero is a valid value of it.
        let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
        interface.ifr_ifru.ifru_flags = to;
        // SAFETY: the request reads the structure.
        unsafe { request::set_queue(self.fd.as_raw_fd(), &raw const interface) }
            .map(drop)
            .map_err(|errno| TapError::Host(errno.into()))
    }

    /// Lets the host leave to the guest what its driver has said it can do.
    pub fn offload(&self, features: u64) -> Result<(), TapError> {
        #[cfg(test)]
        if self.played {
            return Ok(());
        }
        let has = |bit: u64, flag| if features & bit != 0 { flag } else { 0 };
        // Segmentation means that checksums are left out too.
        let flags = match has(feature::GUEST_CSUM, offload::CSUM) {
            0 => 0,
            checksum => {
                checksum
                    | has(feature::GUEST_TSO4, offload::TSO4)
                    | has(feature::GUEST_TSO6, offload::TSO6)
                    | has(feature::GUEST_ECN, offload::ECN)
            }
        };
        // SAFETY: the request takes a number.
        unsafe { request::set_offload(self.fd.as_raw_fd(), flags) }
            .map(drop)
            .map_err(|errno| TapError::Host(errno.into()))
    }

    /// Reads one frame with its header into `vectors`, which are valid for that.
    ///
    /// # Safety
    /// Each vector is memory that may be written at any time.
    pub unsafe fn read(&self, vectors: &[iovec]) -> nix::Result<usize> {
        let count = c_int::try_from(vectors.len()).unwrap_or(c_int::MAX);
        // SAFETY: the vectors are valid by the caller's word, and there are as many as is said.
        let read = unsafe { libc::readv(self.fd.as_raw_fd(), vectors.as_ptr(), count) };
        Errno::result(read).map(|count| usize::try_from(count).unwrap_or(0))
    }

    /// Writes one frame with its header.
    ///
    /// # Safety
    /// Each vector is memory that may be read.
    pub unsafe fn write(&self, vectors: &[iovec]) -> nix::Result<()> {
        let count = c_int::try_from(vectors.len()).unwrap_or(c_int::MAX);
        // SAFETY: the vectors are valid by the caller's word, and there are as many as is said.
        Errno::result(unsafe { libc::writev(self.fd.as_raw_fd(), vectors.as_ptr(), count) }).map(drop)
    }
}

fn set_non_blocking(fd: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
impl Tap {
    /// A socket that keeps the bounds of packets in place of a tap.
    pub fn played(socket: std::os::unix::net::UnixDatagram) -> Self {
        socket.set_nonblocking(true).unwrap();
        Self { fd: socket.into(), played: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_else_is_refused() {
        for take in [Tap::new, Tap::detached] {
            let error = take(tempfile::tempfile().unwrap().into()).unwrap_err();
            assert!(matches!(error, TapError::NotTap(_)));
        }
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(matches!(Tap::new(socket.into()), Err(TapError::NotTap(_))));
    }
}
