//! Runtime options as containerd hands them over: an `Any` on `start`'s standard input and in Create.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Message};
use containerd_shim_protos::shim::oci::Options as RuncOptions;

/// What the options ask for, as far as this runtime knows them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// The configuration file to read in place of the default one.
    pub config_path: Option<PathBuf>,
    /// The configuration itself.
    pub config_body: Option<String>,
    /// The cgroup that the shim shall live in.
    pub shim_cgroup: Option<String>,
    /// Owner of the pipes that the shim makes for stdio.
    pub io_uid: u32,
    /// Group of the pipes that the shim makes for stdio.
    pub io_gid: u32,
}

/// Why known options cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Not a message of the type it claims to be.
    #[error("the runtime options of type {type_url} cannot be decoded")]
    Malformed {
        /// The claimed type.
        type_url: String,
        /// Why.
        source: protobuf::Error,
    },
    /// The config body is not text.
    #[error("the configuration in the runtime options is not UTF-8 text")]
    NotText(#[source] std::string::FromUtf8Error),
}

impl RuntimeOptions {
    /// Reads the options. A type that is not known is not an error: clients send other runtimes' options too.
    ///
    /// # Errors
    /// Options of a known type that cannot be decoded.
    pub fn from_any(any: &Any) -> Result<Self, OptionsError> {
        let malformed = |source| OptionsError::Malformed { type_url: any.type_url.clone(), source };
        match any.type_url.rsplit('/').next() {
            Some("runtimeoptions.v1.Options") => {
                let (path, body) = runtime_options_v1(&any.value).map_err(malformed)?;
                let body = String::from_utf8(body).map_err(OptionsError::NotText)?;
                Ok(Self {
                    config_path: Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty()),
                    config_body: Some(body).filter(|body| !body.is_empty()),
                    ..Self::default()
                })
            }
            Some("containerd.runc.v1.Options") => {
                let options = RuncOptions::parse_from_bytes(&any.value).map_err(malformed)?;
                Ok(Self {
                    shim_cgroup: Some(options.shim_cgroup).filter(|path| !path.is_empty()),
                    io_uid: options.io_uid,
                    io_gid: options.io_gid,
                    ..Self::default()
                })
            }
            _ => Ok(Self::default()),
        }
    }
}

/// Fields 2 and 3 of `runtimeoptions.v1.Options`: the path and the body.
fn runtime_options_v1(bytes: &[u8]) -> Result<(String, Vec<u8>), protobuf::Error> {
    const CONFIG_PATH: u32 = 2 << 3 | 2;
    const CONFIG_BODY: u32 = 3 << 3 | 2;
    let mut input = CodedInputStream::from_bytes(bytes);
    let (mut path, mut body) = (String::new(), Vec::new());
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            CONFIG_PATH => path = input.read_string()?,
            CONFIG_BODY => body = input.read_bytes()?,
            other => protobuf::rt::skip_field_for_tag(other, &mut input)?,
        }
    }
    Ok((path, body))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options_any(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.to_owned(), value: value.to_owned(), ..Any::default() }
    }

    #[test]
    fn config_path_and_body_are_found() {
        let options = RuntimeOptions::from_any(&options_any(
            "runtimeoptions.v1.Options",
            b"\x0a\x01t\x12\x02/a\x1a\x03x=1",
        ))
        .unwrap();
        assert_eq!(options.config_path, Some(PathBuf::from("/a")));
        assert_eq!(options.config_body.as_deref(), Some("x=1"));
    }

    #[test]
    fn runc_options_give_the_cgroup_and_the_owner() {
        let runc = RuncOptions { shim_cgroup: "/x".into(), io_uid: 5, ..RuncOptions::default() };
        let bytes = runc.write_to_bytes().unwrap();
        let options =
            RuntimeOptions::from_any(&options_any("types.containerd.io/containerd.runc.v1.Options", &bytes))
                .unwrap();
        assert_eq!((options.shim_cgroup.as_deref(), options.io_uid), (Some("/x"), 5));
    }

    #[test]
    fn unknown_types_are_not_fatal() {
        assert_eq!(
            RuntimeOptions::from_any(&options_any("else", b"\xff")).unwrap(),
            RuntimeOptions::default()
        );
        assert_eq!(RuntimeOptions::from_any(&Any::default()).unwrap(), RuntimeOptions::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for kind in ["runtimeoptions.v1.Options", "containerd.runc.v1.Options"] {
                let _ = RuntimeOptions::from_any(&options_any(kind, &bytes));
            }
        }
    }
}
