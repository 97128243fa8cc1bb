//! The descriptors that came with a request, by what they are for.

use std::os::fd::OwnedFd;

use vmshim_protocol::control::FdRole;

/// Why a request's descriptors do not fit it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DescriptorError {
    /// The request says another number than came.
    #[error("the request names {named} descriptors and {came} came along")]
    Count {
        /// In the message.
        named: usize,
        /// In the packet.
        came: usize,
    },
    /// Needed and not there.
    #[error("the request needs a descriptor of the role {0:?}")]
    Missing(FdRole),
    /// There and not needed.
    #[error("the request has no use for a descriptor of the role {0:?}, or not for a second one")]
    Unused(FdRole),
}

/// Descriptors that are taken out one by one; what is left is closed.
#[derive(Debug)]
pub struct Descriptors(Vec<(FdRole, OwnedFd)>);

impl Descriptors {
    /// Pairs each role with its descriptor.
    pub fn new(roles: &[FdRole], fds: Vec<OwnedFd>) -> Result<Self, DescriptorError> {
        if roles.len() != fds.len() {
            return Err(DescriptorError::Count { named: roles.len(), came: fds.len() });
        }
        Ok(Self(roles.iter().copied().zip(fds).collect()))
    }

    /// The descriptor of a role.
    pub fn take(&mut self, role: FdRole) -> Result<OwnedFd, DescriptorError> {
        self.take_optional(role).ok_or(DescriptorError::Missing(role))
    }

    /// The descriptor of a role, where there is one.
    pub fn take_optional(&mut self, role: FdRole) -> Option<OwnedFd> {
        let index = self.0.iter().position(|(this, _)| *this == role)?;
        Some(self.0.swap_remove(index).1)
    }

    /// All descriptors that are ends of a stream.
    pub fn take_streams(&mut self) -> Vec<(FdRole, OwnedFd)> {
        let is_stream =
            |role| matches!(role, FdRole::StreamSocket | FdRole::StreamSource | FdRole::StreamSink);
        self.0.extract_if(.., |(role, _)| is_stream(*role)).collect()
    }

    /// All descriptors of a role, in their order.
    pub fn take_all(&mut self, wanted: FdRole) -> Vec<OwnedFd> {
        self.0.extract_if(.., |(role, _)| *role == wanted).map(|(_, fd)| fd).collect()
    }

    /// Nothing else may have come: a descriptor that is silently closed would be a riddle to who sent it.
    pub fn expect_only(&self, roles: &[FdRole]) -> Result<(), DescriptorError> {
        let mut left = roles.to_vec();
        for (role, _) in &self.0 {
            let index = left.iter().position(|this| this == role).ok_or(DescriptorError::Unused(*role))?;
            left.swap_remove(index);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fds(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn each_role_is_taken_once() {
        let mut descriptors = Descriptors::new(&[FdRole::Kvm, FdRole::Kernel], fds(2)).unwrap();
        assert!(descriptors.take(FdRole::Kernel).is_ok());
        assert_eq!(descriptors.take(FdRole::Kernel).unwrap_err(), DescriptorError::Missing(FdRole::Kernel));
        assert!(descriptors.take_optional(FdRole::Disk).is_none());
    }

    #[test]
    fn what_a_request_has_no_use_for_is_refused() {
        let descriptors = Descriptors::new(&[FdRole::Kvm, FdRole::Kvm], fds(2)).unwrap();
        let twice = Err(DescriptorError::Unused(FdRole::Kvm));
        assert_eq!(descriptors.expect_only(&[FdRole::Kvm, FdRole::Disk]), twice);
        assert_eq!(descriptors.expect_only(&[]), twice);
        assert_eq!(descriptors.expect_only(&[FdRole::Kvm, FdRole::Kvm]), Ok(()));
    }

    #[test]
    fn numbers_must_agree() {
        let error = Descriptors::new(&[FdRole::Kvm], fds(2)).unwrap_err();
        assert_eq!(error, DescriptorError::Count { named: 1, came: 2 });
    }

    #[test]
    fn streams_come_together() {
        let roles = [FdRole::StreamSink, FdRole::Disk, FdRole::StreamSource, FdRole::Disk];
        let mut descriptors = Descriptors::new(&roles, fds(4)).unwrap();
        assert_eq!(descriptors.take_streams().len(), 2);
        assert_eq!(descriptors.take_all(FdRole::Disk).len(), 2);
        assert!(descriptors.take_all(FdRole::Disk).is_empty());
    }
}
