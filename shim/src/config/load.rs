//! Finds, reads and merges the configuration files.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::schema::{Config, KeyError};
use super::{DEFAULT_PATH, RuntimeOptions};

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file is missing or unreadable.
    #[error("the configuration file {} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file says something that is not understood.
    #[error("{file}, line {line}: {message}")]
    At {
        /// The file, or what stands for it.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A pod's own wish that is not granted.
    #[error("the annotation {name} {why}")]
    Annotation {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Settings that contradict each other.
    #[error("the configuration contradicts itself: {0}")]
    Contradiction(&'static str),
}

impl Config {
    /// Reads what the runtime options ask for, or the default file.
    ///
    /// # Errors
    /// A named file that is missing, or anything that is not understood.
    pub fn load(options: &RuntimeOptions) -> Result<Self, ConfigError> {
        let config = match (&options.config_path, &options.config_body) {
            (Some(path), _) => Self::read(path, true)?,
            (None, Some(body)) => Self::parse("the runtime's options", body)?,
            (None, None) => Self::read(Path::new(DEFAULT_PATH), false)?,
        };
        config.check()?;
        Ok(config)
    }

    fn read(path: &Path, required: bool) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        match std::fs::read_to_string(path) {
            Ok(text) => config.merge(&path.to_string_lossy(), &text)?,
            Err(source) if source.kind() == ErrorKind::NotFound && !required => {}
            Err(source) => return Err(ConfigError::Read { path: path.to_owned(), source }),
        }
        for path in drop_ins(path)? {
            let text = std::fs::read_to_string(&path)
                .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            config.merge(&path.to_string_lossy(), &text)?;
        }
        Ok(config)
    }

    /// Reads one text on top of the defaults. `file` names it in errors.
    pub(super) fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        config.merge(file, text)?;
        Ok(config)
    }

    fn merge(&mut self, file: &str, text: &str) -> Result<(), ConfigError> {
        let at = |offset: usize, message: String| {
            let line = text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1;
            ConfigError::At { file: file.to_owned(), line, message }
        };
        let document = DeTable::parse(text)
            .map_err(|error| at(error.span().map_or(0, |span| span.start), error.message().to_owned()))?;
        for (section, body) in document.get_ref() {
            let name = section.get_ref().as_ref();
            if !Self::SECTIONS.contains(&name) {
                let message = unknown("section", name, Self::SECTIONS);
                return Err(at(section.span().start, message));
            }
            let Some(table) = body.get_ref().as_table() else {
                return Err(at(section.span().start, format!("`{name}` must be a section, [{name}]")));
            };
            for (key, value) in table {
                let key_name = key.get_ref().as_ref();
                self.set(name, key_name, value.get_ref()).map_err(|error| {
                    let message = match error {
                        KeyError::Unknown => unknown("key", key_name, Self::keys(name)),
                        KeyError::Value(why) => format!("`{key_name}` {why}"),
                    };
                    at(key.span().start, message)
                })?;
            }
        }
        Ok(())
    }

    /// Whether settings fit each other.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let vm = &self.hypervisor;
        if vm.default_vcpus > vm.max_vcpus {
            return Err(ConfigError::Contradiction("`default_vcpus` is larger than `max_vcpus`"));
        }
        if vm.min_memory_mib > vm.max_memory_mib {
            return Err(ConfigError::Contradiction("`min_memory_mib` is larger than `max_memory_mib`"));
        }
        if vm.default_memory_mib > vm.max_memory_mib {
            return Err(ConfigError::Contradiction("`default_memory_mib` is larger than `max_memory_mib`"));
        }
        let above = |rate, most| most > 0 && rate > most;
        if above(vm.receive_kib_per_second, vm.max_receive_kib_per_second) {
            let what = "`receive_kib_per_second` is larger than `max_receive_kib_per_second`";
            return Err(ConfigError::Contradiction(what));
        }
        if above(vm.send_kib_per_second, vm.max_send_kib_per_second) {
            let what = "`send_kib_per_second` is larger than `max_send_kib_per_second`";
            return Err(ConfigError::Contradiction(what));
        }
        Ok(())
    }
}

/// The files `config.d/*.toml` beside the main one, in the order of their names.
fn drop_ins(main: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let Some(directory) = main.parent().map(|parent| parent.join("config.d")) else {
        return Ok(Vec::new());
    };
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(source) => return Err(ConfigError::Read { path: directory, source }),
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    paths.sort();
    Ok(paths)
}

fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    match nearest(name, known) {
        Some(near) => format!("unknown {what} `{name}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{name}`; known are {}", known.join(", ")),
    }
}

/// The known name that is fewest edits away, if that is near enough to be a slip of the pen.
pub(super) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|candidate| (edit_distance(name, candidate), *candidate))
        .min()
        .filter(|(distance, candidate)| *distance * 2 <= candidate.len().max(3))
        .map(|(_, candidate)| candidate)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a_char) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (b_char, cell) in b.iter().zip(row.iter_mut().skip(1)) {
            let above = *cell;
            left = (diagonal + usize::from(a_char != *b_char)).min(left + 1).min(above + 1);
            diagonal = above;
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(text: &str) -> String {
        Config::parse("c.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn unknown_key_names_line_and_neighbour() {
        assert_eq!(
            error("[hypervisor]\n\ndefault_vcpu = 2\n"),
            "c.toml, line 3: unknown key `default_vcpu`; did you mean `default_vcpus`?"
        );
        assert_eq!(
            error("[hypervisr]\n"),
            "c.toml, line 1: unknown section `hypervisr`; did you mean `hypervisor`?"
        );
        assert!(error("[runtime]\nzzzzzzzz = 1\n").contains("known are state_dir"));
    }

    #[test]
    fn bad_values_say_what_fits() {
        assert_eq!(
            error("[hypervisor]\ndefault_vcpus = 0\n"),
            "c.toml, line 2: `default_vcpus` must be from 1 to 64"
        );
        assert!(error("[hypervisor]\ndefault_vcpus = 999\n").contains("must be from 0 to 255"));
        assert!(
            error("[hypervisor]\ndefault_vcpus = \"2\"\n").contains("must be a whole number, not a string")
        );
        assert!(error("[hypervisor]\nkernel = \"vmlinux\"\n").contains("must be an absolute path"));
        assert!(error("[runtime]\nlog_level = \"loud\"\n").contains("must be \"error\""));
        assert!(error("hypervisor = 3\n").contains("must be a section"));
        assert!(error("[hypervisor\n").starts_with("c.toml, line 1: "));
    }

    #[test]
    fn drop_ins_override_in_order_of_name() {
        let directory = tempfile::tempdir().unwrap();
        let main = directory.path().join("configuration.toml");
        std::fs::create_dir(directory.path().join("config.d")).unwrap();
        std::fs::write(&main, "[hypervisor]\ndefault_vcpus = 2\ndefault_memory_mib = 300\n").unwrap();
        std::fs::write(directory.path().join("config.d/20.toml"), "[hypervisor]\ndefault_vcpus = 4\n")
            .unwrap();
        std::fs::write(directory.path().join("config.d/10.toml"), "[hypervisor]\ndefault_vcpus = 3\n")
            .unwrap();
        std::fs::write(directory.path().join("config.d/note.txt"), "not toml").unwrap();
        let options = RuntimeOptions { config_path: Some(main), ..RuntimeOptions::default() };
        let config = Config::load(&options).unwrap();
        assert_eq!((config.hypervisor.default_vcpus, config.hypervisor.default_memory_mib), (4, 300));
    }

    #[test]
    fn a_named_file_must_exist() {
        let options =
            RuntimeOptions { config_path: Some("/nonexistent/x.toml".into()), ..Default::default() };
        assert!(Config::load(&options).unwrap_err().to_string().contains("/nonexistent/x.toml"));
    }

    #[test]
    fn contradictions_are_refused() {
        let body = Some("[hypervisor]\ndefault_vcpus = 8\nmax_vcpus = 4\n".to_owned());
        let options = RuntimeOptions { config_body: body, ..RuntimeOptions::default() };
        assert!(matches!(Config::load(&options), Err(ConfigError::Contradiction(_))));
    }

    proptest! {
        #[test]
        fn any_text_gives_settings_or_an_error(text in ".{0,200}") {
            let _ = Config::parse("x", &text);
        }

        #[test]
        fn distance_is_symmetric_and_zero_only_for_equals(a in "[a-d]{0,8}", b in "[a-d]{0,8}") {
            prop_assert_eq!(edit_distance(&a, &b), edit_distance(&b, &a));
            prop_assert_eq!(edit_distance(&a, &b) == 0, a == b);
        }
    }
}
