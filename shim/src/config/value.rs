//! The types that a setting can have.

use std::path::PathBuf;

use toml::de::DeValue;

/// A value of a configuration file.
pub(super) trait Setting: Sized {
    /// Reads the value; the error completes "`key` …".
    fn read(value: &DeValue<'_>) -> Result<Self, String>;

    /// Writes the value as TOML.
    #[cfg(test)]
    fn show(&self) -> String;
}

fn text<'v>(value: &'v DeValue<'_>) -> Result<&'v str, String> {
    value.as_str().ok_or_else(|| format!("must be a string in quotes, not {}", article(value)))
}

pub(super) fn article(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'i']) { "an" } else { "a" };
    format!("{article} {kind}")
}

#[cfg(test)]
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

macro_rules! integer_settings {
    ($($kind:ty),+) => { $(
        impl Setting for $kind {
            fn read(value: &DeValue<'_>) -> Result<Self, String> {
                let integer =
                    value.as_integer().ok_or_else(|| format!("must be a whole number, not {}", article(value)))?;
                <$kind>::from_str_radix(integer.as_str(), integer.radix())
                    .map_err(|_| format!("must be from {} to {}", <$kind>::MIN, <$kind>::MAX))
            }

            #[cfg(test)]
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )+ };
}

integer_settings!(u8, u32);

impl Setting for bool {
    fn read(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| format!("must be true or false, not {}", article(value)))
    }

    #[cfg(test)]
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for String {
    fn read(value: &DeValue<'_>) -> Result<Self, String> {
        text(value).map(str::to_owned)
    }

    #[cfg(test)]
    fn show(&self) -> String {
        quoted(self)
    }
}

impl Setting for PathBuf {
    fn read(value: &DeValue<'_>) -> Result<Self, String> {
        let path = Self::from(text(value)?);
        if path.is_absolute() { Ok(path) } else { Err("must be an absolute path".to_owned()) }
    }

    #[cfg(test)]
    fn show(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Failures only.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what an operator wants to know.
    Info,
    /// And everything that the guest and the VMM say.
    Debug,
}

impl LogLevel {
    const NAMES: [(&'static str, Self); 4] =
        [("error", Self::Error), ("warn", Self::Warn), ("info", Self::Info), ("debug", Self::Debug)];
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
        }
    }
}

impl Setting for LogLevel {
    fn read(value: &DeValue<'_>) -> Result<Self, String> {
        let name = text(value)?;
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, level)| *level)
            .ok_or_else(|| "must be \"error\", \"warn\", \"info\" or \"debug\"".to_owned())
    }

    #[cfg(test)]
    fn show(&self) -> String {
        let name = Self::NAMES.iter().find(|(_, level)| level == self).map_or("", |(name, _)| *name);
        quoted(name)
    }
}
