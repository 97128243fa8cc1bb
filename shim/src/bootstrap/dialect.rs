//! The languages in which containerd talks to `start`.
//!
//! containerd 1.6 to 2.2 writes the runtime options, a `google.protobuf.Any`, and reads a plain address (all) or JSON
//! (2.0 on). containerd 2.3 writes `BootstrapParams` and reads `BootstrapResult`. The two messages decode as one
//! another, so it is the content that tells: a `BootstrapParams` repeats the id and namespace of the command line.

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{EnumOrUnknown, Message};

/// The most that is read from standard input.
pub const MAX_STDIN: u64 = 10 << 20;

/// What the caller says on standard input.
#[derive(Debug, Default, PartialEq)]
pub struct Request {
    /// Whether the reply is to be protobuf.
    protobuf: bool,
    /// Every message that may be runtime options.
    pub options: Vec<Any>,
    /// Whether a level below info is asked for.
    pub debug: bool,
    /// containerd's ttrpc address.
    pub ttrpc_address: Option<String>,
    /// containerd's own address.
    pub grpc_address: Option<String>,
    /// Where to put the socket.
    pub socket_dir: Option<String>,
}

/// Standard input is neither of the two messages.
#[derive(Debug, thiserror::Error)]
#[error("standard input holds neither runtime options nor bootstrap parameters")]
pub struct StdinError(#[source] protobuf::Error);

impl Request {
    /// Reads standard input's bytes; `id` and `namespace` come from the command line.
    ///
    /// # Errors
    /// Bytes that are neither message.
    pub fn parse(bytes: &[u8], id: &str, namespace: &str) -> Result<Self, StdinError> {
        if let Ok(params) = BootstrapParams::parse_from_bytes(bytes)
            && !bytes.is_empty()
            && params.instance_id == id
            && params.namespace == namespace
        {
            return Ok(Self::from_params(params));
        }
        let any = Any::parse_from_bytes(bytes).map_err(StdinError)?;
        let options = if any.type_url.is_empty() { Vec::new() } else { vec![any] };
        Ok(Self { options, ..Self::default() })
    }

    fn from_params(params: BootstrapParams) -> Self {
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            protobuf: true,
            debug: is_debug(params.log_level),
            ttrpc_address: given(params.containerd_ttrpc_address),
            grpc_address: given(params.containerd_grpc_address),
            socket_dir: params.socket_dir.and_then(given),
            options: params
                .extensions
                .into_iter()
                .filter_map(|extension| extension.value.into_option())
                .collect(),
        }
    }

    /// The reply for standard output. `sandboxer` says that the caller is containerd's sandbox controller, which
    /// needs the third version of the task service.
    ///
    /// # Errors
    /// When the message cannot be encoded.
    pub fn reply(&self, address: &str, sandboxer: bool) -> Result<Vec<u8>, protobuf::Error> {
        if self.protobuf {
            // The last byte must not be white space: containerd 2.3.0 to 2.3.3 trim the message.
            let result = BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            };
            return result.write_to_bytes();
        }
        if sandboxer {
            let reply = serde_json::json!({ "version": 3, "address": address, "protocol": "ttrpc" });
            return Ok(reply.to_string().into_bytes());
        }
        Ok(address.as_bytes().to_vec())
    }
}

fn is_debug(level: EnumOrUnknown<LogLevel>) -> bool {
    level.value() < 0
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;
    use containerd_shim_protos::protobuf::MessageField;
    use proptest::prelude::*;

    use super::*;

    fn options() -> Any {
        Any { type_url: "runtimeoptions.v1.Options".into(), value: b"\x12\x02/a".to_vec(), ..Any::default() }
    }

    #[test]
    fn old_daemons_get_a_plain_address() {
        for bytes in [options().write_to_bytes().unwrap(), Vec::new()] {
            let request = Request::parse(&bytes, "id", "ns").unwrap();
            assert_eq!(request.reply("unix:///s", false).unwrap(), b"unix:///s");
            assert_eq!(request.options.len(), usize::from(!bytes.is_empty()));
        }
    }

    #[test]
    fn the_sandbox_controller_gets_version_three_as_json() {
        let reply = Request::default().reply("unix:///s", true).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&reply).unwrap();
        assert_eq!(json, serde_json::json!({ "version": 3, "address": "unix:///s", "protocol": "ttrpc" }));
    }

    #[test]
    fn new_daemons_get_protobuf() {
        let params = BootstrapParams {
            instance_id: "id".into(),
            namespace: "ns".into(),
            log_level: EnumOrUnknown::from_i32(-4),
            containerd_ttrpc_address: "/t".into(),
            socket_dir: Some("/s".into()),
            extensions: vec![Extension { value: MessageField::some(options()), ..Extension::default() }],
            ..BootstrapParams::default()
        };
        let request = Request::parse(&params.write_to_bytes().unwrap(), "id", "ns").unwrap();
        assert!(request.debug);
        assert_eq!(
            (request.ttrpc_address.as_deref(), request.socket_dir.as_deref()),
            (Some("/t"), Some("/s"))
        );
        assert_eq!(request.options, [options()]);
        let reply = request.reply("unix:///s", true).unwrap();
        assert!(!reply.last().unwrap().is_ascii_whitespace());
        assert_eq!(BootstrapResult::parse_from_bytes(&reply).unwrap().address, "unix:///s");
    }

    #[test]
    fn options_that_look_like_parameters_stay_options() {
        let request = Request::parse(&options().write_to_bytes().unwrap(), "other", "ns").unwrap();
        assert_eq!(request.options, [options()]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Request::parse(&bytes, "id", "ns");
        }
    }
}
