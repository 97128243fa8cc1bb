//! Names that become parts of paths.

use std::fmt;

/// Bytes of the longest name; containerd allows 76.
const MAX_LENGTH: usize = 128;

/// A name is not one that containerd can have checked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a valid name: use letters, digits, '.', '_', '-' and '#', beginning with a letter or digit"
)]
pub struct InvalidName(String);

/// A container id, sandbox id or namespace: one harmless path component.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// Checks a name by containerd's own rule, with '#', which other clients of a shim number their sandboxes with.
    ///
    /// # Errors
    /// Anything that could be more, or less, than one path component.
    pub fn new(text: &str) -> Result<Self, InvalidName> {
        let harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"._-#".contains(&byte);
        let begins_well = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if begins_well && text.len() <= MAX_LENGTH && text.bytes().all(harmless) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName(text.chars().take(MAX_LENGTH).collect()))
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn containerds_names_pass() {
        for name in ["default", "k8s.io", "a", "0123456789abcdef", "my_app-1.2", "test#01"] {
            assert_eq!(Name::new(name).unwrap().as_str(), name);
        }
    }

    proptest! {
        #[test]
        fn a_name_is_one_path_component(text in ".{0,150}") {
            if let Ok(name) = Name::new(&text) {
                let mut parts = std::path::Path::new(name.as_str()).components();
                prop_assert!(matches!(parts.next(), Some(std::path::Component::Normal(_))));
                prop_assert!(parts.next().is_none());
            }
        }
    }
}
