//! Loop devices, by which the host's kernel mounts an image file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;

const GET_FREE: libc::Ioctl = 0x4C82;
const CONFIGURE: libc::Ioctl = 0x4C0A;
const READ_ONLY: u32 = 1;
/// The device is free again when nobody has it open or mounted.
const AUTOCLEAR: u32 = 4;

/// How often another program may take the free device first.
const RACES: usize = 64;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A read-only loop device, which lasts as long as it is open or mounted.
#[derive(Debug)]
pub struct LoopDevice {
    /// Where it is.
    pub path: PathBuf,
    _file: File,
}

impl LoopDevice {
    /// Puts a free device over the file.
    ///
    /// # Errors
    /// When the host has no loop devices.
    pub fn over(image: &OwnedFd) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let mut last = Errno::EBUSY;
        for _ in 0..RACES {
            // SAFETY: the request takes no argument.
            let number = Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE) })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::open(&path)?;
            match configure(&device, image) {
                Ok(()) => return Ok(Self { path, _file: device }),
                Err(Errno::EBUSY) => last = Errno::EBUSY,
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(last.into())
    }
}

fn configure(device: &File, image: &OwnedFd) -> Result<(), Errno> {
    let info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: READ_ONLY | AUTOCLEAR,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let fd = image.as_raw_fd().cast_unsigned();
    let config = Config { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: the request reads a loop_config, as which `config` is laid out, during the call.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE, &raw const config) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
    }
}
