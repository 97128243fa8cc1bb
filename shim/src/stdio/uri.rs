//! Addresses of standard streams.

use std::path::PathBuf;

use super::StdioError;

/// Where a stream leads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Target {
    /// Nowhere.
    #[default]
    None,
    /// A fifo, or whatever file has the path.
    Fifo(PathBuf),
    /// A file to append to, made with its directories where it is missing.
    File(PathBuf),
    /// A client's stream of that name, on the shim's own connection.
    Stream(String),
    /// A program that reads the output.
    Binary {
        /// The program.
        path: PathBuf,
        /// Its arguments: names and values in turn.
        args: Vec<String>,
        /// How it says that it is ready.
        ready: Ready,
    },
}

/// How a logger says that it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// It closes the descriptor, which its death does too.
    Close,
    /// It writes a byte first.
    Byte,
}

impl Target {
    /// Parses an address: a path, or a URI.
    ///
    /// # Errors
    /// Schemes that are not supported and paths that are not absolute.
    pub fn parse(text: &str) -> Result<Self, StdioError> {
        if text.is_empty() {
            return Ok(Self::None);
        }
        let unsupported = || StdioError::Unsupported(text.chars().take(256).collect());
        let Some((scheme, rest)) = text.split_once("://") else {
            return if text.starts_with('/') { Ok(Self::Fifo(text.into())) } else { Err(unsupported()) };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if scheme == "ttrpc+unix" {
            // The address is the shim's own; it is the client that needs it.
            return stream_name(query).map(Self::Stream).ok_or_else(unsupported);
        }
        let path = percent_decode(path).filter(|path| path.starts_with('/')).ok_or_else(unsupported)?;
        match scheme {
            "fifo" => Ok(Self::Fifo(path.into())),
            "file" => Ok(Self::File(path.into())),
            "binary" | "binary-v2" => {
                let ready = if scheme == "binary" { Ready::Close } else { Ready::Byte };
                let args = arguments(query).ok_or_else(unsupported)?;
                Ok(Self::Binary { path: path.into(), args, ready })
            }
            _ => Err(unsupported()),
        }
    }
}

/// The stream that a query names.
fn stream_name(query: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix("streaming_id="))?;
    percent_decode(&value.replace('+', " ")).filter(|name| !name.is_empty())
}

/// Names and values of a query in turn, as runc's shim hands them on: a name without a value has an empty one, and of
/// several values of a name the first counts.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut args: Vec<String> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let name = percent_decode(&name.replace('+', " "))?;
        let value = percent_decode(&value.replace('+', " "))?;
        if !args.iter().step_by(2).any(|known| *known == name) {
            args.extend([name, value]);
        }
    }
    Some(args)
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes().iter();
    while let Some(byte) = rest.next() {
        let decoded = match byte {
            b'%' => {
                let digits = [*rest.next()?, *rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => *byte,
        };
        bytes.push(decoded);
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Target {
        Target::parse(text).unwrap()
    }

    #[test]
    fn every_form_is_understood() {
        assert_eq!(parse(""), Target::None);
        assert_eq!(parse("/run/f"), Target::Fifo("/run/f".into()));
        assert_eq!(parse("fifo:///run/a%20b"), Target::Fifo("/run/a b".into()));
        assert_eq!(parse("file:///var/log/x?y"), Target::File("/var/log/x".into()));
        assert_eq!(
            parse("binary:///bin/l?a=1&flag&b=x%2Fy+z&a=2"),
            Target::Binary {
                path: "/bin/l".into(),
                args: ["a", "1", "flag", "", "b", "x/y z"].map(str::to_owned).to_vec(),
                ready: Ready::Close,
            }
        );
        assert_eq!(
            parse("ttrpc+unix:///run/s.sock?streaming_id=a%2Fb-stdout"),
            Target::Stream("a/b-stdout".into())
        );
        assert!(matches!(parse("binary-v2:///bin/l"), Target::Binary { ready: Ready::Byte, .. }));
    }

    #[test]
    fn the_rest_is_refused() {
        for text in [
            "relative",
            "http:///x",
            "fifo://",
            "file://rel",
            "fifo:///%zz",
            "fifo:///%0",
            "binary:///b?%",
            "ttrpc+unix:///x",
        ] {
            assert!(Target::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "((fifo|file|binary|ttrpc[+]unix)://)?.{0,40}") {
            let _ = Target::parse(&text);
        }
    }
}
