//! Taking a request's body apart.

use std::ffi::CStr;

use nix::errno::Errno;
use vm_memory::ByteValued;

use super::tree::Name;

/// What follows a request's header, copied out of guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Body<'a>(pub &'a [u8]);

impl<'a> Body<'a> {
    /// The next message.
    ///
    /// # Errors
    /// `EINVAL` when the body is shorter.
    pub fn message<T: ByteValued + Default>(&mut self) -> Result<T, Errno> {
        let (bytes, rest) = self.0.split_at_checked(size_of::<T>()).ok_or(Errno::EINVAL)?;
        let mut message = T::default();
        message.as_mut_slice().copy_from_slice(bytes);
        self.0 = rest;
        Ok(message)
    }

    /// The next terminated string.
    ///
    /// # Errors
    /// `EINVAL` when no terminator comes.
    pub fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::EINVAL)?;
        self.0 = self.0.get(string.count_bytes() + 1..).unwrap_or_default();
        Ok(string)
    }

    /// The next terminated string, a name.
    ///
    /// # Errors
    /// As [`Body::string`] and [`Name::new`].
    pub fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.string()?)
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// `EINVAL` when the body is shorter.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire;
    use super::*;

    #[test]
    fn a_body_is_taken_apart_in_order() {
        let mut bytes = wire::MkdirIn { mode: 0o755, umask: 0o22 }.as_slice().to_vec();
        bytes.extend_from_slice(b"name\0value");
        let mut body = Body(&bytes);
        assert_eq!(body.message::<wire::MkdirIn>().unwrap().umask, 0o22);
        assert_eq!(body.name().unwrap().as_c_str(), c"name");
        assert_eq!(body.bytes(6), Err(Errno::EINVAL));
        assert_eq!(body.bytes(5).unwrap(), b"value");
        assert_eq!(body.string(), Err(Errno::EINVAL));
        assert_eq!(body.message::<wire::LinkIn>(), Err(Errno::EINVAL));
    }
}
