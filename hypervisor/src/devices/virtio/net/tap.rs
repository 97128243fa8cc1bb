//! The host's end of a link: a tap of `/dev/net/tun`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_int, iovec};

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
    /// The host refuses what the driver has negotiated.
    #[error("the host refuses to set up the tap")]
    Host(#[source] io::Error),
}

mod request {
    use nix::libc::{c_int, ifreq};

    nix::ioctl_read_bad!(get_interface, 0x8004_54d2, ifreq);
    nix::ioctl_write_ptr_bad!(set_header_size, 0x4004_54d8, c_int);
    nix::ioctl_write_int_bad!(set_offload, 0x4004_54d0);
}

/// What the host may leave to the guest (`TUN_F_*`).
mod offload {
    use nix::libc::c_int;

    pub const CSUM: c_int = 1;
    pub const TSO4: c_int = 2;
    pub const TSO6: c_int = 4;
    pub const ECN: c_int = 8;
}

/// A tap whose frames have a header of [`HEADER`] bytes in front. Reading and writing never wait.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// A stand-in of a test takes no requests.
    #[cfg(test)]
    played: bool,
}

impl Tap {
    /// Takes over a tap.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
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
        set_non_blocking(&fd).map_err(|errno| TapError::Host(errno.into()))?;
        Ok(Self {
            fd,
            #[cfg(test)]
            played: false,
        })
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
        let error = Tap::new(tempfile::tempfile().unwrap().into()).unwrap_err();
        assert!(matches!(error, TapError::NotTap(_)));
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(matches!(Tap::new(socket.into()), Err(TapError::NotTap(_))));
    }
}
