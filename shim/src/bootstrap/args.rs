//! The command line, in the manner of Go's `flag` package: `-name value`, `-name=value`, one or two dashes, flags
//! before the action.

use std::path::PathBuf;

/// Printed for `--help`.
pub const USAGE: &str = "\
containerd-shim-vmshim-v2: runs each pod in a KVM microVM of its own. containerd starts it; see `ctr run --runtime
io.containerd.vmshim.v2`.

usage: containerd-shim-vmshim-v2 [flags] start|delete
  -namespace NAME        containerd namespace
  -id ID                 container id
  -address SOCKET        containerd's socket
  -publish-binary PATH   accepted and not used: events go to TTRPC_ADDRESS
  -bundle DIR            bundle, for delete
  -debug                 log at debug level, with the guest's log
  -info                  describe the runtime, as a protobuf message
  -v, -version           print the version
  -h, -help              print this
";

/// What the shim is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Begin to serve a container or pod, and print the address.
    Start,
    /// Undo whatever a container left behind.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
    /// Print the usage.
    Help,
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// What to do.
    pub action: Action,
    /// Value of `-namespace`.
    pub namespace: String,
    /// Value of `-id`.
    pub id: String,
    /// Value of `-address`.
    pub address: String,
    /// Value of `-bundle`.
    pub bundle: Option<PathBuf>,
    /// Whether `-debug` is given.
    pub debug: bool,
}

/// Why a command line is not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// A flag that does not exist.
    #[error("unknown flag {0}; see -help")]
    UnknownFlag(String),
    /// A flag without its value.
    #[error("flag -{0} needs a value")]
    MissingValue(String),
    /// An action that does not exist, or none.
    #[error("the action must be start or delete, not {0:?}; see -help")]
    UnknownAction(String),
}

impl Invocation {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    /// Unknown flags and actions, and missing values.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut parsed = Self {
            action: Action::Help,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            debug: false,
        };
        let mut special = None;
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                parsed.action = special.unwrap_or(action(&arg)?);
                return Ok(parsed);
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let switched_on = inline.as_deref() != Some("false");
            match name {
                "debug" => parsed.debug = switched_on,
                "info" if switched_on => special = Some(Action::Info),
                "v" | "version" if switched_on => special = Some(Action::Version),
                "h" | "help" if switched_on => special = Some(Action::Help),
                "info" | "v" | "version" | "h" | "help" => {}
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" => {
                    let value = inline
                        .or_else(|| args.next())
                        .ok_or_else(|| ArgsError::MissingValue(name.to_owned()))?;
                    match name {
                        "namespace" => parsed.namespace = value,
                        "id" => parsed.id = value,
                        "address" => parsed.address = value,
                        "bundle" => parsed.bundle = Some(PathBuf::from(value)),
                        _ => {}
                    }
                }
                _ => return Err(ArgsError::UnknownFlag(arg)),
            }
        }
        parsed.action = special.ok_or_else(|| ArgsError::UnknownAction(String::new()))?;
        Ok(parsed)
    }
}

fn action(text: &str) -> Result<Action, ArgsError> {
    match text {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        other => Err(ArgsError::UnknownAction(other.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Invocation, ArgsError> {
        Invocation::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_own_calls_are_understood() {
        let start = parse(
            "-namespace default -address /run/c.sock -publish-binary /bin/containerd -id x -debug start",
        )
        .unwrap();
        assert_eq!((start.action, start.debug), (Action::Start, true));
        assert_eq!(
            (start.namespace.as_str(), start.id.as_str(), start.address.as_str()),
            ("default", "x", "/run/c.sock")
        );
        let delete = parse("-namespace n -address a -publish-binary p -id x -bundle /b delete").unwrap();
        assert_eq!((delete.action, delete.bundle), (Action::Delete, Some(PathBuf::from("/b"))));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("--namespace=n --help").unwrap().action, Action::Help);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parse("-foo start"), Err(ArgsError::UnknownFlag("-foo".into())));
        assert_eq!(parse("-id"), Err(ArgsError::MissingValue("id".into())));
        assert_eq!(parse("-id x stop"), Err(ArgsError::UnknownAction("stop".into())));
        assert!(parse("").is_err());
    }

    proptest! {
        #[test]
        fn any_line_is_parsed_or_refused(args in proptest::collection::vec("(-{0,2}[a-z=]{0,10})", 0..6)) {
            let _ = Invocation::parse(args);
        }
    }
}
