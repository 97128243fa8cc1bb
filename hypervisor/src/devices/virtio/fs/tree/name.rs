//! Names that the guest gives.

use std::ffi::CStr;

use nix::errno::Errno;

/// One component of a path: not empty, no slash, neither `.` nor `..`, and not longer than any file system takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

/// `NAME_MAX` of every Linux file system.
const MAX: usize = 255;

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    /// `ENAMETOOLONG`, or `EINVAL` for what is no name.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        let bytes = name.to_bytes();
        if bytes.len() > MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno::EINVAL);
        }
        Ok(Self(name))
    }

    /// The name.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_are_names() {
        for good in [c"a", c"...", c"..a", c".a", c"a b\n", c"\xff"] {
            assert_eq!(Name::new(good).unwrap().as_c_str(), good);
        }
        for bad in [c"", c".", c"..", c"/", c"a/b", c"../x", c"a/"] {
            assert_eq!(Name::new(bad), Err(Errno::EINVAL), "{bad:?}");
        }
        let long = std::ffi::CString::new(vec![b'x'; 256]).unwrap();
        assert_eq!(Name::new(&long), Err(Errno::ENAMETOOLONG));
    }
}
